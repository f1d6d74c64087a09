"""The soak: fault after fault on one cluster, each time under load and with a rejoin after it.

Every round is a small scenario: the next case of the matrix (`kevlarflow.bench.chaos.matrix`), on a pipeline and at a
moment that are drawn from the seed. Between rounds, when all is calm, each process is looked at; what the survivors
hold must not grow with the number of faults.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil

from kevlarflow.bench.chaos.judge import UNEXPECTED, Observed, Verdict, differences, largest_gap, lost
from kevlarflow.bench.chaos.load import Answer
from kevlarflow.bench.chaos.matrix import Case, deal, faults_of
from kevlarflow.bench.chaos.perform import Performance, Say
from kevlarflow.bench.chaos.scenario import Cluster, Load, Scenario
from kevlarflow.bench.chaos.stage import recipe_of, shared_memory, shared_memory_since, stop_clean
from kevlarflow.bench.chaos.trends import FEWEST_SAMPLES, Sample, Trend, trend, trends
from kevlarflow.bench.machine import Machine
from kevlarflow.bench.recipes import KEVLARFLOW, make
from kevlarflow.bench.systems import ServerProcess, SystemFailed
from kevlarflow.bench.watch import StatusDocument, Watcher
from kevlarflow.config import run_folder_of
from kevlarflow.faults import FaultDidNotHappen
from kevlarflow.faults.processes import ProcessIdentity, command_line

UNFINISHED = "it was not performed to its end"
"""Of a round until it is, for whoever interrupts it."""
VOID_ROUNDS_ALLOWED = 8
"""One in so many rounds may be void: a phase was over before anybody saw it, say. They are made up for, but what
they cost counts."""
LONGEST_NAME = 40
VERIFIED = "faults verified"
"""The check that too many void rounds break."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is done."""

    faults: int
    seed: int = 0
    cluster: Cluster = Cluster()
    load: Load = Load(streams=16, requests=1, tokens=80)


class Round(msgspec.Struct, kw_only=True):
    """One case, and what it did."""

    number: int
    case: Case
    what: str
    void: str = ""
    unsettled: str = ""
    """What was still missing of a whole cluster when nobody waited for it any longer."""
    proof: str = ""
    detected_seconds: list[float | None] = []
    """Of each fault that ended a node at work."""
    largest_gap_seconds: float | None = None
    lane_back_seconds: float | None = None
    requests: int = 0
    tokens: int = 0
    lost: list[str] = []
    different: list[str] = []
    unexpected: list[str] = []
    """Lanes of nodes that were given up though no fault had ended them."""

    @property
    def has_harmed(self) -> bool:
        """Whether it has shown what no fault excuses, void or not."""
        return bool(self.lost or self.different or self.unexpected)

    @property
    def harm(self) -> str:
        """How much of that, in words."""
        nodes = f", {len(self.unexpected)} unexpected losses of nodes" if self.unexpected else ""
        return f"{len(self.lost)} lost, {len(self.different)} different{nodes}"


class Soak(msgspec.Struct, kw_only=True):
    """What a soak has shown."""

    plan: Plan
    command: str = ""
    machine: Machine | None = None
    rounds: list[Round] = []
    trends: list[Trend] = []
    files: list[int] = []
    """Files in the run folder, and those in shared memory that the cluster has made, after each round."""
    left_behind: list[str] | None = None

    @property
    def done(self) -> list[Round]:
        """The rounds that count."""
        return [each for each in self.rounds if not each.void]


def drawn(plan: Plan, number: int) -> tuple[Case, Scenario]:
    """The scenario of round 1, 2, ...: the same for the same seed, whatever happened before."""
    chance = random.Random(f"{plan.seed}/{number}")
    stages = plan.cluster.stages
    case = next(itertools.islice(deal(plan.seed, stages), number - 1, None))
    faults = faults_of(case, plan.load, chance.randrange(plan.cluster.pipelines), stages, chance)
    return case, Scenario(about=case.name, cluster=plan.cluster, load=plan.load, faults=faults)


def run(soak: Soak, folder: Path, say: Say, save: Callable[[], object]) -> None:
    """Perform all rounds on one cluster and fill `soak`. `save` is called whenever there is news in it.

    Raises `FaultDidNotHappen` when too many are void, and `SystemFailed` when the cluster does not become whole again:
    what was seen until then is in `soak` and can be judged.
    """
    server = make(KEVLARFLOW, recipe_of(soak.plan.cluster), folder)
    left: list[str] = []
    before = shared_memory()
    try:
        server.start()
        say(f"the cluster is ready after {server.wait_ready():.1f} s")
        with contextlib.closing(Watcher(run_folder_of(server.address.port))) as watcher:
            watcher.start()
            _Rounds(soak, server, watcher, say, before).run(save)
    finally:
        left += stop_clean(server, before)
        soak.left_behind = left
        save()


class _Rounds:
    def __init__(self, soak: Soak, server: ServerProcess, watcher: Watcher, say: Say, before: set[str]) -> None:
        self._soak = soak
        self._server = server
        self._watcher = watcher
        self._say = say
        self._shared_before = before
        self._reference: list[Answer] | None = None
        self._samples: dict[ProcessIdentity, list[Sample]] = {}
        self._names: dict[ProcessIdentity, str] = {}

    def run(self, save: Callable[[], object]) -> None:
        plan = self._soak.plan
        most = plan.faults + max(1, plan.faults // VOID_ROUNDS_ALLOWED)
        for number in range(1, most + 1):
            self._server.require_alive()
            self._round(number)
            save()
            if len(self._soak.done) == plan.faults:
                return
        raise FaultDidNotHappen(f"{most - len(self._soak.done)} of {most} rounds were void")

    def _round(self, number: int) -> None:
        case, scenario = drawn(self._soak.plan, number)
        performance = Performance(scenario, self._server.address, self._watcher, lambda _: None, self._reference)
        result = Round(number=number, case=case, what=case.name, void=UNFINISHED)
        self._soak.rounds.append(result)
        try:
            asyncio.run(self._perform(performance, result))
        finally:
            self._say(told(result, len(self._soak.done), self._soak.plan.faults))
        self._reference = performance.seen.reference

    async def _perform(self, performance: Performance, result: Round) -> None:
        try:
            await performance.perform()
            result.void = ""
        except FaultDidNotHappen as error:
            result.void = str(error)
        note(result, performance.seen)
        try:
            status = await performance.settle()
        except SystemFailed as error:
            result.unsettled = str(error)
            raise
        self._look(status)

    def _look(self, status: StatusDocument) -> None:
        """Take a sample of each process, now that all is calm."""
        alive = self._server.processes()
        known = _names(status)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                handle = psutil.Process(process.pid)
                sample = Sample(handle.memory_info().rss, handle.num_fds(), handle.num_threads())
                self._samples.setdefault(process, []).append(sample)
                self._names[process] = known.get(process.pid, command_line(process.pid)[:LONGEST_NAME])
        survivors = {process: self._samples[process] for process in alive if process in self._samples}
        self._soak.trends = [
            each for process, samples in survivors.items() for each in trends(self._names[process], samples)
        ]
        folder = run_folder_of(self._server.address.port)
        shared = shared_memory_since(self._shared_before, alive)
        self._soak.files.append(sum(1 for _ in folder.rglob("*")) + len(shared))


def _names(status: StatusDocument) -> dict[int, str]:
    names = {status["main_pid"]: "main process"}
    for engine in status["engines"]:
        names[engine["pid"]] = engine["id"]
        with contextlib.suppress(psutil.Error):
            names[psutil.Process(engine["pid"]).ppid()] = "API server"
    return names | {pid: f"{node['id']}#{node['incarnation']}" for node in status["nodes"] for pid in node["pids"]}


def note(result: Round, seen: Observed) -> None:
    """Keep what a round has shown. Of a void one that is little, but what its clients got counts."""
    result.requests = len(seen.answers)
    result.tokens = sum(answer.stream.tokens for answer in seen.answers)
    result.lost = [*seen.lost_without_faults, *lost(seen.answers)]
    result.different = differences(seen.answers, seen.reference or [])
    result.unexpected = seen.unexpected
    if result.void:
        return
    result.what = ", then ".join(fault.name for fault in seen.faults)
    result.proof = "; ".join(fault.proof for fault in seen.faults)
    result.detected_seconds = [fault.detected_seconds for fault in seen.faults if fault.is_to_be_detected]
    result.largest_gap_seconds = largest_gap(seen.answers, min(fault.at for fault in seen.faults), seen.whole_at)
    result.lane_back_seconds = seen.lane_back_seconds


def told(result: Round, done: int, faults: int) -> str:
    """A round in one line; `done` of all `faults` count by now."""
    head = f"{done} of {faults}, round {result.number}: {result.what}"
    if result.void:
        return f"{head}: void: {result.void}" + (f": {result.harm}" if result.has_harmed else "")
    back = "not back" if result.lane_back_seconds is None else f"back after {result.lane_back_seconds:.1f} s"
    gap = "none" if result.largest_gap_seconds is None else f"{result.largest_gap_seconds * 1e3:.0f} ms"
    return f"{head}: {result.harm}, largest gap {gap}, lane {back}"


def judge(soak: Soak) -> list[Verdict]:
    """What has to hold after a soak."""
    done = soak.done
    missed = [f"round {each.number}, {text}" for each in soak.rounds for text in each.lost]
    different = [f"round {each.number}, {name}" for each in soak.rounds for name in each.different]
    unexpected = [f"round {each.number}, {text}" for each in soak.rounds for text in each.unexpected]
    unseen = [f"round {each.number}" for each in done if None in each.detected_seconds]
    missing = [f"round {each.number}" for each in done if each.lane_back_seconds is None and not each.unsettled]
    missing += [f"round {each.number}: {each.unsettled}" for each in soak.rounds if each.unsettled]
    return [
        Verdict(VERIFIED, str(soak.plan.faults), str(len(done)), len(done) == soak.plan.faults),
        _none("requests lost", missed),
        _none("texts that differ", different),
        _none("faults that were not detected", unseen),
        _none(UNEXPECTED, unexpected),
        _none("lanes that did not come back", missing),
        _grown(soak.trends),
        Verdict("files in use", "no more in the end than before", _ends(soak.files), not _has_grown(soak.files)),
        _none("left behind", soak.left_behind if soak.left_behind is not None else ["the cluster was not stopped"]),
    ]


def _none(check: str, found: Sequence[str]) -> Verdict:
    return Verdict(check, "0", f"{len(found)}" + (f" ({found[0]})" if found else ""), not found)


def _grown(found: Sequence[Trend]) -> Verdict:
    examined = {each.process for each in found}
    growing = [each for each in found if each.has_grown]
    number = f"{len({each.process for each in growing})} of {len(examined)} processes that lived long enough"
    example = f" ({growing[0].told()})" if growing else ""
    return Verdict("survivors that grew", "0", number + example, not growing, is_judged=bool(examined))


def _ends(files: Sequence[int]) -> str:
    return f"{files[0]} at first, {files[-1]} at last" if files else "never looked"


def _has_grown(files: Sequence[int]) -> bool:
    if len(files) >= FEWEST_SAMPLES:
        return trend("cluster", "files", files).has_grown
    return not files or files[-1] > max(files[: max(1, len(files) // 2)])
