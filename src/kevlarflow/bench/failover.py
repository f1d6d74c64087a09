"""Failover: how long does a stream stand still when a node that serves it is killed?

Sixteen streams, eight of them on the pipeline that loses its node; SIGKILL at a moment that differs each time, first
and last stage in turn, on one pipeline after the other. Each kill is verified. Each stream has to arrive whole, and the
lane to be taken over and back home in time: what is not is the outcome of its kill, and counts even when all kills are
made anew later; only a kill that was none is void. The phases come from the cluster's own record. The load goes on
until a fresh node has the lane back: that move is planned, and the longest wait for a token that it opens is measured
too, beside the longest just before it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from kevlarflow.bench.experiment import Say, Void, running, until
from kevlarflow.bench.load import closed_loop
from kevlarflow.bench.machine import CpuMeter, wait_quiet
from kevlarflow.bench.measure import Pause, longest_gap_during, longest_gap_within, pause_after
from kevlarflow.bench.prompts import clients
from kevlarflow.bench.recipes import KEVLARFLOW, Recipe, make, own_caches
from kevlarflow.bench.results import Failover, Kill
from kevlarflow.bench.streams import Stream
from kevlarflow.bench.systems import System, SystemFailed
from kevlarflow.bench.table import milliseconds
from kevlarflow.bench.watch import LOST, REJOIN, Watcher, is_settled, recovery_after
from kevlarflow.config import run_folder_of
from kevlarflow.faults import FaultDidNotHappen, KillServing, strike, verify

SETTLE_TIMEOUT_SECONDS = 180.0
RECOVERY_TIMEOUT_SECONDS = 60.0
WARM_UP_TOKENS = 16
EARLIEST_TOKEN = 8
"""The kill waits until each stream has so many tokens."""
LONGEST_WAIT_SECONDS = 2.0
"""And then for a while that differs each time, at most this."""
UNFINISHED = "it was not measured to its end"
MOST_REQUESTS = 40
"""Of one client: by then a lane is back that ever will be."""
BEFORE_SECONDS = 2.0
"""So long before the lane moves home, or since the crash was recovered from, is looked at to compare."""
AFTERWARDS_SECONDS = 1.0
"""For which the load goes on once the lane is back."""


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    recipe: Recipe
    kills: int = 10
    streams: int = 16
    tokens: int = 96
    """Output tokens of a request."""
    seed: int = 0
    patience_seconds: float = 60.0
    """How long a kill waits for others to leave the machine alone."""


def run(plan: Plan, result: Failover, folder: Path, say: Say) -> None:
    """Run all kills on one cluster and add them to `result`."""
    system = make(KEVLARFLOW, plan.recipe, folder, own_caches(folder, KEVLARFLOW))
    say(f"{KEVLARFLOW} starts")
    try:
        with running(system, []) as ready_seconds:
            say(f"  ready in {ready_seconds:.1f} s; warming up")
            watcher = Watcher(run_folder_of(system.address.port))
            watcher.start()
            try:
                asyncio.run(_kills(plan, result, system, watcher, say))
            finally:
                watcher.close()
    except SystemFailed as error:
        result.void = str(error)
        say(f"failover: {error}")


def is_whole(plan: Plan, result: Failover) -> bool:
    """Whether an earlier run has all that `plan` asks for."""
    good = [kill for kill in result.kills if kill.void is None]
    return result.void is None and result.streams == plan.streams and len(good) >= plan.kills


def anew(earlier: Failover | None, streams: int) -> Failover:
    """An empty result, since all kills are of one cluster; of an earlier one it keeps what came of that."""
    if earlier is None:
        return Failover(streams)
    return Failover(streams, attempts=[*earlier.attempts, *_traces(earlier)], earlier_harm=earlier.harm)


def _traces(earlier: Failover) -> Iterator[str]:
    good = [kill for kill in earlier.kills if kill.void is None]
    if good:
        worst = max((pause.resumed_seconds for kill in good for pause in kill.affected), default=None)
        went_on = "" if worst is None else f", which went on after at most {milliseconds(worst)}"
        yield f"{len(good)} kills under {earlier.streams} streams{went_on}"
    yield from (f"kill {kill.number}: {each}" for kill in earlier.kills for each in kill.harm)
    yield from (f"kill {kill.number}: void: {kill.void}" for kill in earlier.kills if kill.void is not None)
    if earlier.void is not None:
        yield f"ended early: {earlier.void}"


async def _kills(plan: Plan, result: Failover, system: System, watcher: Watcher, say: Say) -> None:
    chance = random.Random(plan.seed)
    warm_up = clients("warm", plan.streams, 1, WARM_UP_TOKENS, plan.recipe.pipelines)
    await closed_loop(system.address, system.model, warm_up)
    meter = CpuMeter(lambda: [process.pid for process in system.processes()])
    for number in range(plan.kills):
        if not await _is_whole_again(system, watcher, result, say):
            return
        await wait_quiet(meter, plan.patience_seconds)
        stages, pipelines = plan.recipe.stages, plan.recipe.pipelines
        stage = 0 if number % 2 == 0 else stages - 1
        kill = Kill(number + 1, pipeline=number // 2 % pipelines, stage=stage, void=UNFINISHED)
        result.kills.append(kill)
        try:
            await _kill(plan, kill, system, watcher, chance.uniform(0, LONGEST_WAIT_SECONDS))
            kill.void = None
            say(_told(plan, kill))
        except (Void, FaultDidNotHappen) as error:
            kill.void = str(error)
            say("; ".join([f"kill {kill.number} of {plan.kills}: void: {error}", *kill.harm]))
    await _is_whole_again(system, watcher, result, say)


async def _is_whole_again(system: System, watcher: Watcher, result: Failover, say: Say) -> bool:
    """Whether all lanes come home; that they do not is the outcome of the last kill. Without one it raises."""
    try:
        system.require_alive()
        await _until_settled(watcher)
    except SystemFailed as error:
        if not result.kills:
            raise
        last = result.kills[-1]
        last.failure = last.failure or str(error)
        say(f"no further kills after kill {last.number}: {error}")
        return False
    return True


async def _kill(plan: Plan, kill: Kill, system: System, watcher: Watcher, wait_seconds: float) -> None:
    tokens: dict[str, int] = {}
    over = asyncio.Event()

    def count(stream: Stream) -> None:
        tokens[stream.name] = stream.tokens

    def under_way() -> bool:
        return load.done() or (len(tokens) >= plan.streams and min(tokens.values()) >= EARLIEST_TOKEN)

    work = clients(f"{plan.seed}/kill/{kill.number}", plan.streams, MOST_REQUESTS, plan.tokens, plan.recipe.pipelines)
    load = asyncio.create_task(closed_loop(system.address, system.model, work, count, over.is_set))
    try:
        await until("every stream to have begun", under_way, RECOVERY_TIMEOUT_SECONDS)
        await asyncio.sleep(wait_seconds)
        if load.done():
            raise Void("the streams had ended before the kill")
        assert watcher.latest is not None
        target = KillServing(kill.pipeline, kill.stage).aim(watcher.latest)
        unix_time = time.time()
        struck = strike(target)
        await asyncio.to_thread(verify, struck)
        kill.node = target.name
        recovery, rejoin = await _moves(watcher, unix_time, kill)
        await asyncio.sleep(AFTERWARDS_SECONDS)
    finally:
        over.set()
        streams = await load
        kill.lost = [defect for stream in streams if (defect := stream.defect(plan.tokens)) is not None]
    whole = [stream for stream in streams if stream.defect(plan.tokens) is None]
    _measure_pauses(kill, whole, struck.at)
    if recovery is not None:
        _note_recovery(kill, recovery)
    if recovery is not None and rejoin is not None:
        _measure_rejoin(kill, whole, struck.at, recovery, rejoin)


def _measure_pauses(kill: Kill, streams: list[Stream], fault_at: float) -> None:
    for stream in streams:
        pause = pause_after(stream, fault_at)
        if pause is not None:
            (kill.affected if stream.pipeline == kill.pipeline else kill.bystanders).append(pause)
    if not kill.affected and not kill.harm:
        raise Void("no stream of the pipeline was under way at the kill")


async def _moves(watcher: Watcher, unix_time: float, kill: Kill) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Records of the recovery and of the move home, as far as they were done in time."""
    recovery = rejoin = None
    try:
        recovery = await _ended(watcher, unix_time, kill, LOST)
        rejoin = await _ended(watcher, unix_time, kill, REJOIN)
    except SystemFailed as error:
        kill.failure = str(error)
    return recovery, rejoin


async def _ended(watcher: Watcher, unix_time: float, kill: Kill, causes: Collection[str]) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        return recovery_after(watcher.latest or {"recoveries": []}, unix_time, kill.pipeline, kill.stage, causes)

    what = " or ".join(sorted(causes))
    record = await until(f"a record of the {what}", ended, RECOVERY_TIMEOUT_SECONDS)
    if record["state"] != "done":
        raise SystemFailed(f"the {what} is recorded as {record['state']}")
    return record


def _note_recovery(kill: Kill, record: dict[str, Any]) -> None:
    kill.phases = record["seconds"]
    kill.recomputed_tokens = record["recomputed_tokens"]
    kill.taken_over_by = record["to"] or ""


def _measure_rejoin(
    kill: Kill, streams: list[Stream], fault_at: float, recovery: dict[str, Any], rejoin: dict[str, Any]
) -> None:
    (_, recovered), (begun, ended) = _span(recovery), _span(rejoin)
    kill.rejoin_seconds = ended - fault_at
    kill.rejoin_gap_seconds = longest_gap_during(streams, begun, ended)
    kill.gap_before_rejoin_seconds = longest_gap_within(streams, max(begun - BEFORE_SECONDS, recovered), begun)


def _span(record: dict[str, Any]) -> tuple[float, float]:
    """When what was recorded began and ended, in monotonic seconds."""
    begun = record["time"] - (time.time() - time.monotonic())
    return begun, begun + record["seconds"]["total"]


async def _until_settled(watcher: Watcher) -> None:
    def settled() -> bool:
        return watcher.latest is not None and is_settled(watcher.latest)

    await until("every lane at home", settled, SETTLE_TIMEOUT_SECONDS)


def _told(plan: Plan, kill: Kill) -> str:
    told = [f"kill {kill.number} of {plan.kills}: {kill.node}, taken over by {kill.taken_over_by or 'nobody'}"]
    if kill.affected:
        worst: Pause = max(kill.affected, key=lambda pause: pause.resumed_seconds)
        told.append(f"{len(kill.affected)} streams went on after at most {worst.resumed_seconds * 1e3:.0f} ms")
    if kill.rejoin_seconds is not None:
        gap, before = ((each or 0.0) * 1e3 for each in (kill.rejoin_gap_seconds, kill.gap_before_rejoin_seconds))
        told.append(f"lane back after {kill.rejoin_seconds:.1f} s, with a gap of {gap:.0f} ms ({before:.0f} ms before)")
    return "; ".join([*told, *kill.harm])
