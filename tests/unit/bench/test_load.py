"""Load and prompts: who sends what, when, and that it is the same again."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from kevlarflow.bench import load, throughput
from kevlarflow.bench.experiment import Void, require_whole, turns
from kevlarflow.bench.prompts import clients, passage
from kevlarflow.bench.recipes import Recipe
from kevlarflow.bench.streams import Address, Request, Stream
from kevlarflow.bench.throughput import requests_each

NOWHERE = Address("127.0.0.1", 1)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is sent and ended, in order, by a client whose every request takes a moment."""
    happened: list[tuple[str, str]] = []

    async def send(_: Address, __: str, request: Request, *___: object) -> Stream:
        happened.append(("sent", request.name))
        await asyncio.sleep(0.02)
        happened.append(("ended", request.name))
        return Stream(request.name, 0.0)

    monkeypatch.setattr(load, "send", send)
    return happened


def test_a_closed_loop_has_one_request_of_each_client_under_way(sent: list[tuple[str, str]]):
    work = clients("x", 3, 2, 8, 2)
    streams = asyncio.run(load.closed_loop(NOWHERE, "m", work))
    assert [stream.name for stream in streams] == [request.name for requests in work for request in requests]
    under_way = list(itertools.accumulate(1 if what == "sent" else -1 for what, _ in sent))
    assert max(under_way) == 3
    assert sent.index(("ended", "client 0 request 0")) < sent.index(("sent", "client 0 request 1"))


def test_a_closed_loop_that_is_over_ends_what_it_has_begun(sent: list[tuple[str, str]]):
    streams = asyncio.run(load.closed_loop(NOWHERE, "m", clients("x", 2, 9, 8, 2), over=lambda: len(sent) >= 5))
    assert len(streams) == 3
    assert [what for what, _ in sent].count("ended") == 3


def test_an_open_loop_does_not_wait(sent: list[tuple[str, str]]):
    requests = [request for each in clients("x", 3, 1, 8, 2) for request in each]
    asyncio.run(load.open_loop(NOWHERE, "m", requests, [0.0, 0.001, 0.002]))
    assert [what for what, _ in sent[:3]] == ["sent"] * 3


def test_no_two_prompts_share_a_beginning():
    requests = [request for seed in ("1", "2") for each in clients(seed, 16, 4, 8, 2) for request in each]
    beginnings = {request.body["prompt"][:24] for request in requests}
    assert len(beginnings) == len(requests)


def test_prompts_are_the_same_for_the_same_seed():
    assert clients("7/1", 4, 2, 8, 2) == clients("7/1", 4, 2, 8, 2)
    assert passage("a") == passage("a") != passage("b")


def test_prompts_of_any_seed_are_equally_long():
    lengths = [
        [[request.body["prompt"].count(".") for request in each] for each in clients(seed, 16, 4, 8, 2)]
        for seed in "ab"
    ]
    assert lengths[0] == lengths[1]
    assert len({length for each in lengths[0] for length in each}) == 12


def test_streams_are_spread_evenly_over_the_pipelines():
    firsts = [requests[0].pipeline for requests in clients("x", 16, 2, 8, 2)]
    assert firsts.count(0) == firsts.count(1) == 8
    assert {request.pipeline for request in clients("x", 1, 4, 8, 2)[0]} == {0, 1}


def test_the_systems_take_turns():
    assert list(turns(3, ("A", "B"))) == [(1, "A"), (1, "B"), (2, "B"), (2, "A"), (3, "A"), (3, "B")]


def test_fewer_streams_send_more_requests_each():
    assert [requests_each(streams) for streams in (1, 4, 16, 64)] == [4, 3, 2, 2]


def test_a_failed_stream_voids():
    whole = Stream(
        "whole", 0.0, times=[1.0], counts=[1], pieces=["x"], usage_tokens=1, finish_reason="length", done=True
    )
    require_whole([whole], 1)
    with pytest.raises(Void, match=r"1 of 2 streams failed: broken: reset"):
        require_whole([whole, Stream("broken", 0.0, failure="reset")], 1)


def test_a_disturbed_load_is_measured_again_and_the_quietest_counts(monkeypatch: pytest.MonkeyPatch):
    shares = iter([0.5, 0.2, 0.3])
    seeds: list[str] = []

    def measured(_: object, __: object, seed: str, *___: object) -> SimpleNamespace:
        seeds.append(seed)
        return SimpleNamespace(strangers=next(shares))

    monkeypatch.setattr(throughput, "_load", measured)
    plan = throughput.Plan(Recipe())
    assert throughput._quietest(plan, None, 7, 4).strangers == 0.2  # type: ignore[arg-type]
    assert seeds == ["7/0", "7/1", "7/2"]
    shares = iter([0.05])
    assert throughput._quietest(plan, None, 8, 4).strangers == 0.05  # type: ignore[arg-type]
