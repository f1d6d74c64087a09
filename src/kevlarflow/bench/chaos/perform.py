"""Performing a scenario: a run without faults, the same run with them, and what was seen of both.

Each fault waits for its own moment while the load runs. A fault that did not happen, or whose moment did not come
before the load had ended, makes the run void: `FaultDidNotHappen`. So does a run without faults that loses requests:
there is nothing to compare with. What clients were denied until then counts all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

from kevlarflow.bench.chaos import load as loads
from kevlarflow.bench.chaos import places
from kevlarflow.bench.chaos.judge import Observed, lost
from kevlarflow.bench.chaos.scenario import AnyFault, Role, Scenario, Slow
from kevlarflow.bench.chaos.strikes import Strike, described
from kevlarflow.bench.experiment import until
from kevlarflow.bench.streams import Address, Stream
from kevlarflow.bench.systems import SystemFailed
from kevlarflow.bench.watch import Watcher, is_settled
from kevlarflow.faults import FaultDidNotHappen

LOOK_SECONDS = 0.005
"""How often the moments are looked at."""
SETTLE_TIMEOUT_SECONDS = 180.0
WHOLE_TIMEOUT_SECONDS = 120.0
"""How long to wait for lanes when no check gives a limit."""
STALE_SECONDS = 0.1
"""An answer that comes this soon may be older than the fault."""

Say = Callable[[str], None]


class Performance:
    """One scenario on a cluster that runs; `seen` is what it has shown so far.

    A `reference` of the same load spares the run without faults.
    """

    def __init__(
        self,
        scenario: Scenario,
        address: Address,
        watcher: Watcher,
        say: Say,
        reference: list[loads.Answer] | None = None,
    ) -> None:
        self.scenario = scenario
        self.seen = Observed(reference=reference)
        self.tokens: dict[str, int] = {}
        """Tokens of each stream that has begun since the load did."""
        self.act = "waits for the cluster"
        self._address = address
        self._watcher = watcher
        self._say = say
        self._begun_at = 0.0
        self._strikes: list[Strike] = []
        self._must_go: set[str] = set()
        """Members that cannot be part of a cluster that is whole again."""

    @property
    def status(self) -> dict[str, Any] | None:
        """The newest status document."""
        return self._watcher.latest

    async def perform(self) -> Observed:
        """All of it. Raises `FaultDidNotHappen` when the run is void."""
        status = await self.settle()
        known = {record["id"] for record in status["recoveries"]}
        model, pipelines = status["model"], len(status["pipelines"])
        clients = loads.tasks(self.scenario.load, pipelines)
        try:
            if self.scenario.checks.identical and self.seen.reference is None:
                await self._run_without_faults(model, clients)
            self._tell("runs with faults")
            await self._run_with_faults(model, clients)
        finally:
            with contextlib.ExitStack() as undoing:
                # Each of them, whatever interrupts another.
                for strike in self._strikes:
                    undoing.callback(strike.undo)
            self._note_recoveries(known)
        return self.seen

    async def settle(self) -> dict[str, Any]:
        """Wait until every lane is at home and no request is left; the status then."""
        asked_at = time.monotonic()

        def settled() -> dict[str, Any] | None:
            latest = self._watcher.latest if self._watcher.latest_at > asked_at else None
            return latest if latest is not None and is_settled(latest) else None

        try:
            return await until("calm", settled, SETTLE_TIMEOUT_SECONDS)
        except SystemFailed as error:
            latest = self._watcher.latest if self._watcher.latest_at > asked_at else None
            raise SystemFailed(f"{error}: {places.unrest(latest)}") from error

    async def _run_without_faults(self, model: str, clients: list[list[loads.Task]]) -> None:
        self._tell("runs without faults, for comparison")
        reference = await loads.run(self._address, model, clients)
        if failed := lost(reference):
            self.seen.lost_without_faults = failed
            raise FaultDidNotHappen(f"{len(failed)} requests failed before any fault: {failed[0]}")
        self.seen.reference = reference
        await self.settle()

    async def _run_with_faults(self, model: str, clients: list[list[loads.Task]]) -> None:
        self._begun_at = time.monotonic()
        load = asyncio.create_task(loads.run(self._address, model, clients, self._count))
        faults = [asyncio.create_task(self._fault(fault, load)) for fault in self.scenario.faults]
        try:
            await asyncio.gather(*faults)
            await self._wait_whole()
            self.seen.answers = await load
        except FaultDidNotHappen:
            # What has struck may have cost requests, which may be why the load ended too soon for this one.
            if self._strikes or load.done():
                self.seen.answers = await load
            raise
        finally:
            for task in (*faults, load):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, FaultDidNotHappen):
                    await task

    def _count(self, stream: Stream) -> None:
        self.tokens[stream.name] = stream.tokens

    async def _fault(self, fault: AnyFault, load: asyncio.Task[Any]) -> None:
        while load.done() or not self._is_due(fault):
            if load.done():
                raise FaultDidNotHappen(f"the load had ended before the moment came: {described(fault)}")
            await asyncio.sleep(LOOK_SECONDS)
        assert self._watcher.latest is not None, "the cluster had settled before"
        status = self._watcher.latest
        strike = Strike(fault, places.aim(fault.target, status))
        self._strikes.append(strike)
        happened = await strike.do()
        self._must_go |= places.victims(fault.target, strike.target, status) if strike.is_fatal else set()
        self.seen.faults.append(happened)
        self._tell(f"{happened.name}: {happened.proof}")
        await strike.outlast()

    def _is_due(self, fault: AnyFault) -> bool:
        at = fault.at
        if at.seconds is not None:
            return time.monotonic() >= self._begun_at + at.seconds
        if at.tokens is not None:
            return sum(self.tokens.values()) >= at.tokens
        assert at.phase is not None, "a moment is one of three"
        return self._watcher.latest is not None and places.is_in(at.phase, fault.target, self._watcher.latest)

    async def _wait_whole(self) -> None:
        """Wait until every lane is at home on living nodes, at most as long as the checks allow, and note when."""
        last = max(fault.at for fault in self.seen.faults)
        limit = self.scenario.checks.lane_back_seconds
        deadline = last + (WHOLE_TIMEOUT_SECONDS if limit is None else limit)
        asked_at = time.monotonic() + STALE_SECONDS
        while not (self._watcher.latest_at > asked_at and self._is_whole_again()):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(LOOK_SECONDS)
        self.seen.whole_at = self._watcher.latest_at
        self.seen.lane_back_seconds = self.seen.whole_at - last
        self._tell(f"every lane is back {self.seen.lane_back_seconds:.1f} s after the last fault")

    def _is_whole_again(self) -> bool:
        status = self._watcher.latest
        return status is not None and places.is_whole(status) and not self._must_go & places.members(status)

    def _note_recoveries(self, known: set[int]) -> None:
        """Keep the cluster's records that are new, those of losses that nobody here has caused among them."""
        recoveries = (self._watcher.latest or {"recoveries": []})["recoveries"]
        self.seen.recoveries = [record for record in recoveries if record["id"] not in known]
        self.seen.moved_seconds = [
            places.moved_after(self.seen.recoveries, strike.target, strike.unix_time)
            for strike in self._strikes
            if isinstance(strike.fault, Slow)
        ]
        first = min((strike.unix_time for strike in self._strikes), default=math.inf)
        for record in self.seen.recoveries:
            self._say(places.told(record, first))
        self.seen.unexpected = self._unexpected()
        for strike in self._strikes:
            if strike.happened is not None and strike.happened.is_to_be_detected:
                strike.happened.detected_seconds = places.detected_after(recoveries, strike.target, strike.unix_time)

    def _unexpected(self) -> list[str]:
        if any(strike.fault.target.role in {Role.ENGINE, Role.API} for strike in self._strikes):
            # What becomes of the nodes of an engine that has died is not promised.
            return []
        struck: dict[str, float] = {}
        for strike in self._strikes:
            if strike.may_cost_its_node:
                node = strike.target.name.partition("#")[0]
                struck[node] = min(strike.unix_time, struck.get(node, math.inf))
        return places.unexpected(self.seen.recoveries, struck)

    def _tell(self, act: str) -> None:
        self.act = act
        self._say(act)
