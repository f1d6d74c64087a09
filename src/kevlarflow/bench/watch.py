"""Watching a cluster while it is hurt: its status twenty times a second, and every line that it says.

One thread, one socket to the controller; whoever wants to know reads `latest` and `news`. What the answers mean
(is it calm again, which recovery was mine) is asked of pure functions below.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq

from kevlarflow.wire.channel import limit
from kevlarflow.wire.messages import AskStatus, Narration, Status, Subscribe, decode, encode

STATUS_INTERVAL_SECONDS = 0.05
SUBSCRIBE_INTERVAL_SECONDS = 1.0
NEWS_KEPT = 500
LOST = frozenset({"crash", "hang"})
REJOIN = frozenset({"rejoin"})
CLOCK_SLACK_SECONDS = 0.05
"""Records of the cluster carry Unix times that it derives from another clock."""

StatusDocument = dict[str, Any]


class News(NamedTuple):
    """A line that the cluster said."""

    time: float
    """Unix seconds."""
    text: str


class Watcher:
    """Watches the cluster in a run folder, from `start` to `close`; it need not be there yet."""

    def __init__(self, run_folder: Path) -> None:
        self.latest: StatusDocument | None = None
        """The newest status document."""
        self.latest_at = 0.0
        """`time.monotonic()` when it arrived."""
        self.news: deque[News] = deque(maxlen=NEWS_KEPT)
        self._path = run_folder / "controller.sock"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        limit(socket)
        # Nothing is queued for a controller that is not there.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        while not self._path.exists() and not self._closing.wait(STATUS_INTERVAL_SECONDS):
            pass
        if not self._closing.is_set():
            socket.connect(f"ipc://{self._path}")
        ask_at = subscribe_at = 0.0
        while not self._closing.is_set():
            now = time.monotonic()
            if now >= ask_at:
                ask_at = now + STATUS_INTERVAL_SECONDS
                _try_send(socket, AskStatus())
            if now >= subscribe_at and _try_send(socket, Subscribe(narration=True)):
                subscribe_at = now + SUBSCRIBE_INTERVAL_SECONDS
            if socket.poll(round(STATUS_INTERVAL_SECONDS * 1_000)):
                self._take(socket.recv())
        socket.close(linger=0)
        context.term()

    def _take(self, frame: bytes) -> None:
        try:
            message = decode(frame)
        except msgspec.DecodeError:
            return
        if isinstance(message, Status):
            self.latest, self.latest_at = msgspec.json.decode(message.document), time.monotonic()
        elif isinstance(message, Narration):
            self.news.append(News(message.time, message.text))


def _try_send(socket: zmq.Socket[bytes], message: AskStatus | Subscribe) -> bool:
    try:
        socket.send(encode(message), zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True


def is_settled(status: StatusDocument) -> bool:
    """Whether nothing is going on: every pipeline serves with its own nodes, all are ready, no request is left."""
    at_home = all(
        node == f"node-{pipeline['id']}-{stage}"
        for pipeline in status["pipelines"]
        for stage, node in enumerate(pipeline["nodes"])
    )
    return (
        at_home
        and all(pipeline["state"] == "serving" for pipeline in status["pipelines"])
        and all(node["state"] == "ready" for node in status["nodes"])
        and all(engine["state"] == "ready" for engine in status["engines"])
        and not any(engine["running"] or engine["waiting"] for engine in status["engines"])
        and not any(recovery["state"] == "running" for recovery in status["recoveries"])
    )


def recovery_after(
    status: StatusDocument, unix_time: float, pipeline: int, stage: int, causes: Collection[str] = LOST
) -> dict[str, Any] | None:
    """The record of a stage's first change of node since `unix_time` for one of these causes, when it has ended."""
    for recovery in status["recoveries"]:
        place = (recovery["pipeline"], recovery["stage"])
        is_later = recovery["time"] >= unix_time - CLOCK_SLACK_SECONDS
        if is_later and recovery["cause"] in causes and place == (pipeline, stage):
            found: dict[str, Any] = recovery
            return found if recovery["state"] != "running" else None
    return None
