from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from kevlarflow.engine import availability
from kevlarflow.engine.availability import AvailabilityMiddleware, ControllerMetrics, Reasons, Watch
from kevlarflow.recovery.suspicion import REASON
from kevlarflow.wire.messages import AskMetrics, Availability, Metrics, Subscribe, decode, encode
from standins import wait_until

SERVING = Availability(serving=True, started=True, reason="", retry_after_seconds=0)
DOWN = Availability(serving=False, started=True, reason="stage 1 has no node", retry_after_seconds=7)
STARTING = Availability(serving=False, started=False, reason="waiting for node-0-1", retry_after_seconds=1)


def ask(now: Availability, method: str, path: str, root: str = "") -> tuple[int, dict[str, str], bytes]:
    """One request through the middleware; vLLM behind it would answer 299."""
    sent: list[dict[str, Any]] = []

    async def vllm(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b"vllm"})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read from a request that is turned away")

    watch = Watch("")
    watch.latest = now
    scope = {"type": "http", "method": method, "path": path, "root_path": root}
    asyncio.run(AvailabilityMiddleware(vllm, watch)(scope, receive, send))
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], headers, b"".join(message["body"] for message in sent[1:])


@pytest.mark.parametrize("path", ["/health", "/ping"])
@pytest.mark.parametrize("now", [DOWN, STARTING])
def test_health_is_503_with_the_reason_while_nothing_can_generate(now: Availability, path: str) -> None:
    status, headers, body = ask(now, "GET", path)
    assert status == 503
    assert json.loads(body) == {"status": "unavailable" if now.started else "starting", "reason": now.reason}
    assert headers["retry-after"] == str(now.retry_after_seconds)


def test_health_is_vllms_while_something_can_generate() -> None:
    assert ask(SERVING, "GET", "/health")[0] == 299


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/invocations",
        "/cohere/v2/chat",
        "/generative_scoring",
    ],
)
def test_new_requests_are_turned_away_in_openais_form(path: str) -> None:
    status, headers, body = ask(DOWN, "POST", path)
    assert status == 503
    assert headers["retry-after"] == "7"
    assert int(headers["content-length"]) == len(body)
    assert json.loads(body)["error"]["message"] == "stage 1 has no node"
    assert ask(SERVING, "POST", path)[0] == 299


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("POST", "/v1/completions")])
def test_behind_a_root_path_an_outage_is_seen_as_well(method: str, path: str) -> None:
    assert ask(DOWN, method, f"/api{path}", "/api")[0] == 503
    assert ask(DOWN, method, path, "/api")[0] == 503, "the proxy has taken it off"
    assert ask(DOWN, method, f"/apis{path}", "/api")[0] == 299


@pytest.mark.parametrize(
    ("now", "method", "path"),
    [
        (DOWN, "GET", "/v1/models"),
        (DOWN, "GET", "/metrics"),
        (DOWN, "POST", "/tokenize"),
        (DOWN, "POST", "/v1/responses/resp_1/cancel"),
        (DOWN, "POST", "/inference/v1/abort_requests"),
        (DOWN, "POST", "/v1/messages/count_tokens"),
        (DOWN, "POST", "/v1/chat/completions/render"),
        (DOWN, "POST", "/v1/completions/derender"),
        (STARTING, "POST", "/v1/completions"),
    ],
)
def test_the_rest_is_vllms(now: Availability, method: str, path: str) -> None:
    assert ask(now, method, path)[0] == 299


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[tuple[str, zmq.Context[zmq.Socket[bytes]]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield f"ipc://{tmp_path}/c.sock", context
    context.destroy(linger=0)


def answer_once(router: zmq.Socket[bytes], availability: Availability) -> None:
    """Answer a subscription and the question for metrics that comes with it."""
    asked = set()
    while asked != {Subscribe, AskMetrics}:
        assert router.poll(30_000)
        peer, frame = router.recv_multipart()
        asked.add(type(decode(frame)))
        router.send_multipart([peer, b"nonsense"])
        router.send_multipart([peer, encode(availability)])
        router.send_multipart([peer, encode(Metrics(b"# TYPE kevlarflow_nodes gauge\nkevlarflow_nodes 4.0\n"))])


def test_the_watch_follows_a_controller_through_its_restart(
    controller: tuple[str, zmq.Context[zmq.Socket[bytes]]],
) -> None:
    address, context = controller
    watch = Watch(address)
    watch.start()
    assert not watch.latest.serving
    for word in (SERVING, DOWN):
        router = context.socket(zmq.ROUTER)
        router.bind(address)
        answer_once(router, word)
        wait_until(lambda: watch.latest == word)  # noqa: B023
        router.close(linger=0)
        time.sleep(0.1)
        assert watch.latest == word  # The last word stays.
    registry = CollectorRegistry()
    registry.register(ControllerMetrics(watch))
    assert b"kevlarflow_nodes 4.0" in generate_latest(registry)


class _Output:
    def __init__(self, request_id: str, finish_reason: str | None, stop_reason: str | None) -> None:
        self.request_id = request_id
        self.finish_reason = finish_reason
        self.stop_reason = stop_reason


class _OutputProcessor:
    def __init__(self) -> None:
        self.seen: list[_Output] = []

    def process_outputs(self, engine_core_outputs: list[_Output], timestamp: float) -> float:
        self.seen += engine_core_outputs
        return timestamp


def test_each_failed_request_has_the_reason_that_its_engine_gave() -> None:
    processor, reasons = _OutputProcessor(), Reasons()
    reasons.listen(processor)
    outputs = [
        _Output("cmpl-1-0-5eed", None, None),
        _Output("cmpl-2-0-5eed", "stop", "END"),
        _Output("1_cmpl-3-0-5eed", "error", "stage 1 has no node"),
        _Output("chatcmpl-4-5eed", "error", "2 nodes were lost"),
        _Output("cmpl-5-0-5eed", "error", None),
        _Output("cmpl-60-0-5eed", "error", "step 7 failed"),
        _Output("resp_7_0-5eed", "error", "no room is left"),
        _Output("chatcmpl-8_12-5eed", "error", "step 9 failed"),
    ]
    assert processor.process_outputs(outputs, 2.5) == 2.5
    assert processor.seen == outputs
    told = [reasons.of(f"cmpl-{number}") for number in (1, 2, 3, 5, 6)]
    assert told == ["", "", "stage 1 has no node", "", ""]
    assert reasons.of("chatcmpl-4") == "2 nodes were lost"
    # A turn of a response, and a conversation of a batch.
    assert (reasons.of("resp_7"), reasons.of("chatcmpl-8")) == ("no room is left", "step 9 failed")
    assert reasons.of("resp_") == reasons.of("resp.7") == ""


def test_only_the_last_reasons_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "MAX_REASONS", 2)
    processor, reasons = _OutputProcessor(), Reasons()
    reasons.listen(processor)
    for number in range(4):
        processor.process_outputs([_Output(f"cmpl-{number}", "error", f"reason {number}")], 0.0)
    assert [reasons.of(f"cmpl-{number}") for number in range(4)] == ["", "", "reason 2", "reason 3"]


def test_an_error_that_is_not_ours_is_vllms_to_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import GenerationError, RetryableRequestError

    monkeypatch.setattr(GenerateBaseServing, "_raise_if_error", GenerateBaseServing._raise_if_error)
    monkeypatch.setattr(availability, "_reasons", Reasons())
    processor = _OutputProcessor()
    availability.learn_reasons(processor)
    availability.explain_failed_requests()
    processor.process_outputs([_Output("cmpl-1-0", "error", "stage 1 has no node")], 0.0)
    processor.process_outputs([_Output("cmpl-3-0", "error", REASON)], 0.0)
    GenerateBaseServing._raise_if_error(None, "stop", "cmpl-1")
    with pytest.raises(RetryableRequestError, match="stage 1 has no node"):
        GenerateBaseServing._raise_if_error(None, "error", "cmpl-1")
    with pytest.raises(GenerationError, match="2 nodes were lost") as told:
        GenerateBaseServing._raise_if_error(None, "error", "cmpl-3")
    assert not isinstance(told.value, RetryableRequestError), "to try it again would cost two more nodes"
    with pytest.raises(GenerationError, match="Internal server error"):
        GenerateBaseServing._raise_if_error(None, "error", "cmpl-2")


def test_a_scoring_that_an_engine_has_ended_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams
    from vllm.entrypoints.generate import label_reads
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import RetryableRequestError
    from vllm.outputs import CompletionOutput, RequestOutput

    monkeypatch.setattr(GenerateBaseServing, "_raise_if_error", GenerateBaseServing._raise_if_error)
    monkeypatch.setattr(label_reads, "merge_async_iterators", label_reads.merge_async_iterators)
    monkeypatch.setattr(availability, "_reasons", Reasons())
    processor = _OutputProcessor()
    availability.learn_reasons(processor)
    availability.explain_failed_requests()
    processor.process_outputs([_Output("scoring-1-1-5eed", "error", "stage 1 has no node")], 0.0)
    let_go: list[str] = []

    class Engines:
        async def generate(self, _: Any, __: Any, name: str, **___: Any) -> Any:
            try:
                if name in hanging:
                    await asyncio.Event().wait()
                failed = CompletionOutput(0, "", [], None, None, finish_reason="error")
                yield RequestOutput(name, None, [1], None, [failed], finished=True)
            finally:
                let_go.append(name)

    def read(name: str) -> None:
        prompts, params = [{}, {}], [SamplingParams(max_tokens=1)] * 2
        asyncio.run(asyncio.wait_for(label_reads.next_token_label_reads(Engines(), prompts, params, name), 60))

    hanging = {"scoring-1-0"}
    with pytest.raises(RetryableRequestError, match="stage 1 has no node"):
        read("scoring-1")
    assert sorted(let_go) == ["scoring-1-0", "scoring-1-1"], "nobody would read the other one"
    with pytest.raises(ValueError, match="Generation error for item 0"):
        read("scoring-2")
