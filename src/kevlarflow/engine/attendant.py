"""The engine's line to the controller: a thread that brings orders to the session and reports back.

It never waits for the engine thread for longer than a few milliseconds, so a newer order always gets through: a node
may die while the engine thread waits for the result of a step that will never come.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

import zmq

from kevlarflow.config import ServeConfig
from kevlarflow.engine.session import Session
from kevlarflow.types import Epoch
from kevlarflow.wire.messages import (
    AnyMessage,
    EngineReport,
    Form,
    Hasten,
    Introduce,
    Standbys,
    Suspend,
    decode,
    encode,
)

log = logging.getLogger("kevlarflow.engine")

PATIENCE_SECONDS = 0.005
"""How long to wait for the session's door before looking at the controller's channel again."""

Load = Callable[[], tuple[int, int, int]]
"""Returns (running requests, waiting requests, KV blocks) of the scheduler."""


class Attendant(threading.Thread):
    """See the module's text."""

    def __init__(self, config: ServeConfig, session: Session) -> None:
        super().__init__(name="attendant", daemon=True)
        self._config = config
        self._session = session
        self._load: Load | None = None
        self._stopping = threading.Event()

    def watch(self, load: Load) -> None:
        """Report this load from now on: the scheduler exists."""
        self._load = load

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        self._stopping.set()
        os.eventfd_write(self._session.report_bell, 1)
        self.join(timeout=2.0)

    def run(self) -> None:
        """Serve until stopped. Without it the engine would obey no order any more, so its failure ends the engine."""
        try:
            self._serve()
        except Exception:
            log.exception("the engine ends: its line to the controller failed")
            os._exit(1)

    def _serve(self) -> None:
        controller: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        controller.setsockopt(zmq.LINGER, 0)
        controller.setsockopt(zmq.SNDHWM, 1_000)
        controller.connect(self._config.controller_address)
        poller = zmq.Poller()
        poller.register(controller, zmq.POLLIN)
        poller.register(self._session.report_bell, zmq.POLLIN)
        interval = self._config.timeouts.report_interval_ms / 1_000
        due = time.monotonic()
        self._introduce(controller)
        busy = False
        while not self._stopping.is_set():
            wait = 0.0 if busy else max(0.0, due - time.monotonic())
            ready = dict(poller.poll(round(wait * 1_000)))
            if controller in ready:
                self._take_orders(controller)
            if time.monotonic() >= due:
                due = time.monotonic() + interval
                self._report_load(controller)
            busy = self._session.attend(PATIENCE_SECONDS)
            self._send_reports(controller)
        controller.close()

    def _take_orders(self, controller: zmq.Socket[bytes]) -> None:
        while True:
            try:
                message = decode(controller.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            match message:
                case Form() | Suspend() | Standbys() | Hasten():
                    self._session.post(message)
                case Introduce():
                    self._introduce(controller)

    def _introduce(self, controller: zmq.Socket[bytes]) -> None:
        self._send(controller, self._session.introduction)

    def _report_load(self, controller: zmq.Socket[bytes]) -> None:
        session = self._session
        session.glance()
        # Before the rest is looked at: a report must not seem newer than it is.
        epoch = Epoch(session.epoch)
        running, waiting, blocks = self._load() if self._load else (0, 0, 0)
        report = EngineReport(
            session.pipeline,
            running,
            waiting,
            blocks,
            session.in_flight,
            session.replication(),
            epoch,
            session.forming,
            session.still_seconds,
            session.awaited,
        )
        self._send(controller, report)

    def _send_reports(self, controller: zmq.Socket[bytes]) -> None:
        try:
            os.eventfd_read(self._session.report_bell)
        except BlockingIOError:
            return
        while self._session.reports:
            self._send(controller, self._session.reports.popleft())

    @staticmethod
    def _send(controller: zmq.Socket[bytes], message: AnyMessage) -> None:
        """With no controller there, messages pile up to the socket's limit and are then dropped: it asks again."""
        try:
            controller.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return
