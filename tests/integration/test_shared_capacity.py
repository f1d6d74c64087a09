"""Two pipelines at full load on the KV memory of one node: requests give way, and every text is what it was."""

from __future__ import annotations

import pytest

from integration.cluster import Cluster
from integration.failover import Shot, assert_identical, run
from kevlarflow.faults import KillServing, WhilePreempting
from parity import workload
from parity.reference import Reference

pytestmark = pytest.mark.timeout(900)

STAGE = 1
FULL_LOAD = workload.with_predecessors([each for each in workload.full() if "preemption" in each.covers])
"""More live tokens than fit, on both pipelines."""


def test_both_pipelines_go_on_at_full_load_while_they_share_a_node(grid: Cluster, stock_reference: Reference) -> None:
    before = {engine["id"]: engine["kv_blocks"] for engine in grid.status()["engines"]}
    shot = Shot(KillServing(0, STAGE), WhilePreempting(1))
    outcome = run(grid, FULL_LOAD, [shot])
    record = grid.wait_recovered(shot.unix_time, 0, STAGE)
    assert record["lost_requests"] == 0, record
    assert_identical(FULL_LOAD, stock_reference, outcome.recordings)
    settled = grid.wait_settled()
    assert {engine["id"]: engine["kv_blocks"] for engine in settled["engines"]} == before
    # The blocks are given back: what needs more than half of them runs again.
    long = workload.with_predecessors(workload.named("long-greedy"))
    assert_identical(long, stock_reference, run(grid, long).recordings)
