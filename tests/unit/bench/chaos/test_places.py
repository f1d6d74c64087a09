"""Whom a fault is for, from a status document made by hand and processes that are real."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from kevlarflow.bench.chaos import places
from kevlarflow.bench.chaos.scenario import Aim, Phase, Role
from kevlarflow.faults import FaultDidNotHappen

CONTROLLER = ["-c", "import time; time.sleep(600)", "-m", places.CONTROLLER_MODULE]
LANE = {"pipeline": 0, "stage": 1}


@pytest.fixture
def controller() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, *CONTROLLER])
    yield process
    process.kill()
    process.wait()


def until_zombie(process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10.0
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def node(name: str, incarnation: int = 1, state: str = "ready") -> dict[str, Any]:
    return {"id": name, "incarnation": incarnation, "pids": [os.getpid()], "state": state}


def status(
    serving: str | None = "node-0-1", *, home: dict[str, Any] | None = None, recovery: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "main_pid": os.getpid(),
        "pipelines": [
            {"id": 0, "state": "serving", "nodes": ["node-0-0", serving]},
            {"id": 1, "state": "serving", "nodes": ["node-1-0", "node-1-1"]},
        ],
        "engines": [{"pipeline": 0, "pid": os.getpid(), "state": "ready"}],
        "nodes": [node("node-0-0"), home or node("node-0-1"), node("node-1-0"), node("node-1-1")],
        "replication": [LANE | {"standby": "node-1-1"}],
        "recoveries": [] if recovery is None else [recovery],
    }


def loss(state: str, to: str | None = "node-1-1", cause: str = "crash") -> dict[str, Any]:
    return LANE | {"state": state, "cause": cause, "to": to, "from": "node-0-1", "time": 100.0}


def name(role: Role, document: dict[str, Any]) -> str | None:
    return places.node_of(Aim(role=role, pipeline=0, stage=1), document)


def test_who_is_who_while_nothing_happens() -> None:
    assert name(Role.NODE, status()) == "node-0-1"
    assert name(Role.STANDBY, status()) == "node-1-1"
    assert name(Role.DONOR, status()) is None
    assert name(Role.REPLACEMENT, status()) is None


def test_who_is_who_while_a_stage_is_borrowed() -> None:
    document = status("node-1-1", home=node("node-0-1", 2, "starting"))
    assert name(Role.NODE, document) == "node-1-1"
    assert name(Role.DONOR, document) == "node-1-1"
    assert name(Role.REPLACEMENT, document) == "node-0-1"


def test_a_donor_is_known_before_it_serves() -> None:
    assert name(Role.DONOR, status(None, recovery=loss("running"))) == "node-1-1"
    assert name(Role.DONOR, status(None, recovery=loss("done"))) is None
    assert name(Role.DONOR, status(None, recovery=loss("running", to="node-0-1"))) is None


def test_a_replacement_is_still_one_while_its_lane_moves_home() -> None:
    moving = loss("running", to="node-0-1", cause="rejoin")
    assert name(Role.REPLACEMENT, status("node-0-1", home=node("node-0-1", 2), recovery=moving)) == "node-0-1"
    done = moving | {"state": "done"}
    assert name(Role.REPLACEMENT, status("node-0-1", home=node("node-0-1", 2), recovery=done)) is None


def test_a_dead_node_is_no_replacement() -> None:
    assert name(Role.REPLACEMENT, status("node-1-1", home=node("node-0-1", 2, "dead"))) is None


def test_targets_are_living_processes(controller: subprocess.Popen[bytes]) -> None:
    def pids(role: Role) -> list[int]:
        return [process.pid for process in places.aim(Aim(role=role, stage=1), status()).processes]

    assert pids(Role.NODE) == [os.getpid()]
    assert places.aim(Aim(stage=1), status()).name == "node-0-1#1"
    assert pids(Role.ENGINE) == [os.getpid()]
    ended = subprocess.Popen(["true"])
    until_zombie(ended)
    assert pids(Role.CONTROLLER) == [controller.pid], "a child that waits to be reaped does not matter"
    ended.wait()


def test_the_api_server_is_the_parent_of_the_engines_unless_they_were_adopted(
    controller: subprocess.Popen[bytes],
) -> None:
    document = status() | {"main_pid": places.INIT_PID}
    document["engines"][0]["pid"] = controller.pid
    assert [each.pid for each in places.aim(Aim(role=Role.API), document).processes] == [os.getpid()]
    with pytest.raises(FaultDidNotHappen, match="there is no api server now"):
        places.aim(Aim(role=Role.API), document | {"main_pid": os.getpid()})


@pytest.mark.parametrize("aim", [Aim(role=Role.DONOR), Aim(role=Role.ENGINE, pipeline=1), Aim(role=Role.CONTROLLER)])
def test_a_target_that_is_not_there_voids_the_run(aim: Aim) -> None:
    with pytest.raises(FaultDidNotHappen):
        places.aim(aim, status())


def test_phases_are_seen_in_the_status() -> None:
    aim = Aim(pipeline=0, stage=1)

    def phases(document: dict[str, Any]) -> set[Phase]:
        return {phase for phase in Phase if places.is_in(phase, aim, document)}

    assert phases(status()) == set()
    loading = status("node-1-1", home=node("node-0-1", 2, "starting"), recovery=loss("done"))
    assert phases(loading) == {Phase.BORROWED, Phase.LOADING}
    assert phases(status("node-1-1", recovery=loss("running", cause="rejoin"))) == {Phase.BORROWED, Phase.MOVING}
    for cause in ("link", "drain", "slow"):
        assert Phase.MOVING not in phases(status(recovery=loss("running", cause=cause))), "it does not go home"
    recovering = status(None, recovery=loss("running"))
    recovering["pipelines"][0]["state"] = "recovering"
    assert phases(recovering) == {Phase.RECOVERING}
    recovering["pipelines"][0]["state"] = "waiting"
    assert phases(recovering) == {Phase.WAITING}


def test_whole_means_everybody_at_home_and_ready() -> None:
    assert places.is_whole(status())
    assert not places.is_whole(status("node-1-1"))
    assert not places.is_whole(status(None))
    assert not places.is_whole(status(home=node("node-0-1", 2, "starting")))
    assert not places.is_whole(status(recovery=loss("running")))
    silent = status()
    silent["engines"][0]["state"] = "silent"
    assert not places.is_whole(silent)


def test_what_keeps_a_cluster_from_being_calm_is_said() -> None:
    def said(document: dict[str, Any], requests: int = 0) -> str:
        engines = [each | {"running": requests, "waiting": 0} for each in document["engines"]]
        return places.unrest(document | {"engines": engines})

    assert said(status()) == ""
    assert said(status(), 2) == "2 requests run or wait, perhaps of other clients"
    moving = status("node-1-1", home=node("node-0-1", 2, "starting"), recovery=loss("running"))
    assert said(moving) == "node-0-1 is starting, node-1-1 serves stage 1 of pipeline 0, crash of node-0-1 is not over"
    assert places.unrest(None) == "the controller does not answer"


def test_the_dead_are_told_from_their_successors() -> None:
    before = status()
    target = places.aim(Aim(stage=1), before)
    gone = places.victims(Aim(stage=1), target, before)
    assert gone <= places.members(before)
    assert not gone & places.members(status(home=node("node-0-1", 2)))
    assert not gone & places.members(status(home=node("node-0-1", 1, "dead")))
    engines = places.victims(Aim(role=Role.API), target, before)
    assert engines == {f"pid {os.getpid()}"}
    assert engines <= places.members(before)


def test_detection_counts_from_the_fault_to_the_first_record_of_it() -> None:
    target = places.aim(Aim(stage=1), status())
    records = [loss("done") | {"time": 90.0}, loss("done"), loss("done") | {"time": 101.0}]
    assert places.detected_after(records, target, 99.8) == pytest.approx(0.2)
    assert places.detected_after(records, target, 102.0) is None
    assert places.detected_after([loss("done", cause="rejoin")], target, 99.8) is None
    assert places.detected_after([loss("done") | {"from": "node-1-1"}], target, 99.8) is None


def test_a_loss_is_expected_of_whoever_was_struck_and_only_from_then_on() -> None:
    def unexpected(struck: dict[str, float], **change: Any) -> list[str]:
        return places.unexpected([loss("done") | change], struck)

    assert unexpected({"node-0-1": 100.02}) == []
    assert unexpected({"node-0-1": 99.0}, pipeline=1) == [], "a donor has two lanes"
    assert unexpected({"node-0-1": 100.1}) == ["crash of node-0-1 (pipeline 0, stage 1)"]
    assert unexpected({"node-1-1": 99.0}) == ["crash of node-0-1 (pipeline 0, stage 1)"]
    for planned in ("rejoin", "slow", "link", "drain"):
        assert unexpected({}, cause=planned) == []


def test_a_move_counts_from_the_fault_to_the_end_of_the_last_one_from_that_node() -> None:
    target = places.aim(Aim(stage=1), status())
    move = loss("done", cause="slow") | {"time": 115.0, "seconds": {"total": 0.5}}
    assert places.moved_after([move, move | {"time": 116.0}], target, 100.0) == pytest.approx(16.5)
    for other in ({"cause": "crash"}, {"state": "running"}, {"from": "node-1-1"}, {"time": 90.0}):
        assert places.moved_after([move | other], target, 100.0) is None
