"""The replaying client against a server that misbehaves on order: what it records is what was sent, and no more."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kevlarflow.faults import FaultDidNotHappen, Progress
from parity.client import Recording, Replay, in_lanes, replay
from parity.workload import completion

EVENTS = 5
HANG_SECONDS = 30.0


def stream_event(position: int) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": str(position), "token_ids": [position], "finish_reason": None}]}


class Server(BaseHTTPRequestHandler):
    """Does what the prompt says."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str | None]]
    closed: threading.Event

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((body["prompt"], self.headers.get("X-data-parallel-rank")))
        getattr(self, f"_{body['prompt']}")()

    def _answer(self) -> None:
        self._begin()
        for position in range(EVENTS):
            self._send(f"data: {json.dumps(stream_event(position))}\n\n")
        self._send("data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _break_off(self) -> None:
        self._begin()
        self._send(f"data: {json.dumps(stream_event(0))}\n\n")
        self.close_connection = True

    def _hang(self) -> None:
        self._begin()
        self._send(f"data: {json.dumps(stream_event(0))}\n\n")
        self.closed.wait(HANG_SECONDS)

    def _stream_until_closed(self) -> None:
        self._begin()
        try:
            for position in range(100_000):
                self._send(f"data: {json.dumps(stream_event(position))}\n\n")
                time.sleep(0.001)
        except OSError:
            self.closed.set()
        self.close_connection = True

    def _refuse(self) -> None:
        content = json.dumps({"error": {"message": "no"}}).encode()
        self.send_response(503)
        self.send_header("Retry-After", "3")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send(self, text: str) -> None:
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is the library's
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (Server,), {"seen": [], "closed": threading.Event()})
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    running.daemon_threads = True
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    handler.closed.set()
    running.shutdown()
    running.server_close()


def record(server: ThreadingHTTPServer, prompt: str, timeout: float = 10.0, **fields: Any) -> Recording:
    request = completion("r", prompt, "", **fields)
    return replay(f"http://127.0.0.1:{server.server_port}", [request], timeout=timeout)["r"]


def test_every_event_is_recorded_with_its_time(server: ThreadingHTTPServer) -> None:
    recording = record(server, "answer")
    assert recording.events == [stream_event(position) for position in range(EVENTS)]
    assert recording.done
    assert recording.failure is None
    assert recording.times == sorted(recording.times)
    assert len(recording.gaps) == EVENTS
    assert Recording.from_json(json.loads(json.dumps(recording.to_json()))) == recording


def test_a_connection_that_breaks_is_a_failure(server: ThreadingHTTPServer) -> None:
    recording = record(server, "break_off")
    assert recording.events == [stream_event(0)]
    assert not recording.done
    assert recording.failure


def test_a_stream_that_hangs_is_a_failure(server: ThreadingHTTPServer) -> None:
    recording = record(server, "hang", timeout=0.5)
    assert not recording.done
    assert recording.failure


def test_a_refusal_is_recorded(server: ThreadingHTTPServer) -> None:
    recording = record(server, "refuse")
    assert (recording.status, recording.retry_after) == (503, "3")
    assert recording.events == [{"error": {"message": "no"}}]


def test_cancelling_closes_the_connection(server: ThreadingHTTPServer) -> None:
    recording = record(server, "stream_until_closed", cancel_after_events=3)
    assert len(recording.events) == 3
    assert recording.cancelled
    assert not recording.done
    assert server.RequestHandlerClass.closed.wait(10), "the server never saw the client leave"  # type: ignore[attr-defined]


def test_requests_keep_their_order_and_pipeline(server: ThreadingHTTPServer) -> None:
    requests = [
        completion("first", "answer", "", pipeline=3),
        completion("second", "refuse", "", after="first"),
        completion("third", "answer", "", after="second", pipeline=1),
    ]
    replay(f"http://127.0.0.1:{server.server_port}", requests, pipelines=2)
    seen = server.RequestHandlerClass.seen  # type: ignore[attr-defined]
    assert seen == [("answer", "1"), ("refuse", None), ("answer", "1")]


def test_lanes_bound_how_many_run_at_a_time() -> None:
    requests = [completion(str(index), "answer", "", at=5.0, cancel_after_events=1) for index in range(5)]
    queued = in_lanes(requests, 2)
    assert [request.after for request in queued] == [None, None, "0", "1", "2"]
    assert all(request.at == 0 and request.cancel_after_events is None for request in queued)


def test_the_observer_sees_progress_and_may_stop_the_replay(server: ThreadingHTTPServer) -> None:
    def watch(progress: Progress, now: float) -> None:
        if progress.tokens == 2:
            raise FaultDidNotHappen("missed")

    url = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(FaultDidNotHappen):
        replay(url, [completion("r", "answer", "")], observer=watch)


def test_what_runs_beside_can_wait_for_progress(server: ThreadingHTTPServer) -> None:
    reached: list[bool] = []

    async def beside(current: Replay) -> None:
        reached.append(await current.reached(lambda progress: progress.tokens >= 3))
        reached.append(await current.reached(lambda progress: progress.tokens > 1000))

    url = f"http://127.0.0.1:{server.server_port}"
    replay(url, [completion("r", "answer", "")], beside=beside)
    assert reached == [True, False]
