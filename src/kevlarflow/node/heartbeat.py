"""The node's voice to the controller: a thread of its own, so that a long prefill does not make a node look dead.

It introduces the node, beats at a fixed interval, answers when a restarted controller asks who it is, and makes the
process leave when it is told to. The main loop never waits for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import zmq

from kevlarflow.config import ServeConfig
from kevlarflow.node.pace import PaceMeter
from kevlarflow.node.progress import Progress
from kevlarflow.types import Epoch, Member, NodeInfo, PipelineId
from kevlarflow.wire.messages import (
    AnyMessage,
    BeatHeard,
    Heartbeat,
    Introduce,
    NodeFailed,
    NodeReady,
    NodeStarting,
    Retire,
    decode,
    encode,
)

LINGER_MS = 1_000
"""How long last words may take to leave the process, if the controller is not there at once."""


class HeartbeatThread(threading.Thread):
    """See the module's text. `epochs` is asked for the newest epoch of each lane."""

    def __init__(
        self,
        config: ServeConfig,
        starting: NodeStarting,
        progress: Progress,
        pace: PaceMeter,
        epochs: Callable[[], dict[PipelineId, Epoch]],
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._config = config
        self._member: Member = starting.member
        self._introduction: AnyMessage = starting
        self._progress = progress
        self._pace = pace
        self._pace_due = 0.0
        self._epochs = epochs
        self._beats = 0
        self._heard = 0
        """The newest beat that the controller has answered."""
        self._inbox: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._inbox.bind(self._bell_address())

    def _bell_address(self) -> str:
        return f"inproc://heartbeat-{id(self)}"

    def say_ready(self, info: NodeInfo) -> None:
        """Called by the main thread once the node can join pipelines."""
        self._post(NodeReady(info, dict(self._epochs())))

    def say_failed(self, reason: str) -> None:
        """Called by the main thread when the node cannot start, and is about to exit.

        Returns when that is on its way, or nobody came to hear it: an exit ends ZeroMQ's thread, which sends it.
        """
        self._post(NodeFailed(self._member, reason))
        self.join(timeout=2 * LINGER_MS / 1_000)

    def _post(self, message: AnyMessage) -> None:
        bell: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        bell.connect(self._bell_address())
        bell.send(encode(message))
        bell.close(linger=LINGER_MS)

    def run(self) -> None:
        """Beat until the process ends."""
        # Of its own, because only the end of a context tells that what was sent is out.
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        controller = context.socket(zmq.DEALER)
        controller.setsockopt(zmq.LINGER, LINGER_MS)
        controller.setsockopt(zmq.SNDHWM, 1_000)
        controller.connect(self._config.controller_address)
        controller.send(encode(self._introduction))
        interval_ms = self._config.timeouts.heartbeat_interval_ms
        poller = zmq.Poller()
        poller.register(controller, zmq.POLLIN)
        poller.register(self._inbox, zmq.POLLIN)
        due = time.monotonic()
        while True:
            wait_ms = max(0, round((due - time.monotonic()) * 1_000))
            ready = dict(poller.poll(wait_ms))
            if self._inbox in ready:
                self._introduction = decode(self._inbox.recv())
                controller.send(encode(self._introduction))
                if isinstance(self._introduction, NodeFailed):
                    controller.close()
                    context.term()
                    return
            if controller in ready:
                self._answer(controller)
            if time.monotonic() >= due:
                due = time.monotonic() + interval_ms / 1_000
                self._try_send(controller, self._beat())

    def _beat(self) -> Heartbeat:
        step = self._progress.look()
        self._beats += 1
        now = time.monotonic()
        reports = now >= self._pace_due
        if reports:
            self._pace_due = now + self._config.timeouts.pace_interval_ms / 1_000
        return Heartbeat(
            self._member,
            step.running_seconds,
            step.pipeline,
            step.is_overdue,
            number=self._beats,
            heard=self._heard,
            done=dict(self._progress.done),
            pace=self._pace.report() if reports else None,
        )

    def _answer(self, controller: zmq.Socket[bytes]) -> None:
        match decode(controller.recv()):
            case BeatHeard(number=number):
                self._heard = max(self._heard, number)
            case Introduce():
                if isinstance(self._introduction, NodeReady):
                    self._introduction = NodeReady(self._introduction.info, dict(self._epochs()))
                self._try_send(controller, self._introduction)
            case Retire():
                os._exit(0)

    @staticmethod
    def _try_send(controller: zmq.Socket[bytes], message: AnyMessage) -> None:
        """With no controller there, beats pile up to the socket's limit and are then dropped: it will ask again."""
        try:
            controller.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return
