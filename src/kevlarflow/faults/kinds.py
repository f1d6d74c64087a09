"""What strikes: fault kinds as data, their injection, and the proof that they happened.

A fault that silently did nothing makes every check after it worthless. So injection first makes sure that the target
is alive, `verify` waits until the fault can be seen in /proc, and both raise `FaultDidNotHappen` instead of going on.

Targets are picked from the status document, before the fault is due: between the moment and the signal there must be
nothing that takes time.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kevlarflow.errors import KevlarFlowError
from kevlarflow.faults.processes import ProcessIdentity, identify, is_alive

VERIFY_TIMEOUT_SECONDS = 10.0
VERIFY_INTERVAL_SECONDS = 0.005

StatusDocument = dict[str, Any]
"""What ``kevlarflow status --json`` prints."""


class FaultDidNotHappen(KevlarFlowError):
    """A fault was asked for and did not take place: whatever was measured after it means nothing."""

    exit_status = 3


class Target(msgspec.Struct, frozen=True):
    """The processes that a fault is aimed at."""

    name: str
    """The node's id with its incarnation, or what the process is."""
    processes: tuple[ProcessIdentity, ...]


class Struck(msgspec.Struct, frozen=True):
    """A fault that was injected."""

    target: Target
    at: float
    """`time.monotonic()` of the first signal."""


class Fault(msgspec.Struct, frozen=True, tag=True):
    """Base of every fault kind; the tag in JSON is the class name."""

    def aim(self, status: StatusDocument) -> Target:
        """The processes that it will hit."""
        raise NotImplementedError


class KillServing(Fault, frozen=True):
    """SIGKILL every rank of the node that serves a stage of a pipeline now."""

    pipeline: int
    stage: int

    def aim(self, status: StatusDocument) -> Target:
        """See `Fault.aim`."""
        for pipeline in status["pipelines"]:
            if pipeline["id"] == self.pipeline and len(pipeline["nodes"]) > self.stage:
                return _node_target(status, pipeline["nodes"][self.stage])
        raise FaultDidNotHappen(f"no node serves stage {self.stage} of pipeline {self.pipeline}")


class KillNode(Fault, frozen=True):
    """SIGKILL every rank of one node, named by its id."""

    node: str

    def aim(self, status: StatusDocument) -> Target:
        """See `Fault.aim`."""
        return _node_target(status, self.node)


class KillProcesses(Fault, frozen=True):
    """SIGKILL processes by id: the API server, an engine."""

    name: str
    pids: tuple[int, ...]

    def aim(self, status: StatusDocument) -> Target:
        """See `Fault.aim`."""
        return _target(self.name, self.pids)


AnyFault = KillServing | KillNode | KillProcesses


def strike(target: Target, number: signal.Signals = signal.SIGKILL) -> Struck:
    """Inject: a signal to every process of the target, which must all be alive."""
    for process in target.processes:
        if not is_alive(process):
            raise FaultDidNotHappen(f"{target.name}: process {process.pid} was gone before the fault")
    at = time.monotonic()
    for process in target.processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError as error:
            raise FaultDidNotHappen(f"{target.name}: process {process.pid} left by itself") from error
    return Struck(target, at)


def verify(
    struck: Struck,
    timeout: float = VERIFY_TIMEOUT_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> float:
    """Wait until every process of the target is dead; return the seconds that took since the signal."""
    deadline = clock() + timeout
    while alive := [process.pid for process in struck.target.processes if is_alive(process)]:
        if clock() >= deadline:
            raise FaultDidNotHappen(f"{struck.target.name}: {alive} still run {timeout} s after SIGKILL")
        pause(VERIFY_INTERVAL_SECONDS)
    return clock() - struck.at


def inject(fault: Fault, status: StatusDocument) -> Struck:
    """Aim, strike and verify in one go, for faults that need no exact moment."""
    struck = strike(fault.aim(status))
    verify(struck)
    return struck


def _node_target(status: StatusDocument, node_id: str) -> Target:
    for node in status["nodes"]:
        if node["id"] == node_id and node["state"] != "dead":
            return _target(f"{node_id}#{node['incarnation']}", node["pids"])
    raise FaultDidNotHappen(f"{node_id} is not among the living nodes")


def _target(name: str, pids: Sequence[int]) -> Target:
    if not pids:
        raise FaultDidNotHappen(f"{name} has no processes")
    found = [identify(pid) for pid in pids]
    if None in found:
        raise FaultDidNotHappen(f"{name}: of the processes {list(pids)} not all are alive")
    return Target(name, tuple(process for process in found if process is not None))
