"""``kevlarflow chaos`` and ``kevlarflow soak`` as a user runs them, on real nodes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from integration.cluster import KEVLARFLOW, Cluster

SCENARIO = """\
about: a short one for the shared cluster
load: {streams: 4, tokens: 40, kinds: [greedy, seeded, json, cancelled]}
faults:
  - kind: crash
    target: {pipeline: 1, stage: 1}
    at: {tokens: 40}
checks: {lane_back_seconds: 120, detected_seconds: 5}
"""
SHORT_SECONDS = 240.0
LONG_SECONDS = 280.0


def chaos(*arguments: str, timeout: float = SHORT_SECONDS) -> subprocess.CompletedProcess[str]:
    command = [KEVLARFLOW, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def perform(grid: Cluster, scenario: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    file = folder / "short.yaml"
    file.write_text(scenario)
    done = chaos("chaos", str(file), "--port", str(grid.port), "--json")
    return done, json.loads(done.stdout)


def test_a_scenario_passes_on_a_running_cluster(grid: Cluster, tmp_path: Path) -> None:
    done, report = perform(grid, SCENARIO, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().splitlines()[-1].startswith("PASSED short: requests lost: 0 of 4")
    assert report["outcome"] == "passed"
    (fault,) = report["faults"]
    assert fault["name"].startswith("crash node-1-1#")
    assert "gone after" in fault["proof"]
    assert all(check["holds"] for check in report["checks"])


@pytest.mark.slow
def test_a_check_that_cannot_hold_fails_and_a_fault_that_cannot_be_is_void(grid: Cluster, tmp_path: Path) -> None:
    failed, report = perform(grid, SCENARIO.replace("detected_seconds: 5", "largest_gap_seconds: 0.001"), tmp_path)
    assert (failed.returncode, report["outcome"]) == (1, "failed")
    assert [check["check"] for check in report["checks"] if not check["holds"]] == ["largest gap"]
    assert "FAILED short: largest gap" in failed.stderr
    void, report = perform(grid, SCENARIO.replace("tokens: 40}\nchecks", "seconds: 600}\nchecks"), tmp_path)
    assert (void.returncode, report["outcome"]) == (3, "void")
    assert "the load had ended" in report["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crash", "hang", "controller", "slow"])
def test_a_shipped_scenario_passes_and_leaves_nothing_behind(name: str) -> None:
    done = chaos("chaos", name, "--json", timeout=LONG_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["left_behind"] == []


@pytest.mark.slow
def test_a_short_soak_writes_its_report(tmp_path: Path) -> None:
    done = chaos("soak", "--faults", "2", "--output", str(tmp_path), timeout=LONG_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1].startswith("PASSED soak: faults verified: 2")
    (data,) = tmp_path.glob("*-soak.json")
    assert len(json.loads(data.read_text())["rounds"]) >= 2
    assert data.with_suffix(".md").exists()
