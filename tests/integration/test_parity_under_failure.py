"""A node is killed at the worst moments, and still every event is that of stock vLLM, where nothing died.

Each scenario is data: who dies, when, and which requests run. The fast set kills at every kind of moment under a
few requests that matter there; the slow set does it under the whole workload, for the first stage and the last.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from integration.cluster import Cluster
from integration.failover import Outcome, Shot, assert_identical, run
from kevlarflow.faults import (
    AfterCancel,
    AfterTokens,
    AnyTrigger,
    DuringPrefill,
    KillServing,
    SeveralInFlight,
    WhilePreempting,
)
from parity import workload
from parity.reference import Reference
from parity.workload import Request

pytestmark = pytest.mark.timeout(900)

PHASES = ("detect", "plan", "relink", "restore", "recompute", "reissue")
LONGEST_RECOVERY_SECONDS = 30.0

PREFILL = workload.named("plain-0", "plain-1", "seeded", "long-greedy", "long-seeded", "choices", "json")
DECODE = workload.named(
    "plain-0", "plain-1", "seeded", "penalties", "penalties-seeded", "chat-logprobs", "json-seeded", "stop", "choices"
)
BURST = [request for request in workload.full() if "preemption" in request.covers and request.pipeline == 0]
PREEMPTION = workload.with_predecessors([*workload.named("plain-0", "seeded"), *BURST])
CANCEL = workload.named("cancelled-0", "cancelled-1", "plain-0", "seeded", "chat-choices", "logprobs", "json")
IDLE = workload.named("prefix-left", "prefix-left-again", "late-free", "prompt-logprobs", "long-echo", "chat-late")


@dataclasses.dataclass(frozen=True)
class Scenario:
    """Who dies, when, and under which requests."""

    trigger: AnyTrigger
    kill: KillServing
    requests: tuple[Request, ...]

    def __str__(self) -> str:
        size = "all" if len(self.requests) == len(workload.full()) else "few"
        return f"{type(self.trigger).__name__}-{self.kill.pipeline}.{self.kill.stage}-{size}"


FAST = (
    Scenario(DuringPrefill("long-greedy"), KillServing(0, 0), tuple(PREFILL)),
    Scenario(AfterTokens(1, 30), KillServing(1, 1), tuple(DECODE)),
    Scenario(WhilePreempting(0), KillServing(0, 1), tuple(PREEMPTION)),
    Scenario(AfterCancel("cancelled-0"), KillServing(0, 0), tuple(CANCEL)),
    Scenario(SeveralInFlight(0, 4), KillServing(0, 1), tuple(DECODE)),
)
MOMENTS: tuple[tuple[AnyTrigger, int], ...] = (
    (DuringPrefill("long-greedy"), 0),
    (DuringPrefill("long-seeded"), 1),
    (AfterTokens(0, 100), 0),
    (WhilePreempting(0), 0),
    (WhilePreempting(1), 1),
    (AfterCancel("cancelled-0"), 0),
    (AfterCancel("cancelled-1"), 1),
    (SeveralInFlight(0, 6), 0),
    (SeveralInFlight(1, 6), 1),
)
SLOW = tuple(
    Scenario(trigger, KillServing(pipeline, stage), tuple(workload.full()))
    for trigger, pipeline in MOMENTS
    for stage in (0, 1)
)


def cost(scenario: Scenario) -> list[pytest.MarkDecorator]:
    """Preemption takes longest, and is part of the fast tests with poor replicas."""
    return [] if scenario in FAST and not isinstance(scenario.trigger, WhilePreempting) else [pytest.mark.slow]


@pytest.mark.parametrize("scenario", [pytest.param(each, id=str(each), marks=cost(each)) for each in (*FAST, *SLOW)])
def test_a_killed_node_changes_nothing_for_clients(
    scenario: Scenario, grid: Cluster, stock_reference: Reference
) -> None:
    killed = grid.status()["pipelines"][scenario.kill.pipeline]["nodes"][scenario.kill.stage]
    shot = Shot(scenario.kill, scenario.trigger)
    outcome = run(grid, scenario.requests, [shot])
    record = grid.wait_recovered(shot.unix_time, scenario.kill.pipeline, scenario.kill.stage)
    check_record(record, killed)
    assert record["requests"] > 0, "the fault was to hit requests, and the recovery carried none over"
    assert_identical(scenario.requests, stock_reference, outcome.recordings)
    report(scenario, outcome, record)
    check_rejoined(grid.wait_settled(), killed, scenario.kill)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_node_killed_while_idle_is_replaced_without_traffic(
    stage: int, grid: Cluster, stock_reference: Reference
) -> None:
    kill = KillServing(0, stage)
    killed = grid.status()["pipelines"][0]["nodes"][stage]
    since = time.time()
    grid.inject(kill)
    # No request comes meanwhile: the recovery has to end by itself.
    record = grid.wait_recovered(since, 0, stage)
    check_record(record, killed)
    assert record["requests"] == 0
    assert_identical(IDLE, stock_reference, run(grid, IDLE).recordings)
    check_rejoined(grid.wait_settled(), killed, kill)


@pytest.mark.slow
def test_two_pipelines_that_lose_different_stages_help_each_other(grid: Cluster, stock_reference: Reference) -> None:
    requests = workload.full()
    shots = [
        Shot(KillServing(0, 0), AfterTokens(0, 60)),
        Shot(KillServing(1, 1), AfterTokens(1, 60)),
    ]
    outcome = run(grid, requests, shots)
    for shot, (pipeline, stage) in zip(shots, [(0, 0), (1, 1)], strict=True):
        check_record(grid.wait_recovered(shot.unix_time - 1, pipeline, stage), f"node-{pipeline}-{stage}")
    assert_identical(requests, stock_reference, outcome.recordings)


def check_record(record: dict[str, Any], killed: str) -> None:
    """What status has to say of a recovery that saved everything."""
    assert record["state"] == "done", record
    assert record["cause"] == "crash", record
    assert record["lost_requests"] == 0, record
    assert str(record["from"]).startswith(killed), record
    assert record["to"], record
    assert not str(record["to"]).startswith(killed), record
    seconds = record["seconds"]
    assert set(seconds) == {*PHASES, "total"}, seconds
    assert all(value >= 0 for value in seconds.values()), seconds
    assert 0 < seconds["total"] < LONGEST_RECOVERY_SECONDS, seconds
    assert seconds["total"] >= max(seconds[phase] for phase in PHASES), seconds


def check_rejoined(status: dict[str, Any], killed: str, kill: KillServing) -> None:
    """The replacement is a new member, and serves its own pipeline again."""
    (node,) = [node for node in status["nodes"] if node["id"] == killed]
    assert node["incarnation"] > 1, node
    assert node["lanes"] == [kill.pipeline], node


def report(scenario: Scenario, outcome: Outcome, record: dict[str, Any]) -> None:
    """One line about what the failover cost; shown with -s or -rP."""
    gaps = outcome.gaps_after(outcome.shots[0]).values()
    parts = ", ".join(f"{phase} {record['seconds'][phase] * 1000:.0f}" for phase in PHASES)
    print(
        f"{scenario}: {record['requests']} requests carried over, {record['recomputed_tokens']} tokens recomputed, "
        f"longest wait after the kill {max(gaps, default=0) * 1000:.0f} ms (phases in ms: {parts})"
    )
