"""``kevlarflow chaos`` without a cluster: what several scenarios come to together."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from kevlarflow import default_model
from kevlarflow.bench.chaos import scenario, stage
from kevlarflow.bench.chaos.judge import Observed
from kevlarflow.bench.chaos.load import Answer
from kevlarflow.bench.streams import Stream
from kevlarflow.bench.systems import SystemFailed
from kevlarflow.cli import main as command
from kevlarflow.faults import FaultDidNotHappen


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "ensure_default_model", lambda: None)


@pytest.mark.parametrize(
    ("seen", "requests", "found"),
    [
        (
            Observed(answers=[Answer(Stream("r", 0.0, failure="HTTP 503"))]),
            1,
            "requests lost: 1 of 1 (r: HTTP 503), wanted at most 0",
        ),
        (
            Observed(lost_without_faults=["r: HTTP 503"]),
            0,
            "requests lost without a fault: 1 (r: HTTP 503), wanted at most 0",
        ),
    ],
)
def test_a_void_run_that_lost_a_request_has_failed(
    seen: Observed, requests: int, found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def on_own_cluster(_: Any, __: Any, screen: Any) -> Observed:
        screen.performance = SimpleNamespace(seen=seen)
        raise FaultDidNotHappen("the load had ended")

    monkeypatch.setattr(stage, "on_own_cluster", on_own_cluster)
    assert command.main(["chaos", "crash", "--json"]) == 1
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert (report["outcome"], report["reason"], report["requests"]) == ("failed", "the load had ended", requests)
    assert f"FAILED crash: {found}; and void: the load" in shown.err


def test_a_scenario_that_cannot_be_performed_ends_no_other_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    performed: list[str] = []

    def on_own_cluster(chosen: Any, *_: object) -> Observed:
        performed.append(chosen.about)
        if len(performed) == 2:
            raise SystemFailed("after 180 s still not: calm [/node-0-1] is dead")
        if len(performed) == 3:
            raise FaultDidNotHappen("the load had ended")
        answers = [Answer(Stream("r", 0.0, usage_tokens=0, finish_reason="stop", done=True))]
        return Observed(answers=answers, reference=answers, lane_back_seconds=1.0, moved_seconds=[1.0], left_behind=[])

    monkeypatch.setattr(stage, "on_own_cluster", on_own_cluster)
    assert command.main(["chaos", "--all", "--json"]) == 1
    assert len(performed) == len(scenario.shipped())
    shown = capsys.readouterr()
    reports = json.loads(shown.out)
    assert [report["scenario"] for report in reports] == scenario.shipped()
    assert (reports[1]["outcome"], reports[1]["reason"][:11]) == ("failed", "after 180 s")
    assert (reports[2]["outcome"], reports[2]["reason"]) == ("void", "the load had ended")
    assert f"FAILED {scenario.shipped()[1]}: after 180 s still not: calm [/node-0-1] is dead" in shown.err
