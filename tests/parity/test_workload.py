"""The workload covers what it claims to, judged by stock vLLM's own answers."""

from __future__ import annotations

import json

import pytest

from parity import workload
from parity.compare import TIE_MARGIN
from parity.reference import Reference
from parity.transcript import transcribe

pytestmark = pytest.mark.timeout(600)

WANTED = {
    "cancel", "chat", "choices", "greedy", "json", "logprobs", "long", "penalties", "preemption", "prefix-hit",
    "prompt-logprobs", "seeded", "staggered", "stop",
}  # fmt: skip
CHUNK = 256


def covering(feature: str) -> list[workload.Request]:
    return [request for request in workload.full() if feature in request.covers]


def test_it_is_large_and_covers_every_feature() -> None:
    requests = workload.full()
    assert len(workload.by_name(requests)) >= 24
    assert workload.covered(requests) >= WANTED
    assert {request.pipeline for request in requests} == {0, 1, None}


def test_long_prompts_take_several_chunks(stock_reference: Reference) -> None:
    for request in covering("long"):
        usage = transcribe(stock_reference.recordings[request.name]).rest[-1]["usage"]
        assert usage["prompt_tokens"] > CHUNK, request.name


def test_stop_strings_end_their_requests(stock_reference: Reference) -> None:
    for request in covering("stop"):
        choice = transcribe(stock_reference.recordings[request.name]).choices[0]
        assert any(frame.get("stop_reason") in request.body["stop"] for frame in choice.frames), request.name


def test_structured_answers_follow_their_schema(stock_reference: Reference) -> None:
    for request in covering("json"):
        city = json.loads(transcribe(stock_reference.recordings[request.name]).choices[0].text)
        assert set(city) == {"name", "country", "population", "coastal"}


def test_choices_differ_from_each_other(stock_reference: Reference) -> None:
    for request in covering("choices"):
        choices = transcribe(stock_reference.recordings[request.name]).choices.values()
        assert len({choice.text for choice in choices}) == request.body["n"] > 1


def test_logprobs_are_there(stock_reference: Reference) -> None:
    for request in covering("logprobs"):
        choice = transcribe(stock_reference.recordings[request.name]).choices[0]
        assert len(choice.logprobs) >= len(choice.tokens) > 0
    for request in covering("prompt-logprobs"):
        transcript = transcribe(stock_reference.recordings[request.name])
        assert len(transcript.prompt_logprobs) + len(transcript.choices[0].logprobs) > 100


def test_cancelled_requests_would_have_gone_on(stock_reference: Reference) -> None:
    for request in covering("cancel"):
        assert request.cancel_after_events is not None
        assert len(stock_reference.recordings[request.name].events) > 4 * request.cancel_after_events


def test_no_answer_hangs_on_a_tie(stock_reference: Reference) -> None:
    """With prompts like these the excuse for ties is never needed."""
    near = {name: min(margins) for name, margins in stock_reference.margins.items() if min(margins) < TIE_MARGIN}
    assert near == {}
