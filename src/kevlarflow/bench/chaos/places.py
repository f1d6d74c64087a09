"""From a status document to processes and phases: who is the donor now, is the stage borrowed. Pure but for /proc."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import psutil

from kevlarflow.bench.chaos.scenario import Aim, Phase, Role
from kevlarflow.bench.watch import CLOCK_SLACK_SECONDS, LOST, REJOIN
from kevlarflow.faults import FaultDidNotHappen, KillNode, KillProcesses, StatusDocument, Target
from kevlarflow.types import Cause

INIT_PID = 1
CONTROLLER_MODULE = "kevlarflow.control.controller"


def aim(target: Aim, status: StatusDocument) -> Target:
    """The processes of a target now. Raises `FaultDidNotHappen` when there is no such thing."""
    if target.role.is_node:
        name = node_of(target, status)
        if name is None:
            raise FaultDidNotHappen(f"there is no {described(target)} now")
        return KillNode(name).aim(status)
    if target.role is Role.ENGINE:
        return KillProcesses(f"engine-{target.pipeline}", (_engine_pid(target.pipeline, status),)).aim(status)
    if target.role is Role.API:
        return KillProcesses("api server", (_api_server(target.pipeline, status),)).aim(status)
    return KillProcesses("controller", tuple(_controllers(status["main_pid"]))).aim(status)


def described(target: Aim) -> str:
    """A target in words."""
    if target.role in {Role.CONTROLLER, Role.API}:
        return str(target.role)
    if target.role is Role.ENGINE:
        return f"engine of pipeline {target.pipeline}"
    return f"{target.role} of pipeline {target.pipeline}, stage {target.stage}"


def node_of(target: Aim, status: StatusDocument) -> str | None:
    """The id of the node that has a role for a stage now; None when there is none."""
    serving, home = _serving(target, status), _home(target)
    if target.role is Role.NODE:
        return serving
    if target.role is Role.STANDBY:
        return next((row["standby"] for row in _rows(status["replication"], target)), None)
    if target.role is Role.DONOR:
        if serving not in {None, home}:
            return serving
        running = [row for row in _rows(status["recoveries"], target) if row["state"] == "running"]
        return next((row["to"] for row in running if row["cause"] in LOST and row["to"] != home), None)
    waits = [node for node in status["nodes"] if node["id"] == home and node["incarnation"] > 1 and node["pids"]]
    is_to_come = serving != home or is_in(Phase.MOVING, target, status)
    return home if is_to_come and any(node["state"] != "dead" for node in waits) else None


def is_in(phase: Phase, target: Aim, status: StatusDocument) -> bool:
    """Whether the status shows a target's pipeline and stage in a phase."""
    state = next((each["state"] for each in status["pipelines"] if each["id"] == target.pipeline), None)
    if phase in {Phase.RECOVERING, Phase.WAITING}:
        return bool(state == phase)
    serving, home = _serving(target, status), _home(target)
    if phase is Phase.BORROWED:
        return serving not in {None, home}
    if phase is Phase.LOADING:
        return any(n["id"] == home and n["state"] == "starting" and n["pids"] for n in status["nodes"])
    return any(row["state"] == "running" and row["cause"] in REJOIN for row in _rows(status["recoveries"], target))


def is_whole(status: StatusDocument) -> bool:
    """Whether every pipeline serves with its own nodes, and nobody is missing; requests may run."""
    return (
        all(
            node == f"node-{pipeline['id']}-{stage}"
            for pipeline in status["pipelines"]
            for stage, node in enumerate(pipeline["nodes"])
        )
        and all(pipeline["state"] == "serving" for pipeline in status["pipelines"])
        and all(node["state"] == "ready" for node in status["nodes"])
        and all(engine["state"] == "ready" for engine in status["engines"])
        and not any(recovery["state"] == "running" for recovery in status["recoveries"])
    )


def unrest(status: StatusDocument | None) -> str:
    """What keeps a cluster from being settled, in words; without a status it is the controller."""
    if status is None:
        return "the controller does not answer"
    requests = sum(engine["running"] + engine["waiting"] for engine in status["engines"])
    found = [
        f"the engine of pipeline {each['pipeline']} is {each['state']}" for each in _not("ready", status["engines"])
    ]
    found += [f"{each['id']} is {each['state']}" for each in _not("ready", status["nodes"])]
    found += [f"pipeline {each['id']} is {each['state']}" for each in _not("serving", status["pipelines"])]
    found += [
        f"{node or 'nobody'} serves stage {stage} of pipeline {pipeline['id']}"
        for pipeline in status["pipelines"]
        for stage, node in enumerate(pipeline["nodes"])
        if node != f"node-{pipeline['id']}-{stage}"
    ]
    found += [
        f"{each['cause']} of {each['from']} is not over" for each in status["recoveries"] if each["state"] == "running"
    ]
    found += [f"{requests} requests run or wait, perhaps of other clients"] * bool(requests)
    return ", ".join(found)


def _not(state: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["state"] != state]


def members(status: StatusDocument) -> set[str]:
    """Whoever takes part, by names that nobody bears twice: nodes with their incarnations, engines with their pids."""
    nodes = {f"{node['id']}#{node['incarnation']}" for node in status["nodes"] if node["state"] != "dead"}
    return nodes | {f"pid {engine['pid']}" for engine in status["engines"]}


def victims(aimed: Aim, target: Target, status: StatusDocument) -> set[str]:
    """The members that end with a target, as `members` names them."""
    if aimed.role.is_node:
        return {target.name}
    if aimed.role is Role.ENGINE:
        return {f"pid {process.pid}" for process in target.processes}
    if aimed.role is Role.API:
        return {f"pid {engine['pid']}" for engine in status["engines"]}
    return set()


def detected_after(recoveries: list[dict[str, Any]], target: Target, unix_time: float) -> float | None:
    """Seconds from a fault at `unix_time` to the first record of the loss of its node; None when there is none."""
    node = target.name.partition("#")[0]
    for record in recoveries:
        seconds = float(record["time"]) - unix_time
        if record["from"] == node and record["cause"] in LOST and seconds >= -CLOCK_SLACK_SECONDS:
            return max(0.0, seconds)
    return None


def unexpected(recoveries: list[dict[str, Any]], struck: Mapping[str, float]) -> list[str]:
    """Losses that nobody here has caused: of nodes that are not in `struck`, or before the Unix time that it tells."""
    return [
        f"{record['cause']} of {record['from']} (pipeline {record['pipeline']}, stage {record['stage']})"
        for record in recoveries
        if record["cause"] in LOST and record["time"] < struck.get(record["from"], math.inf) - CLOCK_SLACK_SECONDS
    ]


def moved_after(recoveries: list[dict[str, Any]], target: Target, unix_time: float) -> float | None:
    """Seconds from `unix_time` until the last lane had left its slow node; None when none has."""
    node = target.name.partition("#")[0]
    moves = [
        float(record["time"]) - unix_time + float(record["seconds"]["total"])
        for record in recoveries
        if record["from"] == node and (record["cause"], record["state"]) == (Cause.SLOW, "done")
    ]
    return max((seconds for seconds in moves if seconds >= 0), default=None)


def told(record: dict[str, Any], fault_unix_time: float) -> str:
    """A record of a recovery in one line; `fault_unix_time` is the first fault's."""
    seconds = record["seconds"]
    place = f"pipeline {record['pipeline']}, stage {record['stage']}"
    phases = ", ".join(f"{name} {value * 1e3:,.0f}" for name, value in seconds.items() if name != "total")
    note = " (before any fault)" if record["time"] < fault_unix_time - CLOCK_SLACK_SECONDS else ""
    ended = f"{record['state']} in {seconds['total'] * 1e3:,.0f} ms"
    return f"{record['cause']}{note}: {place} from {record['from']} to {record['to']}, {ended} ({phases})"


def _home(target: Aim) -> str:
    return f"node-{target.pipeline}-{target.stage}"


def _serving(target: Aim, status: StatusDocument) -> str | None:
    for pipeline in status["pipelines"]:
        if pipeline["id"] == target.pipeline and target.stage < len(pipeline["nodes"]):
            node: str | None = pipeline["nodes"][target.stage]
            return node
    return None


def _rows(rows: list[dict[str, Any]], target: Aim) -> Iterator[dict[str, Any]]:
    return (row for row in rows if (row["pipeline"], row["stage"]) == (target.pipeline, target.stage))


def _engine_pid(pipeline: int, status: StatusDocument) -> int:
    pid = next((engine["pid"] for engine in status["engines"] if engine["pipeline"] == pipeline), None)
    if not pid:
        raise FaultDidNotHappen(f"pipeline {pipeline} has no engine now")
    return int(pid)


def _api_server(pipeline: int, status: StatusDocument) -> int:
    """The parent of an engine, unless that has died: then somebody else has adopted the engine."""
    pid = _engine_pid(pipeline, status)
    try:
        parent = psutil.Process(pid).ppid()
    except psutil.Error as error:
        raise FaultDidNotHappen(f"the engine {pid} has gone, and with it the way to its parent") from error
    if parent in {INIT_PID, status["main_pid"]}:
        raise FaultDidNotHappen(f"the parent of the engine {pid} has gone: there is no api server now")
    return parent


def _controllers(main_pid: int) -> Iterator[int]:
    try:
        children = psutil.Process(main_pid).children()
    except psutil.Error as error:
        raise FaultDidNotHappen(f"the main process {main_pid} cannot be looked at") from error
    for child in children:
        # One that has ended meanwhile, and waits to be reaped, says nothing about the others.
        with contextlib.suppress(psutil.NoSuchProcess):
            if CONTROLLER_MODULE in child.cmdline():
                yield child.pid
