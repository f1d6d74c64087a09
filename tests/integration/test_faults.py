"""Faults: that they happen, that they are noticed when they do not, and that triggers name the right moment."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kevlarflow.faults import (
    AfterCancel,
    AfterTokens,
    AnyFault,
    AnyTrigger,
    DuringPrefill,
    FaultDidNotHappen,
    Idle,
    KillNode,
    KillProcesses,
    KillServing,
    Progress,
    SeveralInFlight,
    WhilePreempting,
    inject,
    strike,
    verify,
)
from kevlarflow.faults.processes import identify, is_alive, with_environment

HERE = uuid.uuid4().hex
"""Not another run of these tests."""


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={"MARK": HERE})
    yield process
    process.kill()
    process.wait()


def status_with(pid: int) -> dict[str, Any]:
    node = {"id": "node-0-1", "incarnation": 1, "pids": [pid], "stage": 1, "state": "ready"}
    return {"pipelines": [{"id": 0, "nodes": ["node-0-0", "node-0-1"]}], "nodes": [node]}


@pytest.mark.parametrize("fault", [KillServing(0, 1), KillNode("node-0-1")])
def test_a_killed_node_is_verified_dead(fault: KillServing | KillNode, sleeper: subprocess.Popen[bytes]) -> None:
    struck = inject(fault, status_with(sleeper.pid))
    # Nobody has waited for it yet: a corpse counts as dead.
    assert not is_alive(struck.target.processes[0])
    assert sleeper.wait() == -9


def test_processes_are_hit_by_id(sleeper: subprocess.Popen[bytes]) -> None:
    inject(KillProcesses("api server", (sleeper.pid,)), {})
    assert sleeper.wait() == -9


@pytest.mark.parametrize("fault", [KillServing(0, 7), KillServing(3, 0), KillServing(0, 0), KillNode("node-9-9")])
def test_a_fault_without_a_target_did_not_happen(fault: KillServing | KillNode) -> None:
    with pytest.raises(FaultDidNotHappen):
        fault.aim(status_with(os.getpid()))


def test_a_target_that_died_by_itself_voids_the_fault(sleeper: subprocess.Popen[bytes]) -> None:
    target = KillServing(0, 1).aim(status_with(sleeper.pid))
    sleeper.kill()
    sleeper.wait()
    with pytest.raises(FaultDidNotHappen, match="before the fault"):
        strike(target)
    with pytest.raises(FaultDidNotHappen, match="not all are alive"):
        KillServing(0, 1).aim(status_with(sleeper.pid))


def test_a_target_that_survives_voids_the_fault(sleeper: subprocess.Popen[bytes]) -> None:
    target = KillServing(0, 1).aim(status_with(sleeper.pid))
    struck = strike(KillServing(0, 1).aim(status_with(sleeper.pid)))
    verify(struck)
    impostor = msgspec.structs.replace(
        struck, target=msgspec.structs.replace(target, processes=(identify(os.getpid()),))
    )
    times = iter(range(100))
    with pytest.raises(FaultDidNotHappen, match="still run"):
        verify(impostor, timeout=3, clock=lambda: float(next(times)), pause=lambda seconds: None)


def test_processes_are_found_by_their_environment(sleeper: subprocess.Popen[bytes]) -> None:
    assert with_environment("MARK", HERE) == [sleeper.pid]
    sleeper.kill()
    sleeper.wait()
    assert with_environment("MARK", HERE) == []


@pytest.mark.parametrize("fault", [KillServing(1, 0), KillNode("node-0-0"), KillProcesses("engine", (1, 2))])
def test_faults_round_trip_through_json(fault: AnyFault) -> None:
    assert msgspec.json.decode(msgspec.json.encode(fault), type=AnyFault) == fault


@pytest.mark.parametrize(
    "trigger",
    [Idle(), AfterTokens(0, 5), DuringPrefill("r"), WhilePreempting(1), AfterCancel("r"), SeveralInFlight(0)],
)
def test_triggers_round_trip_through_json(trigger: AnyTrigger) -> None:
    assert msgspec.json.decode(msgspec.json.encode(trigger), type=AnyTrigger) == trigger


def test_idle_is_before_and_after_requests_only() -> None:
    progress = Progress()
    assert Idle().due(progress)
    progress.sent("r", 0)
    assert not Idle().due(progress)
    progress.ended("r")
    assert Idle().due(progress)


def test_prefill_is_between_sending_and_first_token_while_others_decode() -> None:
    progress, trigger = Progress(), DuringPrefill("long", steps=2)
    progress.sent("other", 0)
    progress.sent("another", 0)
    progress.sent("elsewhere", 1)
    progress.received("other", 1)
    assert not trigger.due(progress)
    assert not trigger.missed(progress)
    progress.sent("long", 0)
    progress.received("elsewhere", 9)
    progress.received("other", 1)
    progress.received("another", 1)
    assert not trigger.due(progress), "two requests had a token in the same step"
    progress.received("other", 1)
    assert trigger.due(progress)
    progress.received("long", 1)
    assert not trigger.due(progress)
    assert trigger.missed(progress)


def test_decoding_is_counted_by_pipeline_and_needs_an_open_stream() -> None:
    progress = Progress()
    progress.sent("a", 0)
    progress.sent("b", 0)
    progress.received("a", 4)
    assert AfterTokens(0, 4).due(progress)
    assert not AfterTokens(0, 5).due(progress)
    assert not AfterTokens(1, 1).due(progress)
    assert not SeveralInFlight(0, 2).due(progress)
    progress.received("b", 1)
    assert SeveralInFlight(0, 2).due(progress)
    progress.ended("a")
    progress.ended("b")
    assert not AfterTokens(0, 4).due(progress)


def test_preemption_counts_on_its_own_pipeline() -> None:
    progress = Progress()
    progress.sent("a", 1)
    progress.received("a", 1)
    progress.preemptions[0] = 3
    assert not WhilePreempting(1).due(progress)
    progress.preemptions[1] = 1
    assert WhilePreempting(1).due(progress)


def test_a_cancellation_counts_once_the_connection_is_closed() -> None:
    progress = Progress()
    assert not AfterCancel("a").due(progress)
    progress.sent("a", 0)
    assert not AfterCancel("a").due(progress)
    progress.cancelled("a")
    assert AfterCancel("a").due(progress)
