"""An experiment that goes on with an earlier report measures only what that lacks, and loses nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kevlarflow.bench import startup, throughput
from kevlarflow.bench.measure import LoadSummary
from kevlarflow.bench.recipes import NAMES, Recipe
from kevlarflow.bench.results import Load, Round, Start, Startup, Throughput

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


def test_startup_keeps_whole_rounds(measured: list[tuple[int, str]], tmp_path: Path) -> None:
    earlier = [Start(1, name, cache, 5.0) for name in NAMES for cache in (startup.COLD, startup.WARM)]
    half = [Start(2, NAMES[0], startup.COLD, 5.0)]
    result = Startup([*earlier, *half])
    startup.run(startup.Plan(RECIPE, rounds=2), result, tmp_path, lambda _: None)
    assert sorted(measured) == sorted((2, name) for name in NAMES for _ in range(2))
    assert result.starts[:4] == earlier
    assert len(result.starts) == 8
