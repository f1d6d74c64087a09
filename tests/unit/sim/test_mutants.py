"""Planted protocol bugs are found: a few of them here, all of them by `make mutants`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
    done = hunt(*QUICK, "--seeds", "400")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(QUICK)} of {len(QUICK)} found" in done.stdout


@pytest.mark.timeout(600)
def test_a_bug_that_nobody_finds_fails_the_hunt() -> None:
    done = hunt("an engine that is introduced twice", "--seeds", "1")
    assert done.returncode == 1
    assert "NOBODY" in done.stdout
