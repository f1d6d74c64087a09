"""An experiment that goes on with an earlier report measures only what that lacks, and loses nothing of it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from kevlarflow.bench import failover, replication_cost, resume, standby_memory, startup, throughput
from kevlarflow.bench.chaos.soak import Soak
from kevlarflow.bench.chaos.soak_report import markdown as soak_markdown
from kevlarflow.bench.failover import UNFINISHED
from kevlarflow.bench.machine import describe
from kevlarflow.bench.measure import LoadSummary, Pause
from kevlarflow.bench.recipes import NAMES, Recipe
from kevlarflow.bench.replication_report import cost_table
from kevlarflow.bench.replication_results import CostLoad, MemorySample, ReplicationCost, Resume, StandbyMemory
from kevlarflow.bench.report import markdown, pauses_table, startup_table, throughput_table
from kevlarflow.bench.results import Failover, Kill, Load, Report, Round, Start, Startup, Throughput
from kevlarflow.bench.systems import SystemFailed
from kevlarflow.cli import bench

COMMITTED = Path(__file__).parents[3] / "docs/benchmarks"
RECIPE = Recipe(model=None, stages=2, pipelines=2)


def load(streams: int) -> Load:
    numbers = {field.name: 1 for field in msgspec.structs.fields(LoadSummary)}
    return Load(msgspec.convert(numbers | {"streams": streams}, LoadSummary), 0.0)


def whole(number: int, system: str) -> Round:
    return Round(number, system, 10.0, [load(1), load(4)])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Rounds and starts that were measured anew."""
    anew: list[tuple[int, str]] = []

    def measure_round(plan: throughput.Plan, this: Round, *_: Any) -> None:
        anew.append((this.number, this.system))
        this.loads = [load(streams) for streams in plan.streams]

    def measure_start(_: startup.Plan, __: Any, start: Start) -> None:
        anew.append((start.number, start.system))
        start.ready_seconds = 1.0

    monkeypatch.setattr(throughput, "_round", measure_round)
    monkeypatch.setattr(startup, "_start", measure_start)
    for module in (throughput, startup):
        monkeypatch.setattr(module, "make", lambda *_: None)
    return anew


def test_throughput_keeps_whole_rounds(measured: list[tuple[int, str]], tmp_path: Path) -> None:
    earlier = [whole(number, name) for number in (1, 2) for name in NAMES]
    result = Throughput(list(earlier))
    throughput.run(throughput.Plan(RECIPE, rounds=3, streams=(1, 4)), result, tmp_path, lambda _: None)
    assert sorted(measured) == sorted((3, name) for name in NAMES)
    assert result.rounds[:4] == earlier
    assert len(result.rounds) == 6


@pytest.mark.parametrize("defect", [{"void": "it died"}, {"loads": [load(1)]}])
def test_of_a_round_that_is_not_whole_both_systems_are_measured_again(
    defect: dict[str, Any], measured: list[tuple[int, str]], tmp_path: Path
) -> None:
    """A ratio is taken within a round."""
    result = Throughput([whole(1, NAMES[0]), msgspec.structs.replace(whole(1, NAMES[1]), **defect)])
    throughput.run(throughput.Plan(RECIPE, rounds=1, streams=(1, 4)), result, tmp_path, lambda _: None)
    assert sorted(measured) == sorted((1, name) for name in NAMES)
    assert len(result.rounds) == 2
    said = [f"round 1, {NAMES[1]}: void: it died"] if "void" in defect else []
    assert result.attempts == said
    assert [f"earlier attempt: {each}" for each in said] == throughput_table(result).remarks[: len(said)]


def test_a_start_that_was_void_leaves_a_trace(measured: list[tuple[int, str]], tmp_path: Path) -> None:
    result = Startup([Start(3, NAMES[0], startup.COLD, void="never ready")], attempts=["of a run before"])
    startup.run(startup.Plan(RECIPE, rounds=1), result, tmp_path, lambda _: None)
    void = f"round 3, {NAMES[0]}, cold caches: void: never ready"
    assert result.attempts == ["of a run before", void]
    assert f"earlier attempt: {void}" in startup_table(result).remarks


def test_startup_keeps_whole_rounds(measured: list[tuple[int, str]], tmp_path: Path) -> None:
    earlier = [Start(1, name, cache, 5.0) for name in NAMES for cache in (startup.COLD, startup.WARM)]
    half = [Start(2, NAMES[0], startup.COLD, 5.0)]
    result = Startup([*earlier, *half])
    startup.run(startup.Plan(RECIPE, rounds=2), result, tmp_path, lambda _: None)
    assert sorted(measured) == sorted((2, name) for name in NAMES for _ in range(2))
    assert result.starts[:4] == earlier
    assert len(result.starts) == 8


def cost(number: int, *, replicated: bool, void: str | None = None) -> CostLoad:
    return CostLoad(number, replicated, load(16).summary if void is None else None, void=void)


def test_rounds_of_the_cost_that_are_not_whole_are_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    anew: list[int] = []
    monkeypatch.setattr(replication_cost, "_side", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(replication_cost, "_round", lambda _, number, *__: anew.append(number))
    whole_one = [cost(2, replicated=each) for each in (True, False)]
    broken = [cost(1, replicated=True), cost(1, replicated=False, void="it died"), cost(3, replicated=True)]
    result = ReplicationCost(loads=[*broken, *whole_one])
    replication_cost.run(replication_cost.Plan(RECIPE, rounds=3), result, tmp_path, lambda _: None)
    assert (anew, result.loads) == ([1, 3], whole_one)
    assert result.attempts == ["round 1, replication off: void: it died"]
    assert "earlier attempt: round 1, replication off: void: it died" in cost_table(result).remarks


@pytest.mark.parametrize(
    ("name", "experiment", "ended"),
    [
        ("resume", resume, Resume(2, void="it died")),
        ("replication_cost", replication_cost, ReplicationCost(void="it died")),
        ("standby_memory", standby_memory, StandbyMemory(10.0, void="it died")),
    ],
)
def test_why_an_experiment_ended_early_is_kept_when_it_goes_on(
    name: str, experiment: ModuleType, ended: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    earlier = Report("bench", "2026-11-23T15:00:00+00:00", describe(), RECIPE, **{name: ended})
    path = tmp_path / "earlier.json"
    path.write_bytes(msgspec.json.encode(earlier))
    monkeypatch.setattr(experiment, "run", lambda *_: None)
    assert bench.run([name.replace("_", "-"), "--resume", str(path), "--output", str(tmp_path / "new")]) == 0
    (data,) = (tmp_path / "new").glob("*.json")
    now = getattr(msgspec.json.decode(data.read_bytes(), type=Report), name)
    assert (now.void, now.attempts) == (None, ["ended early: it died"])
    assert "earlier attempt: ended early: it died" in data.with_suffix(".md").read_text()


def test_kills_that_are_made_anew_leave_a_trace_of_those_before() -> None:
    """All kills are of one cluster, so one that is missing costs them all."""
    pause = Pause("s", 0.1, 0.4, 0.4, 40)
    kills = [Kill(1, 0, 0, affected=[pause]), Kill(2, 0, 1, void="a stream failed"), Kill(3, 1, 0, void=UNFINISHED)]
    result = failover.anew(Failover(16, kills, void="it died", attempts=["of a run before"]), 8)
    assert (result.streams, result.kills, result.void) == (8, [], None)
    assert result.attempts == [
        "of a run before",
        "1 kills under 16 streams, which went on after at most 400 ms",
        "kill 2: void: a stream failed",
        f"kill 3: void: {UNFINISHED}",
        "ended early: it died",
    ]
    assert "earlier attempt: kill 2: void: a stream failed" in pauses_table(result).remarks
    assert failover.anew(None, 8) == Failover(8)


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_report_can_be_gone_on_with(path: Path) -> None:
    kind: Any = Soak if path.stem.endswith("-soak") else Report
    found = msgspec.json.decode(path.read_bytes(), type=kind)
    assert "attempt" not in (soak_markdown(found) if isinstance(found, Soak) else markdown(found))


@pytest.mark.parametrize(("seconds", "starts"), [(60.0, 1), (601.0, 0)])
def test_minutes_of_memory_that_were_broken_off_are_watched_again(
    seconds: float, starts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[str] = []

    class Refuses:
        def start(self) -> None:
            started.append("KevlarFlow")
            raise SystemFailed("it does not start")

        def stop(self) -> list[str]:
            return []

    monkeypatch.setattr(standby_memory, "make", lambda *_: Refuses())
    result = StandbyMemory(10.0, stock_kv_blocks=182, samples=[MemorySample(seconds, 1, 1, 182)])
    standby_memory.run(standby_memory.Plan(RECIPE), result, tmp_path, lambda _: None)
    assert len(started) == starts
    assert bool(result.samples) is not bool(starts)
