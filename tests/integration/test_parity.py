"""Without a fault: 2 x 2 KevlarFlow says, event for event, what stock vLLM in one process says."""

from __future__ import annotations

import pytest

from integration.cluster import BLOCK_SIZE, Cluster
from integration.failover import assert_identical, run
from parity import workload
from parity.reference import Reference

pytestmark = pytest.mark.timeout(900)


def test_every_event_is_that_of_stock_vllm(grid: Cluster, stock_reference: Reference) -> None:
    requests = workload.full()
    recoveries = len(grid.status()["recoveries"])
    outcome = run(grid, requests)
    assert_identical(requests, stock_reference, outcome.recordings)
    # Without these the workload would not have shown what it is for.
    assert outcome.preemptions > 0
    assert outcome.prefix_hits >= 2 * BLOCK_SIZE
    status = grid.wait_settled()
    assert len(status["recoveries"]) == recoveries, "something was recovered though nothing was killed"
    assert grid.metric("vllm:num_requests_running") == 0, "a cancelled or finished request still runs"
    assert grid.metric("vllm:kv_cache_usage_perc") == 0, "blocks of finished requests are still held"
