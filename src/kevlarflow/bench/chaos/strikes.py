"""Doing a fault of a scenario, proving it, and undoing it when its time is over."""

from __future__ import annotations

import asyncio
import time
from typing import assert_never

from kevlarflow.bench.chaos import places, scenario
from kevlarflow.bench.chaos.judge import Happened
from kevlarflow.config import Timeouts
from kevlarflow.faults import Struck, Target, strike, verify
from kevlarflow.faults.cutting import Cut
from kevlarflow.faults.stopping import Slowdown, stop, thaw, verify_stopped

STOPPED_AFTER_SECONDS = Timeouts().stopped_after_ms / 1_000
"""Whoever stands still for less has to be left alone."""


class Strike:
    """One fault on its target, from the first signal to the end of what it does."""

    def __init__(self, fault: scenario.AnyFault, target: Target) -> None:
        self.fault = fault
        self.target = target
        self.unix_time = 0.0
        self.still_seconds = 0.0
        """How long a stopped target stood still, as far as it is over."""
        self.happened: Happened | None = None
        self._undo: Slowdown | Cut | None = None

    async def do(self) -> Happened:
        """Strike now, and return with the proof. Raises `FaultDidNotHappen`."""
        self.unix_time = time.time()
        struck = self._begin()
        proof = await asyncio.to_thread(self._prove, struck)
        name = f"{_verb(self.fault)} {self.target.name}"
        self.happened = Happened(name, struck.at, proof, is_to_be_detected=self.is_fatal and self._hits_a_lane())
        return self.happened

    @property
    def is_fatal(self) -> bool:
        """Whether whoever it hits can never be part of the cluster again."""
        fault = self.fault
        return isinstance(fault, scenario.Crash) or (
            isinstance(fault, scenario.Stop) and (fault.thaw_after_seconds is None or fault.lost)
        )

    @property
    def may_cost_its_node(self) -> bool:
        """Whether nobody need wonder if the node is given up: on a crowded machine we too are late to let it run."""
        return self.is_fatal or isinstance(self.fault, scenario.Slow) or self.still_seconds >= STOPPED_AFTER_SECONDS

    async def outlast(self) -> None:
        """Wait for the end of what passes by itself, and undo it."""
        fault = self.fault
        if isinstance(self._undo, Slowdown) and isinstance(fault, scenario.Slow):
            await self._outlast_slowdown(self._undo, fault.seconds)
            return
        if isinstance(self._undo, Cut) and isinstance(fault, scenario.Cut):
            await asyncio.sleep(fault.seconds)
            self._undo.verify()
        elif isinstance(fault, scenario.Stop) and fault.thaw_after_seconds is not None:
            await asyncio.sleep(max(0.0, self.unix_time + fault.thaw_after_seconds - time.time()))
        else:
            return
        self.undo()

    async def _outlast_slowdown(self, slowdown: Slowdown, seconds: float) -> None:
        """One that did not last would make the run void: whoever leaves meanwhile has been slow until then."""
        await asyncio.to_thread(slowdown.wait, seconds)
        self.undo()
        still = slowdown.verify()
        if self.happened is not None:
            self.happened.proof += f", and for {still:.0%} of the time"

    def undo(self) -> None:
        """End it, whatever it is; a second time does no harm."""
        if self._undo is not None:
            self._undo.close()
        elif isinstance(self.fault, scenario.Stop):
            thaw(self.target)
            self.still_seconds = self.still_seconds or time.time() - self.unix_time

    def _begin(self) -> Struck:
        fault = self.fault
        if isinstance(fault, scenario.Crash):
            return strike(self.target)
        if isinstance(fault, scenario.Stop):
            return stop(self.target)
        if isinstance(fault, scenario.Slow):
            self._undo = Slowdown(self.target, fault.share, fault.period_seconds)
        elif isinstance(fault, scenario.Cut):
            self._undo = Cut(self.target)
        else:
            assert_never(fault)
        return self._undo.start()

    def _prove(self, struck: Struck) -> str:
        pids = ", ".join(str(process.pid) for process in struck.target.processes)
        if isinstance(self.fault, scenario.Crash):
            return f"{pids} gone after {verify(struck) * 1e3:.0f} ms"
        if isinstance(self.fault, scenario.Cut):
            return f"connections of {pids} were shut down"
        return f"{pids} seen in state T after {verify_stopped(struck) * 1e3:.0f} ms"

    def _hits_a_lane(self) -> bool:
        role = self.fault.target.role
        return role.is_node and role is not scenario.Role.REPLACEMENT


def described(fault: scenario.AnyFault) -> str:
    """A fault and its moment in words."""
    at = fault.at
    if at.phase is not None:
        moment = f"while {at.phase}"
    else:
        moment = f"after {at.tokens} tokens" if at.tokens is not None else f"after {at.seconds:g} s"
    return f"{_verb(fault)} the {places.described(fault.target)}, {moment}"


def _verb(fault: scenario.AnyFault) -> str:
    if isinstance(fault, scenario.Stop) and fault.thaw_after_seconds is not None:
        return "freeze"
    words = {scenario.Crash: "crash", scenario.Stop: "stop", scenario.Slow: "slow down", scenario.Cut: "cut off"}
    return words[type(fault)]
