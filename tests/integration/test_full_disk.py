"""A disk that takes nothing more: logs and the controller's records lose lines, and the cluster loses nothing else.

The limit on the size of files (RLIMIT_FSIZE) makes each write to a file fail as a full disk does, but for the number of
the error. It can be set from outside without privileges, hits every file of every process, whatever it is for, and is
inherited by those that are started.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.cluster import KEVLARFLOW, Cluster
from integration.failover import Shot, assert_identical, run
from integration.waiting import until
from kevlarflow.bench.chaos.places import aim
from kevlarflow.bench.chaos.scenario import Aim, Role
from kevlarflow.faults import AfterTokens, FaultDidNotHappen, KillServing, strike, verify
from parity import workload
from parity.reference import Reference

pytestmark = pytest.mark.timeout(600)

STAGE = 1
REQUESTS = workload.named("cache-a-first", "cache-b-first")
PATIENCE_SECONDS = 60.0
REASON = os.strerror(errno.EFBIG)
LOST_LINES = "kevlarflow_journal_lost_lines"


def limit_files(cluster: Cluster, size: int | None) -> None:
    """Let no file of the cluster's processes grow beyond so many bytes; None: as far as they were allowed to before."""
    for process in cluster.processes():
        with contextlib.suppress(ProcessLookupError):
            _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (most if size is None else size, most))


@contextmanager
def full_disk(cluster: Cluster) -> Iterator[None]:
    """For the length of a block nothing that the cluster writes is taken, which is verified at its end."""
    limit_files(cluster, 0)
    before = sizes(cluster)
    try:
        yield
        for process in cluster.processes():
            if resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[0] != 0:
                raise FaultDidNotHappen(f"process {process.pid} was allowed to write")
        grown = {path for path, size in sizes(cluster).items() if size > before.get(path, 0)}
        if grown:
            raise FaultDidNotHappen(f"these have grown: {grown}")
    finally:
        limit_files(cluster, None)


def sizes(cluster: Cluster) -> dict[Path, int]:
    """Of every file in the run folder and the log folder."""
    found = {}
    for folder in (cluster.run_folder, cluster.run_folder.with_suffix(".logs")):
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found[path] = path.stat().st_size
    return found


def incarnations(cluster: Cluster) -> dict[str, int]:
    return {node["id"]: node["incarnation"] for node in cluster.status()["nodes"]}


def test_a_full_disk_costs_lines_and_nothing_else(grid: Cluster, stock_reference: Reference) -> None:
    before, lost_before = incarnations(grid), grid.metric(LOST_LINES)
    shot = Shot(KillServing(0, STAGE), AfterTokens(0, 5))
    with full_disk(grid):
        outcome = run(grid, REQUESTS, [shot])
        record = grid.wait_recovered(shot.unix_time, 0, STAGE)
        assert (record["state"], record["lost_requests"]) == ("done", 0)
        assert_identical(REQUESTS, stock_reference, outcome.recordings)
        # A replacement was forked, has loaded its stage, and has taken the lane back.
        grid.wait_settled()
        after = before | {"node-0-1": before["node-0-1"] + 1}
        assert incarnations(grid) == after
        assert grid.metric(LOST_LINES) > lost_before
        assert told(grid).count(REASON) == 1
        # The controller has left nothing that its next life could believe.
        controller = strike(aim(Aim(role=Role.CONTROLLER), grid.status()))
        verify(controller)
        until("a controller that knows everybody", grid.settled, PATIENCE_SECONDS)
        assert incarnations(grid) == after, "nobody was to be started or given up for it"
        assert told(grid).count(REASON) == 1
    until("records to be written again", lambda: not grid.status()["records"]["problem"], PATIENCE_SECONDS)
    assert REASON not in told(grid)
    # The supervisor, whose own output is a file as well, has gone on all the time.
    until("good news", lambda: "can be written again" in grid.serve_log.read_text(), PATIENCE_SECONDS)


def told(cluster: Cluster) -> str:
    """What ``kevlarflow status`` shows to a person."""
    command = [KEVLARFLOW, "status", "--port", str(cluster.port)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True).stdout
