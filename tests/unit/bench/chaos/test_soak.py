"""The soak: what is drawn, what counts as growing, and what the report says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kevlarflow.bench.chaos.scenario import Load
from kevlarflow.bench.chaos.soak import Plan, Round, Soak, drawn, judge
from kevlarflow.bench.chaos.soak_report import markdown, save
from kevlarflow.bench.chaos.trends import FEWEST_SAMPLES, Sample, trends

MIB = 2**20
STILL = [Sample(100 * MIB, 10, 4)] * FEWEST_SAMPLES


def growing(what: str) -> list[Sample]:
    field = {"memory": "memory_bytes", "open files": "open_files"}.get(what, what)
    step = 2 * MIB if what == "memory" else 1
    return [each._replace(**{field: getattr(each, field) + step * index}) for index, each in enumerate(STILL)]


def grown(samples: list[Sample]) -> list[str]:
    return [trend.what for trend in trends("engine-0", samples) if trend.has_grown]


def test_a_process_that_holds_what_it_held_has_not_grown() -> None:
    assert grown(STILL) == []
    assert len(trends("engine-0", STILL)) == 3
    warming_up = [Sample(MIB, 1, 1), Sample(50 * MIB, 5, 2), *STILL]
    assert grown(warming_up) == []


@pytest.mark.parametrize("what", ["memory", "open files", "threads"])
def test_each_thing_that_grows_is_found(what: str) -> None:
    assert grown(growing(what)) == [what]


def test_memory_has_some_slack_and_a_young_process_no_trend() -> None:
    end = [Sample(104 * MIB, 10, 4)] * 2
    assert grown([*STILL, *end]) == []
    assert trends("engine-0", growing("threads")[:-1]) == []


def test_rounds_are_the_same_for_the_same_seed_and_reach_every_place() -> None:
    plan = Plan(faults=40, seed=7)
    assert drawn(plan, 3) == drawn(plan, 3)
    assert drawn(plan, 3) != drawn(msgspec.structs.replace(plan, seed=8), 3)
    faults = [drawn(plan, number).faults[0] for number in range(40)]
    assert {(fault.target.pipeline, fault.target.stage) for fault in faults} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert max(fault.at.tokens or 0 for fault in faults) <= 8 * 2 * 64 // 3


def soak(**change: Any) -> Soak:
    plan = Plan(faults=2, load=Load(streams=2))
    rounds = [Round(number=n, what="crash node-0-1#1", lane_back_seconds=7.0, requests=2, tokens=9) for n in (1, 2)]
    whole = Soak(plan=plan, rounds=rounds, trends=trends("engine-0", STILL), files=[9, 9], left_behind=[])
    return msgspec.structs.replace(whole, **change)


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"rounds": []}, ["faults verified"]),
        ({"rounds": [*soak().rounds[:1], Round(number=2, what="x", void="too late")]}, ["faults verified"]),
        ({"trends": trends("engine-0", growing("threads"))}, ["survivors that grew"]),
        ({"files": [9, 12]}, ["files in use"]),
        ({"left_behind": None}, ["left behind"]),
        ({"left_behind": ["kevlarflow node"]}, ["left behind"]),
    ],
)
def test_a_soak_is_judged(change: dict[str, Any], broken: list[str]) -> None:
    assert [verdict.check for verdict in judge(soak(**change)) if not verdict.holds] == broken


@pytest.mark.parametrize(
    ("field", "value", "broken"),
    [
        ("lost", ["r: HTTP 503"], "requests lost"),
        ("different", ["r"], "texts that differ"),
        ("lane_back_seconds", None, "lanes that did not come back"),
    ],
)
def test_one_bad_round_is_enough(field: str, value: Any, broken: str) -> None:
    good, bad = soak().rounds
    found = judge(soak(rounds=[good, msgspec.structs.replace(bad, **{field: value})]))
    assert [verdict.check for verdict in found if not verdict.holds] == [broken]


def test_the_report_has_every_check_and_can_be_read_back(tmp_path: Any) -> None:
    result = soak(rounds=[*soak().rounds, Round(number=3, what="pipeline 0, stage 1", void="too late")])
    data, text = save(result, tmp_path / "new", "now-soak")
    assert msgspec.json.decode(data.read_bytes(), type=Soak) == result
    assert all(verdict.check in text.read_text() for verdict in judge(result))
    assert "| lane back | 7.000 | 7.000 | 7.000 |" in markdown(result)
    assert "round 3, pipeline 0, stage 1: too late" in markdown(result)
