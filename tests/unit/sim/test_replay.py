"""The simulator's command line, and that a journal of a controller replays in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kevlarflow.control.journal import Journal
from kevlarflow.sim import fleet, plan
from kevlarflow.sim.__main__ import PROGRAM, main
from kevlarflow.sim.controller import Controller


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the controller of a run with a crash has gone through."""
    path = tmp_path / "journal.jsonl"
    written = Journal(str(path))
    begin, handle = Controller.start, Controller.handle

    def start(self: Controller, *, remembers: bool = True) -> None:
        written.start(self.timeline.now, config=self.config, unix_offset=0.0)
        begin(self, remembers=remembers)

    def note(self: Controller, event: object) -> None:
        written.add(self.timeline.now, event)  # type: ignore[arg-type]
        handle(self, event)  # type: ignore[arg-type]

    monkeypatch.setattr(Controller, "start", start)
    monkeypatch.setattr(Controller, "handle", note)
    assert fleet.run(plan.draw(next(s for s in range(99) if "controller" in kinds(s)))).counts["controller crashes"]
    written.close()
    return path


def kinds(seed: int) -> set[str]:
    return {fault.kind for fault in plan.draw(seed).faults}


def test_it_repeats_the_run_and_tells_it(journal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--journal", str(journal)]) == 0
    told = capsys.readouterr().out
    assert told.count("the controller starts") > 1
    assert "NodeReady" in told
    assert "-> [Form(" in told


def test_an_invariant_that_does_not_hold_ends_it(
    journal: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kevlarflow.recovery.invariants.CHECKS", (lambda _: iter([("pipeline 0", "is odd")]),))
    assert main(["--journal", str(journal)]) == 1
    assert capsys.readouterr().err.rstrip() == f"{PROGRAM}: an invariant did not hold: pipeline 0 is odd"


@pytest.mark.parametrize(
    ("text", "why"),
    [("{}\n", "line 1 is no line of a journal"), ("", "it is empty"), ('{"at": 1.0, "start": {}}\n', "Expected")],
)
def test_what_is_no_journal_is_refused_in_one_line(
    text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    assert main(["--journal", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{PROGRAM}: {path} is no journal of a controller: {why}")


def test_a_journal_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--journal", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"{PROGRAM}: {tmp_path / 'nowhere'} cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--jobs 0", "0 is no number of 1 or more"),
        ("--seeds abc", "abc names no seeds"),
        ("--seeds 5:1", "5:1 names no seeds"),
        ("--seeds 0", "0 names no seeds"),
        ("--seconds 0", "0 is no number above 0"),
        ("--seed 7 --alone", "repeat one alone by --alone --seeds 7:8"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(
    words: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(words.split())
    assert leaving.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_lines_that_the_disk_did_not_take_are_told_and_what_follows_waits_for_the_next_start(
    journal: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    lost = [1, 2, 3]
    whole = [line for number, line in enumerate(lines) if number not in lost]
    journal.write_bytes(b"".join([whole[0], b'{"at":1.0,"lost":3}\n', *whole[1:]]))
    assert main(["--journal", str(journal)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "3 lines are missing" in told[1]
    assert told[2].endswith("the controller starts"), "nothing is made of what is only half known"
