"""When no node of a stage is left: requests wait for a replacement, up to a bound; clients are told, nothing hangs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import httpx
import pytest

from integration.cluster import FLAGS, PATIENT_SECONDS, Cluster, Status, running_cluster
from integration.failover import assert_identical, run
from integration.waiting import until
from kevlarflow.faults import KillServing, Target, strike, verify
from kevlarflow.faults.processes import command_line
from kevlarflow.faults.stopping import stop, thaw, verify_stopped
from kevlarflow.types import Computing, Member, NodeId
from kevlarflow.wire import flight_record
from parity import workload
from parity.client import Recording, Replay, replay
from parity.reference import Reference

pytestmark = pytest.mark.timeout(600)

PROBE = {"model": workload.MODEL, "prompt": "Hello", "max_tokens": 1}
LONG = PROBE | {"max_tokens": 400, "ignore_eos": True, "stream": True}
MIXED = [dataclasses.replace(each, at=0.0) for each in workload.named("json-seeded", "penalties-seeded", "choices")]
SHORT_WAIT_SECONDS = 1.0


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_streams_wait_for_a_replacement_and_go_on(stage: int, grid: Cluster, stock_reference: Reference) -> None:
    streams = [*workload.steady(), *MIXED]

    async def lose_the_stage(current: Replay) -> None:
        async with AsyncExitStack() as cancelled_one, httpx.AsyncClient(base_url=grid.base_url, timeout=60.0) as client:
            answer = await cancelled_one.enter_async_context(client.stream("POST", "/v1/completions", json=LONG))
            lines = answer.aiter_lines()  # Kept: httpx closes the connection of an iterator that is forgotten.
            await anext(lines)
            assert await current.reached(lambda progress: progress.tokens > 4 * len(streams))
            with no_replacements(grid):
                await asyncio.to_thread(kill_stage, grid, stage)
                check_refused(await asyncio.to_thread(wait_for_refusal, grid))
                all_of_them = await asyncio.to_thread(wait_until_all_wait, grid, stage)
                await cancelled_one.aclose()
                await asyncio.to_thread(wait_for_fewer, grid, all_of_them)

    recordings = replay(grid.base_url, streams, pipelines=grid.pipelines, beside=lose_the_stage)
    assert_identical(streams, stock_reference, recordings)
    paused = [name for name, recording in recordings.items() if max(recording.gaps) > SHORT_WAIT_SECONDS]
    assert len(paused) >= len(workload.steady()), f"only {paused} have waited for the replacement"
    status = grid.wait_settled()
    assert [pipeline["waiting_for"] for pipeline in status["pipelines"]] == [None] * grid.pipelines


@pytest.mark.slow
def test_a_donor_that_dies_within_the_recovery_costs_no_request(grid: Cluster, stock_reference: Reference) -> None:
    """Though it dies in the step that the first node may have died of: that one was killed between two steps."""
    streams = [*workload.steady(), *MIXED]

    async def lose_both(current: Replay) -> None:
        assert await current.reached(lambda progress: progress.tokens > 4 * len(streams))
        await asyncio.to_thread(kill_a_node_and_its_donor, grid)

    recordings = replay(grid.base_url, streams, pipelines=grid.pipelines, beside=lose_both)
    assert_identical(streams, stock_reference, recordings)
    grid.wait_settled()


def test_after_the_bound_clients_are_told_and_service_comes_back(stock_reference: Reference) -> None:
    streams = workload.steady()
    flags = (*FLAGS, f"--replacement-wait={SHORT_WAIT_SECONDS:g}")
    with running_cluster(stages=2, pipelines=1, flags=flags, name="a cluster that waits for a second") as cluster:

        async def lose_the_stage(current: Replay) -> None:
            assert await current.reached(lambda progress: progress.tokens > 4 * len(streams))
            with no_replacements(cluster):
                await asyncio.to_thread(kill_stage, cluster, 1)
                check_refused(await asyncio.to_thread(wait_for_refusal, cluster))
                assert not await current.reached(lambda _: False), "every stream ends without a replacement"

        recordings = replay(cluster.base_url, streams, pipelines=1, beside=lose_the_stage)
        for recording in recordings.values():
            check_told_why(recording, stock_reference)
        until("/health is 200 again", cluster.healthy, timeout=120)
        requests = workload.named("plain-0", "seeded")
        assert_identical(requests, stock_reference, run(cluster, requests).recordings)


@contextmanager
def no_replacements(cluster: Cluster) -> Iterator[None]:
    """While the zygote is stopped nothing is forked; it is the oldest process of its name, nodes are forks of it."""
    family = [each for each in cluster.processes() if "kevlarflow.node.zygote" in command_line(each.pid)]
    zygote = Target("the zygote", (min(family, key=lambda each: (each.start_ticks, each.pid)),))
    struck = stop(zygote)
    try:
        verify_stopped(struck)
        yield
    finally:
        thaw(zygote)


def kill_stage(cluster: Cluster, stage: int) -> None:
    cluster.inject(*(KillServing(pipeline, stage) for pipeline in range(cluster.pipelines)))


def kill_a_node_and_its_donor(cluster: Cluster) -> None:
    """The donor in the first step that it computes for the pipeline."""
    node, donor = cluster.aim(KillServing(0, 1)), cluster.aim(KillServing(1, 1))
    members = [member_at(cluster, place) for place in ("node-0-1", "node-1-1")]

    def idle_and_killed() -> bool:
        """Stop the node and look at what it has written down: kill it if that is nothing, else let it go on."""
        verify_stopped(stop(node))
        if flight_record.read(cluster.run_folder, members[0]) != Computing():
            thaw(node)
            return False
        verify(strike(node))
        return True

    def is_helping() -> bool:
        computing = flight_record.read(cluster.run_folder, members[1])
        return computing is not None and computing.pipeline == 0 and computing.sequence > 0

    until("the node to be killed between two steps", idle_and_killed, 60, poll=0.003)
    until("the donor to compute a step of the pipeline", is_helping, 30, poll=0.001)
    verify(strike(donor))


def member_at(cluster: Cluster, place: str) -> Member:
    (incarnation,) = (each["incarnation"] for each in cluster.status()["nodes"] if each["id"] == place)
    return Member(NodeId(place), incarnation)


def wait_for_refusal(cluster: Cluster) -> httpx.Response:
    """A new request's answer once the server knows that it cannot serve: one that it accepts before that waits."""

    def refuses() -> bool:
        return httpx.get(f"{cluster.base_url}/health", timeout=10.0).status_code == httpx.codes.SERVICE_UNAVAILABLE

    until("/health is 503", refuses, timeout=30, poll=0.02)
    answer = httpx.post(f"{cluster.base_url}/v1/completions", json=PROBE, timeout=30.0)
    assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
    return answer


def check_refused(refused: httpx.Response) -> None:
    assert int(refused.headers["Retry-After"]) > 0
    assert "stage" in refused.json()["error"]["message"]


def wait_until_all_wait(cluster: Cluster, stage: int) -> int:
    """Until every pipeline waits for the stage, and every request with it; how many requests those are."""

    def all_wait() -> Status | None:
        status = cluster.status()
        waits = [pipeline["waiting_for"] for pipeline in status["pipelines"]]
        assert all(each["stages"] == [stage] and 0 < each["seconds_left"] <= PATIENT_SECONDS for each in waits), waits
        return None if any(engine["running"] for engine in status["engines"]) else status

    return load(until("no request runs", all_wait, timeout=30))


def wait_for_fewer(cluster: Cluster, before: int) -> None:
    """A client that goes away is noticed although nothing can be computed."""
    until("the request of a client that has gone is forgotten", lambda: load(cluster.status()) < before, timeout=30)


def load(status: Status) -> int:
    return sum(engine["running"] + engine["waiting"] for engine in status["engines"])


def check_told_why(recording: Recording, stock: Reference) -> None:
    """The stream ended properly: right tokens as far as it went, then an error event that names the reason."""
    assert recording.failure is None, f"{recording.name}: {recording.failure}"
    errors = [event["error"] for event in recording.events if "error" in event]
    assert len(errors) == 1, f"{recording.name}: {recording.events[-2:]}"
    assert "no replacement was ready within 1 s" in errors[0]["message"], errors
    assert "error" in recording.events[-1], "nothing comes after the error"
    assert recording.gaps[-1] >= SHORT_WAIT_SECONDS / 2, f"{recording.name} did not wait: {recording.gaps[-3:]}"
    assert tokens_of(recording) == tokens_of(stock.recordings[recording.name])[: len(tokens_of(recording))]


def tokens_of(recording: Recording) -> list[Any]:
    return [
        token
        for event in recording.events
        for choice in event.get("choices", ())
        for token in choice.get("token_ids") or ()
    ]
