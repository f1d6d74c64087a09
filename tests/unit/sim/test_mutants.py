"""Planted protocol bugs are found: a few of them here, all of them by `make mutants`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from standins import wait_until

SCRIPT = Path(__file__).parents[3] / "scripts" / "mutants.py"
QUICK = (
    "an engine believes results of an old epoch",
    "two lanes are given the same physical block",
    "the prefix cache is not evicted",
    "a thawed node is believed",
    "the watermark is off by one block",
    "steps are issued again out of order",
)


def hunt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_every_bug_can_be_planted() -> None:
    done = hunt("--check")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
def test_planted_bugs_are_found() -> None:
    done = hunt(*QUICK, "--seeds", "80")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUICK)} of {len(QUICK)} found" in done.stdout


@pytest.mark.timeout(600)
def test_a_bug_that_nobody_finds_fails_the_hunt() -> None:
    done = hunt("an engine that is introduced twice", "--seeds", "1")
    assert done.returncode == 1
    assert "NOBODY" in done.stdout


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    yield importlib.import_module("mutants")
    for name in ("mutants", "planted_bugs"):
        sys.modules.pop(name, None)


def say(mutants: ModuleType, monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[list[str]]:
    """Let runs say these, one after another, and nothing after that; returns what was asked for."""
    asked: list[list[str]] = []
    left = list(lines)

    def run(_: Path, arguments: list[str]) -> tuple[str, int]:
        asked.append(arguments)
        line = left.pop(0) if left else ""
        return line, 1 if line else 0

    monkeypatch.setattr(mutants, "_run", run)
    return asked


def test_what_stumbles_has_found_nothing(mutants: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = say(mutants, monkeypatch, "seed 3: AttributeError: tuple", "seed 7: WrongKv: r1 reads block 2")
    assert mutants._look(mutants.MUTANTS[0], tmp_path, 10, 1) == ("fleet: WrongKv", "seed 7")
    assert [each[each.index("--seeds") + 1] for each in asked] == ["0:10", "4:10"]
    say(mutants, monkeypatch, *["seed 3: KeyError: 3"] * 100)
    assert mutants._look(mutants.MUTANTS[0], tmp_path, 10, 1) == ("", f"{mutants.MOST_STUMBLES} x KeyError")


@pytest.mark.parametrize("kind", ["Stuck", "Violated", "IllegalTransition", "FalseAlarm", "Restless"])
def test_a_violation_has(mutants: ModuleType, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    say(mutants, monkeypatch, "", f"seed 3: {kind}: so it is")
    assert mutants._look(mutants.MUTANTS[0], tmp_path, 10, 1) == (f"core alone: {kind}", "seed 3")


def test_nothing_is_hunted_if_something_fails_without_any_mutant(
    mutants: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(mutants, monkeypatch, "seed 0: KeyError: 3")
    monkeypatch.setattr(sys, "argv", ["mutants.py", mutants.MUTANTS[0].name])
    assert mutants.main() == 1
    said = capsys.readouterr()
    assert said.err == "without any mutant this fails already: fleet: seed 0: KeyError: 3\n"
    assert said.out == ""


def test_what_does_not_end_is_ended_with_all_that_it_has_started(
    mutants: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mutants, "DEADLINE_SECONDS", 3.0)
    child = tmp_path / "child"
    script = (
        "import pathlib, subprocess, time; "
        f"pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen(['sleep', '600']).pid)); time.sleep(600)"
    )
    begun = time.monotonic()
    with pytest.raises(mutants.Endless):
        mutants._run(tmp_path, ["-c", script])
    assert time.monotonic() - begun < 60
    wait_until(lambda: not is_running(int(child.read_text())), 10.0)


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
