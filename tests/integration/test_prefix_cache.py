"""Cached prefixes and failover: what a donor does not hold must never be hit.

vLLM's scheduler still believes in the blocks of finished requests after their KV has gone with a node. A request
that hit them would attend to whatever the donor's memory holds there. So the texts here differ from the reference
as soon as the eviction is left out.
"""

from __future__ import annotations

import pytest

from integration.cluster import BLOCK_SIZE, Cluster
from integration.failover import Shot, assert_identical, run
from kevlarflow.faults import AfterTokens, KillServing
from parity import workload
from parity.reference import Reference

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_prefix_cached_before_a_failover_or_a_rejoin_is_not_believed_after_it(
    stage: int, grid: Cluster, stock_reference: Reference
) -> None:
    (first,) = workload.named("cache-a-first")
    assert_identical([first], stock_reference, run(grid, [first]).recordings)

    # The control: without a failover the second request does hit the first one's blocks.
    (again,) = workload.named("cache-a-again")
    control = run(grid, [again])
    assert control.prefix_hits >= 2 * BLOCK_SIZE
    assert_identical([again], stock_reference, control.recordings)

    # The donor computes `cache-b-first` to its end, so these blocks are in its memory and not in the replacement's.
    (running,) = workload.named("cache-b-first")
    shot = Shot(KillServing(0, stage), AfterTokens(0, 5))
    outcome = run(grid, [running], [shot])
    grid.wait_recovered(shot.unix_time, 0, stage)
    assert_identical([running], stock_reference, outcome.recordings)

    after_failover = workload.named("cache-a-third")
    assert_identical(after_failover, stock_reference, run(grid, after_failover).recordings)

    grid.wait_settled()
    after_rejoin = workload.named("cache-b-again", "cache-a-again")
    assert_identical(after_rejoin, stock_reference, run(grid, after_rejoin).recordings)
