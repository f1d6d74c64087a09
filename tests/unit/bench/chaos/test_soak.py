"""The soak: what is drawn, what counts as growing, and what the report says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kevlarflow import default_model
from kevlarflow.bench.chaos import soak as soaks
from kevlarflow.bench.chaos.judge import Happened, Observed, Verdict
from kevlarflow.bench.chaos.load import Answer
from kevlarflow.bench.chaos.matrix import Case, cases
from kevlarflow.bench.chaos.scenario import Crash, Load, Role
from kevlarflow.bench.chaos.soak import Plan, Round, Soak, drawn, judge, told
from kevlarflow.bench.chaos.soak_report import markdown, save
from kevlarflow.bench.chaos.trends import FEWEST_SAMPLES, Sample, trends
from kevlarflow.bench.streams import Address, Stream
from kevlarflow.bench.systems import SystemFailed
from kevlarflow.cli import main as command
from kevlarflow.faults import FaultDidNotHappen

MIB = 2**20
CASE = Case("crash", Role.NODE, 1, "decode")
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


def test_files_that_come_and_go_are_not_lost() -> None:
    busy = [each._replace(open_files=10 + (3 if index % 2 else 0)) for index, each in enumerate(STILL)]
    assert grown([*STILL, *busy]) == []


def test_memory_has_some_slack_and_a_young_process_no_trend() -> None:
    end = [Sample(104 * MIB, 10, 4)] * 2
    assert grown([*STILL, *end]) == []
    assert trends("engine-0", growing("threads")[:-1]) == []


def test_rounds_are_the_same_for_the_same_seed() -> None:
    plan = Plan(faults=40, seed=7)
    assert drawn(plan, 3) == drawn(plan, 3)
    assert drawn(plan, 3) != drawn(msgspec.structs.replace(plan, seed=8), 3)


def test_every_case_is_dealt_before_any_comes_again_and_then_in_another_order() -> None:
    plan, whole = Plan(faults=1, seed=7), cases(2)
    first, second = ([drawn(plan, turn * len(whole) + n + 1)[0] for n in range(len(whole))] for turn in (0, 1))
    assert sorted(first, key=repr) == sorted(second, key=repr) == sorted(whole, key=repr)
    assert first != second
    assert len({case.name for case in whole}) == len(whole)


def test_both_pipelines_and_many_moments_are_drawn() -> None:
    faults = [drawn(Plan(faults=1), number)[1].faults[0] for number in range(1, 81)]
    assert {(fault.target.pipeline, fault.target.stage) for fault in faults} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    moments = {fault.at.tokens for fault in faults}
    assert len(moments) > 20
    assert max(each or 0 for each in moments) <= 16 * 80 // 3


def test_a_case_in_a_phase_begins_with_the_crash_that_brings_it_about() -> None:
    for number in range(1, 2 * len(cases(2)) + 1):
        case, scenario = drawn(Plan(faults=1, seed=1), number)
        if case.phase is not None:
            first, second = scenario.faults
            assert isinstance(first, Crash)
            assert (first.target.role, first.target.stage, first.target.pipeline) == (
                Role.NODE,
                case.stage,
                second.target.pipeline,
            )
            assert (second.target.role, second.at.phase) == (case.role, case.phase)
            is_neighbour = case.role is Role.NODE
            assert (second.target.stage != case.stage) == is_neighbour
        else:
            (only,) = scenario.faults
            assert only.target.role is case.role


def soak(**change: Any) -> Soak:
    plan = Plan(faults=2, load=Load(streams=2))
    rounds = [
        Round(number=n, case=CASE, what="crash node-0-1#1", lane_back_seconds=7.0, requests=2, tokens=9) for n in (1, 2)
    ]
    whole = Soak(plan=plan, rounds=rounds, trends=trends("engine-0", STILL), files=[9, 9], left_behind=[])
    return msgspec.structs.replace(whole, **change)


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"rounds": []}, ["faults verified"]),
        ({"rounds": [*soak().rounds[:1], Round(number=2, case=CASE, what="x", void="too late")]}, ["faults verified"]),
        ({"trends": trends("engine-0", growing("threads"))}, ["survivors that grew"]),
        ({"files": [9, 12]}, ["files in use"]),
        ({"files": [9, 20, 9, 9, 9, 9, 14, 14]}, ["files in use"]),
        ({"files": [9, 9, 9, 9, 9, 9, 9, 14]}, []),
        ({"left_behind": None}, ["left behind"]),
        ({"left_behind": ["kevlarflow node"]}, ["left behind"]),
    ],
)
def test_a_soak_is_judged(change: dict[str, Any], broken: list[str]) -> None:
    assert [verdict.check for verdict in judge(soak(**change)) if not verdict.holds] == broken


def test_nobody_has_been_seen_not_to_grow_where_nobody_lived_long_enough() -> None:
    def survivors(result: Soak) -> Verdict:
        return next(verdict for verdict in judge(result) if verdict.check == "survivors that grew")

    assert (survivors(soak()).mark, survivors(soak()).found) == ("holds", "0 of 1 processes that lived long enough")
    nobody = survivors(soak(trends=[]))
    assert (nobody.holds, nobody.mark, nobody.found[:4]) == (True, "not judged", "0 of")
    assert "| 0 of 0 processes that lived long enough | not judged |" in markdown(soak(trends=[]))
    grown = survivors(soak(trends=trends("engine-0", growing("threads"))))
    assert (grown.mark, grown.found[:6]) == ("does not hold", "1 of 1")


@pytest.mark.parametrize(
    ("field", "value", "broken"),
    [
        ("lost", ["r: HTTP 503"], "requests lost"),
        ("different", ["r"], "texts that differ"),
        ("unexpected", ["hang of node-1-1"], "unexpected losses"),
        ("detected_seconds", [0.1, None], "faults that were not detected"),
        ("lane_back_seconds", None, "lanes that did not come back"),
    ],
)
def test_one_bad_round_is_enough(field: str, value: Any, broken: str) -> None:
    good, bad = soak().rounds
    found = judge(soak(rounds=[good, msgspec.structs.replace(bad, **{field: value})]))
    assert [verdict.check for verdict in found if not verdict.holds] == [broken]


@pytest.mark.parametrize(
    ("field", "broken"),
    [("lost", "requests lost"), ("different", "texts that differ"), ("unexpected", "unexpected losses")],
)
def test_what_a_void_round_cost_counts(field: str, broken: str) -> None:
    void = Round(number=3, case=CASE, what="x", void="the load had ended")
    setattr(void, field, ["r"])
    result = soak(rounds=[*soak().rounds, void])
    assert [verdict.check for verdict in judge(result) if not verdict.holds] == [broken]
    assert "void: the load had ended: " in told(void, 2, 2)
    assert "the load had ended (" in markdown(result)


class Troubled:
    """A performance on a cluster that does not become whole again after its second round."""

    performed = 0

    def __init__(self, *_: object) -> None:
        self.seen = Observed(faults=[Happened("crash node-0-1#1", 1.0, "gone")], lane_back_seconds=7.0)

    async def perform(self) -> Observed:
        Troubled.performed += 1
        return self.seen

    async def settle(self) -> dict[str, Any]:
        if Troubled.performed < 2:
            return {"main_pid": 1, "engines": [], "nodes": []}
        raise SystemFailed("after 180 s still not: calm: node-0-1 is dead")


@pytest.fixture
def troubled(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SimpleNamespace(
        address=Address("127.0.0.1", 1), start=int, wait_ready=float, require_alive=int, processes=list, stop=list
    )
    Troubled.performed = 0
    monkeypatch.setattr(soaks, "make", lambda *_: server)
    monkeypatch.setattr(soaks, "Performance", Troubled)


def test_a_cluster_that_does_not_become_whole_again_ends_the_soak(troubled: None, tmp_path: Path) -> None:
    result, said = Soak(plan=Plan(faults=5)), list[str]()
    with pytest.raises(SystemFailed, match="node-0-1 is dead"):
        soaks.run(result, tmp_path, said.append, int)
    assert [each.void for each in result.rounds] == ["", ""]
    found = {verdict.check: verdict for verdict in judge(result)}
    assert not found["lanes that did not come back"].holds
    assert "round 2: after 180 s" in found["lanes that did not come back"].found
    assert said[-1].startswith("2 of 5, round 2: ")


def test_a_soak_that_is_interrupted_says_where_its_report_is(
    troubled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def interrupted(_: Troubled) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "ensure_default_model", lambda: None)
    monkeypatch.setattr(Troubled, "perform", interrupted)
    assert command.main(["soak", "--faults", "5", "--output", str(tmp_path)]) == 130
    assert f"saved {tmp_path}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*-soak.*"))) == 2


@pytest.mark.parametrize(
    ("answers", "status", "last"),
    [
        ([], 3, "VOID soak: 3 of 3 rounds were void"),
        ([Answer(Stream("r", 0.0, failure="HTTP 503"))], 1, "FAILED soak: "),
    ],
)
def test_a_soak_of_void_rounds_is_void_unless_something_was_lost(
    answers: list[Answer],
    status: int,
    last: str,
    troubled: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def void(performance: Troubled) -> None:
        performance.seen.answers = answers
        raise FaultDidNotHappen("the load had ended")

    monkeypatch.setattr(default_model, "ensure_default_model", lambda: None)
    monkeypatch.setattr(Troubled, "perform", void)
    assert command.main(["soak", "--faults", "2", "--output", str(tmp_path)]) == status
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)


def test_a_soak_whose_run_without_faults_loses_a_request_has_failed(
    troubled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However well the rounds that make up for it go."""

    async def loses_at_first(performance: Troubled) -> None:
        Troubled.performed += 1
        if Troubled.performed == 1:
            performance.seen.lost_without_faults = ["r: HTTP 503"]
            raise FaultDidNotHappen("1 requests failed before any fault: r: HTTP 503")

    async def settle(_: Troubled) -> dict[str, Any]:
        return {"main_pid": 1, "engines": [], "nodes": []}

    monkeypatch.setattr(default_model, "ensure_default_model", lambda: None)
    monkeypatch.setattr(Troubled, "perform", loses_at_first)
    monkeypatch.setattr(Troubled, "settle", settle)
    assert command.main(["soak", "--faults", "2", "--output", str(tmp_path)]) == 1
    assert "requests lost: 1 (round 1, r: HTTP 503)" in capsys.readouterr().out.splitlines()[-1]


def test_a_soak_that_ends_early_says_what_it_has_found_and_where(
    troubled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(default_model, "ensure_default_model", lambda: None)
    assert command.main(["soak", "--faults", "5", "--output", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"saved {tmp_path}") for line in lines)
    assert any("lanes that did" in line for line in lines[:-1]), "as a table"
    assert lines[-1].startswith("FAILED soak: ")
    assert len(list(tmp_path.glob("*-soak.*"))) == 2


def test_the_report_has_every_check_and_can_be_read_back(tmp_path: Any) -> None:
    result = soak(rounds=[*soak().rounds, Round(number=3, case=CASE, what=CASE.name, void="too late")])
    data, text = save(result, tmp_path / "new", "now-soak")
    assert msgspec.json.decode(data.read_bytes(), type=Soak) == result
    assert all(verdict.check in text.read_text() for verdict in judge(result))
    assert "| crash of the node of stage 1, decode | 2 | 0 | 0 |  |  | 7.00, 7.00 |" in markdown(result)
    assert "round 3, crash of the node of stage 1, decode: too late" in markdown(result)
