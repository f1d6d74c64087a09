"""Scenarios from YAML, and what people are told when one is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from kevlarflow.bench.chaos import scenario as scenarios
from kevlarflow.bench.chaos.scenario import Aim, Crash, Kind, Moment, Phase, Role, Slow, Stop, parse
from kevlarflow.cli import main as command
from kevlarflow.errors import UsageError

WHOLE = """\
about: two faults
cluster: {stages: 3, flags: [--standby-memory-bytes=1M]}
load:
  streams: 2
  kinds: [json, cancelled]
faults:
  - kind: stop
    thaw_after_seconds: 1
    target: {role: standby, pipeline: 1, stage: 2}
    at: {phase: borrowed}
  - kind: slow
    seconds: 2
    at: {seconds: 0.5}
checks:
  largest_gap_seconds: 2
"""


def test_a_scenario_is_read_with_its_defaults() -> None:
    found = parse(WHOLE, "s.yaml")
    stop, slow = found.faults
    assert stop == Stop(
        at=Moment(phase=Phase.BORROWED), target=Aim(role=Role.STANDBY, pipeline=1, stage=2), thaw_after_seconds=1.0
    )
    assert slow == Slow(at=Moment(seconds=0.5), seconds=2.0)
    assert found.load.kinds == (Kind.JSON, Kind.CANCELLED)
    assert (found.checks.lost_requests, found.checks.largest_gap_seconds) == (0, 2.0)
    assert found.cluster.flags == ("--standby-memory-bytes=1M",)


def test_every_shipped_scenario_can_be_read() -> None:
    assert {"crash", "hang", "controller", "two-stages", "thaw", "cut"} <= set(scenarios.shipped())
    for name in scenarios.shipped():
        assert scenarios.load(name).about
    assert scenarios.load("crash.yaml") == scenarios.load("crash")
    assert isinstance(scenarios.load("crash").faults[0], Crash)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("  streams: 2", "  streams: many", "s.yaml, line 4, load.streams: this has to be a whole number, and is text"),
        (
            "  streams: 2",
            "  strems: 2",
            "s.yaml, line 4, load.strems: there is no key 'strems' here: did you mean 'streams'?",
        ),
        ("  streams: 2", "  streams: 2\n  streams: 3", "s.yaml, line 5: streams is given a second time"),
        ("stages: 3", "stages: 0", "s.yaml, line 2, cluster.stages: this has to be a whole number >= 1"),
        (
            "kind: slow",
            "kind: explode",
            "s.yaml, line 11, faults[1].kind: there is no 'explode' here: use one of crash, stop, slow, cut",
        ),
        ("    seconds: 2\n", "", "s.yaml, line 11, faults[1]: the key 'seconds' is missing"),
        (
            "phase: borrowed",
            "phase: lunch",
            "s.yaml, line 10, faults[0].at.phase: there is no 'lunch' here: use one of "
            "recovering, waiting, borrowed, loading, moving",
        ),
        ("kind: slow", "kind: slwo", "s.yaml, line 11, faults[1].kind: there is no 'slwo' here: did you mean 'slow'?"),
        (
            "    seconds: 2\n",
            "    seconds: 2\n    portion: 0.5\n",
            "s.yaml, line 13, faults[1].portion: there is no key "
            "'portion' here: use one of kind, at, target, seconds, share, period_seconds",
        ),
        ("load:", "laod:", "s.yaml, line 3, laod: there is no key 'laod' here: did you mean 'load'?"),
        ("largest_gap_seconds: 2", "largest_gap_seconds: [2]", "this has to be a number or nothing, and is a list"),
        (
            "largest_gap_seconds: 2",
            "identical: 7",
            "checks.identical: this has to be true or false, and is a whole number",
        ),
        ("seconds: 0.5", "seconds: 1, tokens: 5", "s.yaml, line 13, faults[1].at: expected exactly one of"),
        ("stage: 2}", "stage: 3}", "faults[0].target: there is no pipeline 1, stage 3 in 2 pipelines of 3 stages"),
        ("stages: 3,", "stages: 3, pipelines: 1,", "faults[0].target: there is no pipeline 1, stage 2 in 1 pipelines"),
        ("phase: borrowed", "tokens: 193", "faults[0].at.tokens: 193 tokens never come, for the load has 192 at most"),
        ("load:", "? [a, b]\n: 1\nload:", "s.yaml, line 3: a key has to be a word"),
        (
            "about: two faults",
            "about: 2024-02-30",
            "s.yaml: a value cannot be read (day is out of range for month)",
        ),
        ("about: two faults", "about: &a [*a]", "s.yaml: something in it contains itself"),
        (
            "about: two faults",
            f"about: {'[' * 2000}",
            "s.yaml: something in it contains itself",
        ),
        ("  seconds: 2\n", "  seconds: .inf\n", "faults[1].seconds: this has to be a number <= 86400.0"),
        ("  seconds: 2\n", "  seconds: .nan\n", "faults[1].seconds: this has to be a number >= 0.0"),
        ("  seconds: 2\n", "  seconds: 0.09\n", "faults[1]: expected at least one `period_seconds` in `seconds`"),
        ("load:", "load: [", "s.yaml, line 5: this is not YAML"),
        (
            "[json, cancelled]",
            "[json, poem]",
            "s.yaml, line 5, load.kinds[1]: there is no 'poem' here: use one of greedy, seeded",
        ),
    ],
)
def test_a_bad_scenario_is_told_with_line_and_key(old: str, new: str, complaint: str) -> None:
    assert old in WHOLE
    with pytest.raises(UsageError) as error:
        parse(WHOLE.replace(old, new), "s.yaml")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("role", [Role.DONOR, Role.STANDBY])
def test_a_single_pipeline_has_nobody_to_help_it(role: Role) -> None:
    fault = f"{{kind: crash, target: {{role: {role}}}, at: {{tokens: 1}}}}"
    with pytest.raises(UsageError, match=rf"s\.yaml: faults\[0\].target: a single pipeline has no {role}"):
        parse(f"about: x\ncluster: {{pipelines: 1}}\nfaults: [{fault}]", "s.yaml")


def test_places_are_looked_for_in_the_cluster_that_runs() -> None:
    text = WHOLE.replace("pipeline: 1", "pipeline: 2")
    with pytest.raises(UsageError, match="no pipeline 2"):
        parse(text, "s.yaml")
    found = parse(text, "s.yaml", starts_cluster=False)
    scenarios.require_places(found, "s.yaml", 3, 3)
    with pytest.raises(UsageError, match="there is no pipeline 2, stage 2 in 3 pipelines of 2 stages"):
        scenarios.require_places(found, "s.yaml", 3, 2)


@pytest.mark.parametrize("text", ["", "- 1", "7"])
def test_what_is_no_scenario_at_all_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"s\.yaml"):
        parse(text, "s.yaml")


def test_the_scenario_of_the_readme_can_be_read() -> None:
    readme = (Path(__file__).parents[4] / "README.md").read_text()
    found = parse(readme.partition("```yaml\n")[2].partition("```")[0], "README.md")
    assert [fault.target.role for fault in found.faults] == [Role.NODE, Role.DONOR]


def test_a_missing_file_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["chaos", "no-such.yaml"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "no-such.yaml cannot be read" in errors
    assert "two-stages" in errors


def test_a_folder_does_not_hide_a_shipped_scenario_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = scenarios.load("crash")
    (tmp_path / "crash").mkdir()
    monkeypatch.chdir(tmp_path)
    assert scenarios.load("crash") == shipped


def test_the_list_tells_what_each_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["chaos", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(scenarios.shipped())
    assert shown[0].split(maxsplit=1) == [scenarios.shipped()[0], scenarios.load(scenarios.shipped()[0]).about]
