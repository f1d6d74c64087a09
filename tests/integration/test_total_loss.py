"""When no node of a stage is left: clients are told, nothing hangs, and service comes back by itself."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from integration.cluster import Cluster
from integration.failover import assert_identical, run
from integration.waiting import until
from kevlarflow.faults import KillServing
from parity import workload
from parity.client import Recording, Replay, replay
from parity.reference import Reference

pytestmark = pytest.mark.timeout(600)

PROBE = {"model": workload.MODEL, "prompt": "Hello", "max_tokens": 1}


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_clients_are_told_and_service_comes_back(stage: int, grid: Cluster, stock_reference: Reference) -> None:
    streams = workload.steady()
    refused: list[httpx.Response] = []

    async def kill_all(current: Replay) -> None:
        assert await current.reached(lambda progress: progress.tokens > 4 * len(streams))
        await asyncio.to_thread(grid.inject, *(KillServing(p, stage) for p in range(grid.pipelines)))
        refused.append(await asyncio.to_thread(wait_for_refusal, grid))

    started = time.monotonic()
    recordings = replay(grid.base_url, streams, pipelines=grid.pipelines, beside=kill_all)
    assert time.monotonic() - started < 60, "streams of a lost pipeline must end soon"
    assert int(refused[0].headers["Retry-After"]) > 0
    assert refused[0].json()["error"]["message"]

    until("/health is 200 again", grid.healthy, timeout=120)
    grid.wait_settled()
    requests = workload.named("plain-0", "plain-1", "seeded", "json")
    assert_identical(requests, stock_reference, run(grid, requests).recordings)
    for recording in recordings.values():
        check_told_why(recording, stock_reference)


def wait_for_refusal(cluster: Cluster) -> httpx.Response:
    """The first 503 to a new request; fails when service came back before anyone was refused."""

    def refusal() -> httpx.Response | None:
        answer = httpx.post(f"{cluster.base_url}/v1/completions", json=PROBE, timeout=30.0)
        return answer if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else None

    return until("a new request gets 503", refusal, timeout=10, poll=0.02)


def check_told_why(recording: Recording, stock: Reference) -> None:
    """The stream ended properly: right tokens as far as it went, then an error event that names the reason."""
    assert recording.failure is None, f"{recording.name}: {recording.failure}"
    errors = [event["error"] for event in recording.events if "error" in event]
    assert len(errors) == 1, f"{recording.name}: {recording.events[-2:]}"
    assert "stage" in errors[0]["message"], errors
    assert "error" in recording.events[-1], "nothing comes after the error"
    assert tokens_of(recording) == tokens_of(stock.recordings[recording.name])[: len(tokens_of(recording))]


def tokens_of(recording: Recording) -> list[Any]:
    return [
        token
        for event in recording.events
        for choice in event.get("choices", ())
        for token in choice.get("token_ids") or ()
    ]
