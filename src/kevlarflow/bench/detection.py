"""Detection: how soon is a node missed on a machine that is full, and is one ever missed that is there?

A load saturates the cluster, of short requests and of prompts of four thousand tokens, while as many hogs as there are
cores compute beside it. First nobody is hurt for a while: whatever the cluster then holds against one of its processes
is a false alarm. Then, under the same load, nodes crash (SIGKILL) and hang (SIGSTOP, for good) in turns, at drawn
places, and each time the cluster has to be whole again before the next. Every fault is verified in /proc; when it was
noticed stands in the cluster's own records.

All timeouts are the default ones. A report that is gone on with keeps what it has: each cluster is a *life* in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kevlarflow.bench import alarms
from kevlarflow.bench.alarms import JournalIncomplete
from kevlarflow.bench.chaos import places, scenario
from kevlarflow.bench.chaos.strikes import Strike
from kevlarflow.bench.detection_results import Detection, Fault, Kind, Life, Stretch
from kevlarflow.bench.experiment import Say, running, until
from kevlarflow.bench.hogs import Hogs
from kevlarflow.bench.load import endless_loop
from kevlarflow.bench.machine import CpuMeter
from kevlarflow.bench.prompts import passage, token_prompt
from kevlarflow.bench.recipes import KEVLARFLOW, Recipe, make, own_caches
from kevlarflow.bench.streams import Request, Stream, completion
from kevlarflow.bench.systems import System, SystemFailed
from kevlarflow.bench.watch import StatusDocument, Watcher
from kevlarflow.config import run_folder_of
from kevlarflow.control.journal import unix_offset
from kevlarflow.faults import FaultDidNotHappen
from kevlarflow.types import EngineState

TOKENS = 48
"""Output tokens of a request."""
PROMPTS_EACH = 3
"""A client asks these again and again, each time with a salt that makes it a new one for the prefix cache."""
LONG = "long"
LOOK_SECONDS = 2.0
SAY_SECONDS = 60.0
WAIT_SECONDS = (1.0, 4.0)
"""From the moment at which the cluster is whole to the next fault."""
WHOLE_TIMEOUT_SECONDS = 300.0
REQUEST_TIMEOUT_SECONDS = 900.0
FAULTS: dict[Kind, type[scenario.Crash | scenario.Stop]] = {"crash": scenario.Crash, "hang": scenario.Stop}


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured."""

    recipe: Recipe
    minutes: float = 30.0
    """Without a fault."""
    kills: int = 20
    """Crashes, and as many hangs."""
    short_clients: int = 9
    long_clients: int = 3
    long_tokens: int = 4096
    hogs: int = os.cpu_count() or 1
    seed: int = 0

    def started(self) -> Recipe:
        """What the cluster is started with: room for the long prompts, and a type in which texts can be compared."""
        longest = max(self.recipe.max_model_len, self.long_tokens + 2 * TOKENS)
        dtype = self.recipe.dtype or "float32"
        return msgspec.structs.replace(self.recipe, max_model_len=longest, dtype=dtype)

    def empty(self) -> Detection:
        """A result without any life yet."""
        return Detection(
            clients=self.short_clients + self.long_clients,
            long_clients=self.long_clients,
            long_tokens=self.long_tokens,
            hogs=self.hogs,
            minutes=self.minutes,
            flags=shlex.join(self.started().flags()),
        )


def run(plan: Plan, result: Detection, folder: Path, say: Say) -> None:
    """Measure what `result` does not have yet, on one more cluster, and add it."""
    result.minutes = plan.minutes
    if _left_seconds(plan, result) <= 0 and not result.missing(plan.kills):
        say(f"detection: the report has its {plan.minutes:g} minutes and {plan.kills} faults of each kind")
        return
    life = Life()
    result.lives.append(life)
    system = make(KEVLARFLOW, plan.started(), folder, own_caches(folder, KEVLARFLOW))
    say(f"detection: {KEVLARFLOW} starts")
    try:
        with running(system, []) as ready_seconds, Hogs(plan.hogs) as hogs:
            say(f"  ready in {ready_seconds:.1f} s; {plan.hogs} hogs and {result.clients} clients begin")
            with contextlib.closing(Watcher(run_folder_of(system.address.port))) as watcher:
                watcher.start()
                asyncio.run(_Living(plan, result, life, system, hogs, watcher, say).live())
    except (SystemFailed, JournalIncomplete) as error:
        life.void, life.has_journal = str(error), not isinstance(error, JournalIncomplete)
        say(f"detection: {error}")


def _left_seconds(plan: Plan, result: Detection) -> float:
    return plan.minutes * 60 - result.calm_seconds()


def requests_of(plan: Plan, client: int) -> Iterator[Request]:
    """What a client asks for, without end. Each prompt comes again.

    A client stays with one pipeline: those who change gather at the one that is slower, and the other one idles.
    """
    is_long = client < plan.long_clients
    for lap in itertools.count():
        for number in range(PROMPTS_EACH):
            seed = f"{plan.seed}/detection/{client}/{number}"
            prompt = token_prompt(seed, plan.long_tokens) if is_long else passage(seed)
            name = f"{LONG if is_long else 'short'} client {client} prompt {number}, lap {lap}"
            request = completion(name, "", TOKENS, client % plan.recipe.pipelines)
            salted = request.body | {"prompt": prompt, "cache_salt": str(lap)}
            yield msgspec.structs.replace(request, body=salted)


class Answers:
    """Counts requests that have ended into the stretch of that time."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        """The text that each prompt brought first."""

    def take(self, stream: Stream, stretch: Stretch) -> None:
        """One request has ended."""
        stretch.requests += 1
        stretch.long_requests += stream.name.startswith(LONG)
        stretch.tokens += stream.tokens
        prompt = stream.name.partition(",")[0]
        if (defect := stream.defect(TOKENS)) is not None:
            stretch.lost.append(defect)
        elif self._first.setdefault(prompt, stream.text) != stream.text:
            stretch.different.append(stream.name)


class _Living:
    """The life of one cluster, in one event loop."""

    def __init__(
        self, plan: Plan, result: Detection, life: Life, system: System, hogs: Hogs, watcher: Watcher, say: Say
    ) -> None:
        self._plan = plan
        self._result = result
        self._life = life
        self._system = system
        self._hogs = hogs
        self._watcher = watcher
        self._say = say
        self._answers = Answers()
        self._stretch = life.calm
        self._struck_from = float("inf")
        self._victims: dict[str, float] = {}
        self._silent_engines: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = False

    async def live(self) -> None:
        """All of it; what was seen is in the result, however this ends."""
        plan = self._plan
        clients = [requests_of(plan, client) for client in range(plan.long_clients + plan.short_clients)]
        load = endless_loop(
            self._system.address,
            self._system.model,
            clients,
            lambda stream: self._answers.take(stream, self._stretch),
            lambda: self._is_over,
            REQUEST_TIMEOUT_SECONDS,
        )
        self._tasks = [asyncio.create_task(load), asyncio.create_task(self._account())]
        try:
            await self._watch()
            await self._strike_all()
            self._is_over = True
            await until("the end of all requests", self._has_load_ended, REQUEST_TIMEOUT_SECONDS)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._note_alarms()

    # ---- without a fault

    async def _watch(self) -> None:
        said = time.monotonic()
        try:
            while _left_seconds(self._plan, self._result) > 0:
                self._look()
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    self._say(f"  {told(self._life.calm)}")
                await asyncio.sleep(LOOK_SECONDS / 10)
        except SystemFailed as error:
            self._life.calm.alarms.append(str(error))
            raise

    async def _account(self) -> None:
        """Note whose the machine was, again and again: a process that ends takes its account along."""
        meter = CpuMeter(lambda: [*self._hogs.pids, *(process.pid for process in self._system.processes())])
        cores = os.cpu_count() or 1
        while True:
            meter.start()
            hogs, began = self._hogs.cpu_seconds(), time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
            strangers, idle, stretch = meter.strangers(), meter.idle(), self._stretch
            seconds = time.monotonic() - began
            stretch.seconds += seconds
            stretch.hog_seconds += self._hogs.cpu_seconds() - hogs
            stretch.other_seconds += strangers * seconds * cores
            stretch.idle_seconds += idle * seconds * cores

    def _look(self) -> StatusDocument | None:
        """The status; raises what has gone wrong."""
        self._system.require_alive()
        for task in self._tasks:
            if task.done():
                task.result()
        status = self._watcher.latest
        silent = {
            engine["id"]
            for engine in (status["engines"] if status is not None else ())
            if engine["state"] == EngineState.SILENT
        }
        self._stretch.suspicions += [f"{engine} did not report" for engine in sorted(silent - self._silent_engines)]
        self._silent_engines = silent
        return status

    # ---- with faults

    async def _strike_all(self) -> None:
        kinds = self._result.missing(self._plan.kills)
        if not kinds:
            return
        self._say("  now nodes crash and hang")
        chance = random.Random(f"{self._plan.seed}/{len(self._result.lives)}")
        self._stretch, self._struck_from = self._life.struck, time.monotonic()
        for number, kind in enumerate(kinds, 1):
            fault = Fault(number, kind)
            self._life.faults.append(fault)
            try:
                await self._strike(fault, chance)
                self._say(f"  {number} of {len(kinds)}: {told_fault(fault)}")
            except FaultDidNotHappen as error:
                fault.void = str(error)
                self._say(f"  {number} of {len(kinds)}: void: {error}")
            except asyncio.CancelledError:
                # Nobody has waited for the verdict.
                fault.void = "the run was interrupted"
                raise

    async def _strike(self, fault: Fault, chance: random.Random) -> None:
        recipe = self._plan.recipe
        place = scenario.Aim(pipeline=chance.randrange(recipe.pipelines), stage=chance.randrange(recipe.stages))
        await until("every lane at home", self._whole, WHOLE_TIMEOUT_SECONDS)
        await asyncio.sleep(chance.uniform(*WAIT_SECONDS))
        aimed = FAULTS[fault.kind](target=place, at=scenario.Moment(seconds=0))
        strike = Strike(aimed, places.aim(place, self._watcher.latest or {}))
        try:
            happened = await strike.do()
            fault.node, fault.proof = strike.target.name, happened.proof
            self._victims[fault.node] = happened.at
            await until("every lane at home", self._whole, WHOLE_TIMEOUT_SECONDS)
            fault.back_seconds = time.monotonic() - happened.at
        finally:
            strike.undo()
            recoveries = (self._watcher.latest or {"recoveries": []})["recoveries"]
            fault.detected_seconds = places.detected_after(recoveries, strike.target, strike.unix_time)

    def _whole(self) -> StatusDocument | None:
        """The status, when everybody is there and nobody of those who were hurt."""
        status = self._look()
        if status is None or not places.is_whole(status) or self._victims.keys() & places.members(status):
            return None
        return status

    # ---- afterwards

    def _has_load_ended(self) -> bool:
        self._system.require_alive()
        return self._tasks[0].done()

    def _note_alarms(self) -> None:
        journal = alarms.read_journal(run_folder_of(self._system.address.port))
        recoveries = (self._watcher.latest or {"recoveries": []})["recoveries"]
        found = [
            *alarms.from_journal(journal, self._victims),
            *alarms.from_records(recoveries, self._victims, unix_offset()),
        ]
        for alarm in found:
            self._stretch_of(alarm).alarms.append(alarm.text)
        for suspicion in alarms.suspicions(journal, self._victims):
            self._stretch_of(suspicion).suspicions.append(suspicion.text)

    def _stretch_of(self, alarm: alarms.Alarm) -> Stretch:
        return self._life.calm if alarm.at < self._struck_from else self._life.struck


def told(stretch: Stretch) -> str:
    """A stretch in one line."""
    return (
        f"{stretch.seconds / 60:.1f} minutes: {stretch.requests} requests ended, {stretch.long_requests} of them long; "
        f"{len(stretch.lost)} lost, {len(stretch.different)} different"
    )


def told_fault(fault: Fault) -> str:
    """A fault in one line."""
    noticed = "never noticed" if fault.detected_seconds is None else f"noticed after {fault.detected_seconds:.3f} s"
    back = "" if fault.back_seconds is None else f", lane back after {fault.back_seconds:.1f} s"
    return f"{fault.kind} of {fault.node}: {noticed}{back}"
