"""What clients are told while nothing can generate, and why a request has failed.

vLLM's server knows its engines, not the nodes behind them. The controller knows both, and `Watch` holds its latest
word. From it come four things that vLLM cannot say:

* ``GET /health`` (and vLLM's other name for it, ``/ping``) is 200 exactly while at least one pipeline can generate;
* new generation requests get HTTP 503 with ``Retry-After`` while none can, rather than wait for a node;
* a request that had to be ended says why, where vLLM says "Internal server error";
* ``GET /metrics`` has the controller's metrics next to vLLM's.

The first two are an ASGI middleware, which vLLM adds by its public ``--middleware``. The third replaces a method and a
function of vLLM and wraps another method, whose signatures `kevlarflow.engine.arguments.check_vllm` checks at start.
The last is a Prometheus collector.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import msgspec
import zmq
from prometheus_client import REGISTRY, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from kevlarflow.config import ServeConfig
from kevlarflow.recovery.suspicion import NOT_AGAIN
from kevlarflow.wire.messages import AskMetrics, Availability, Metrics, Subscribe, decode, encode

log = logging.getLogger("kevlarflow.engine.availability")

REFRESH_SECONDS = 1.0
"""How often the subscription is renewed, so that a controller that was started again learns of it."""
RETRY_SECONDS = 0.05
HEALTH_PATHS = ("/health", "/ping")
GENERATION_PREFIXES = ("/v1/", "/v2/", "/inference/", "/invocations", "/generate", "/generative_scoring", "/cohere/")
OTHER_SUFFIXES = ("/cancel", "/abort_requests", "/count_tokens", "/render", "/derender")
"""Of routes among them that generate nothing, and need no node."""
MAX_REASONS = 1_000
"""Of requests that were ended and whose clients have yet to be told why."""
UNKNOWN = Availability(serving=False, started=False, reason="the cluster is starting", retry_after_seconds=1)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class Watch:
    """The controller's latest word on availability, kept by a thread.

    When the controller dies its last word stays: the pipelines go on without it.
    """

    def __init__(self, address: str) -> None:
        self.latest = UNKNOWN
        self.metrics = b""
        """The controller's metrics in Prometheus' text format, at most a refresh old."""
        self._address = address

    def start(self) -> None:
        """Begin to listen. Only after the engines were forked: a fork must not meet a second thread."""
        threading.Thread(target=self._listen, name="kevlarflow-availability", daemon=True).start()

    def _listen(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        # Nothing is queued for a controller that is away; the next refresh asks again.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        socket.connect(self._address)
        refresh = 0.0
        while True:
            now = time.monotonic()
            if now >= refresh:
                refresh = now + (REFRESH_SECONDS if self._ask(socket) else RETRY_SECONDS)
            if socket.poll(max(1, int((refresh - now) * 1000))):
                self._take(socket.recv())

    def _ask(self, socket: zmq.Socket[bytes]) -> bool:
        try:
            socket.send(encode(Subscribe()), zmq.NOBLOCK)
            socket.send(encode(AskMetrics()), zmq.NOBLOCK)
        except zmq.Again:
            return False  # Not connected.
        return True

    def _take(self, frame: bytes) -> None:
        try:
            message = decode(frame)
        except msgspec.DecodeError:
            return
        if isinstance(message, Availability):
            self.latest = message
        elif isinstance(message, Metrics):
            self.metrics = message.exposition


_watch = Watch("")


def configure(config: ServeConfig) -> None:
    """Say where the controller is. vLLM makes the middleware without arguments, so this is process-wide."""
    global _watch
    _watch = Watch(config.controller_address)


class ControllerMetrics(Collector):
    """The controller's metrics, for the Prometheus registry of this process."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def describe(self) -> list[Metric]:
        """Say nothing ahead: the controller decides what it has."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield what the controller said last."""
        yield from text_string_to_metric_families(self._watch.metrics.decode())


class Reasons:
    """Why the engines have ended requests. The scheduler hook sends the reason along as the stop reason.

    An engine's name for a request has the server's in it: what tells its choices and prompts apart stands before that
    with ``_``, and behind it with ``-``; what tells the turns of a response or the chats of a batch apart stands behind
    it with ``_``.
    """

    def __init__(self) -> None:
        self._of: dict[str, str] = {}

    def listen(self, output_processor: Any) -> None:
        """Look at what the engines send before vLLM does."""
        original = output_processor.process_outputs

        def process_outputs(engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            for output in engine_core_outputs:
                if isinstance(output.stop_reason, str) and str(output.finish_reason) == "error":
                    self._of[output.request_id] = output.stop_reason
            for forgotten in list(self._of)[:-MAX_REASONS]:
                del self._of[forgotten]
            return original(engine_core_outputs, *args, **kwargs)

        output_processor.process_outputs = process_outputs

    def of(self, request: str) -> str:
        """Why a request of the server was ended; empty if not by us."""
        wanted = re.compile(rf"_{re.escape(request)}(_\d+)?-")
        return next((reason for name, reason in self._of.items() if wanted.search(f"_{name}-")), "")


_reasons = Reasons()


def learn_reasons(output_processor: Any) -> None:
    """Let `explain_failed_requests` know what the engines say of the requests that they end."""
    _reasons.listen(output_processor)


def explain_failed_requests() -> None:
    """Let a request that ends in an error say why, where vLLM says "Internal server error"."""
    from vllm.entrypoints.generate import label_reads
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    original, merge = GenerateBaseServing._raise_if_error, label_reads.merge_async_iterators

    def raise_if_error(serving: Any, finish_reason: str | None, request_id: str) -> None:
        _raise_our_error(finish_reason, request_id)
        # It is well, or has failed of what vLLM knows.
        original(serving, finish_reason, request_id)

    async def merge_async_iterators(*iterators: Any) -> AsyncIterator[tuple[int, Any]]:
        """The outputs of the requests of a scoring, which takes one that has failed for a mistake of its client."""
        async with contextlib.aclosing(merge(*iterators)) as merged:
            async for index, output in merged:
                for completion in output.outputs:
                    _raise_our_error(completion.finish_reason, output.request_id)
                yield index, output

    GenerateBaseServing._raise_if_error = raise_if_error
    label_reads.merge_async_iterators = merge_async_iterators


def _raise_our_error(finish_reason: str | None, request_id: str) -> None:
    """Raise vLLM's exception for a request that an engine of ours has ended, with the reason."""
    from vllm.exceptions import GenerationError, RetryableRequestError

    reason = _reasons.of(request_id) if finish_reason == "error" else ""
    if reason:
        log.error("request %s was ended with an error: %s", request_id, reason)
        # The second is HTTP 503, which clients and proxies take for "try again".
        raise GenerationError(reason) if reason.endswith(NOT_AGAIN) else RetryableRequestError(reason)


class AvailabilityMiddleware:
    """Answers for the cluster where the cluster has something to say, and leaves the rest to vLLM."""

    def __init__(self, app: Application, watch: Watch | None = None) -> None:
        self._app = app
        self._watch = watch or _watch
        if watch is None:
            # vLLM builds its middleware when the server starts, which is after the engines were forked.
            self._watch.start()
            REGISTRY.register(ControllerMetrics(self._watch))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI defines it."""
        if scope["type"] == "http":
            now, path = self._watch.latest, _route(scope)
            if not now.serving and path in HEALTH_PATHS:
                await _answer(send, now, _health_body(now))
                return
            if not now.serving and now.started and scope["method"] == "POST" and _generates(path):
                await _answer(send, now, _error_body(now))
                return
        await self._app(scope, receive, send)


def _route(scope: Scope) -> str:
    """The path as vLLM's routes have it: without the `--root-path` of a proxy, which may or may not be there."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _generates(path: str) -> bool:
    return path.startswith(GENERATION_PREFIXES) and not path.endswith(OTHER_SUFFIXES)


def _health_body(now: Availability) -> dict[str, Any]:
    return {"status": "unavailable" if now.started else "starting", "reason": now.reason}


def _error_body(now: Availability) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": now.reason, "type": "ServiceUnavailableError", "param": None, "code": 503}}


async def _answer(send: Send, now: Availability, body: dict[str, Any]) -> None:
    content = json.dumps(body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
        (b"retry-after", str(now.retry_after_seconds).encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": content})
