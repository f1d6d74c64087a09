"""``kevlarflow bench detection`` as a user runs it, in its small version, on real nodes."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import msgspec
import pytest

from integration.cluster import KEVLARFLOW
from kevlarflow.bench.results import Report
from kevlarflow.faults.processes import command_line, with_environment

MARK = "KEVLARFLOW_TEST_RUN"
TIMEOUT_SECONDS = 570.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_crash_and_a_hang_are_noticed_and_nothing_else_is(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [KEVLARFLOW, "bench", "detection", "--quick", "--eager", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
        env={**os.environ, MARK: mark},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-detection.json")
    detection = msgspec.json.decode(path.read_bytes(), type=Report).detection
    assert detection is not None
    (life,) = detection.lives
    assert [fault.kind for fault in life.faults] == ["crash", "hang"]
    assert all(fault.void is None and fault.detected_seconds is not None for fault in life.faults)
    assert life.calm.seconds >= 30
    assert life.calm.hog_seconds > 0
    assert life.struck.requests > life.struck.long_requests > 0
    assert [*life.calm.alarms, *life.struck.alarms, *life.calm.lost, *life.struck.lost] == []
    assert not [command_line(pid) for pid in with_environment(MARK, mark)], "hogs and cluster have ended"
