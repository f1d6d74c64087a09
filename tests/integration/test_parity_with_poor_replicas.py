"""Replicas that are missing cost time, never a token: the same kills with hardly any of them, or with old ones.

Each test also shows that its setting bites: that replicas were dropped, or that the standby was blocks behind. Of the
latter none is in the fast set: `test_kills_and_replicas` has one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.cluster import BLOCK_SIZE, BYTES_PER_TOKEN_AND_LAYER, FLAGS, LAYERS_PER_STAGE, Cluster, running_cluster
from integration.failover import Shot, assert_identical, run
from integration.test_parity_under_failure import FAST, SLOW, Scenario, check_record, check_rejoined
from integration.watching import Seen, lane, watching
from kevlarflow.faults import SeveralInFlight
from parity.reference import Reference

pytestmark = pytest.mark.timeout(900)

BLOCK_BYTES = BLOCK_SIZE * LAYERS_PER_STAGE * BYTES_PER_TOKEN_AND_LAYER
FEW_BLOCKS = 4
MANY_TOKENS = 12
"""More than are on their way while replication keeps up."""


def scenarios(fast: type | None = None) -> list[object]:
    """All of them; in the fast set only the one whose trigger is given, or none."""
    return [
        pytest.param(each, id=str(each), marks=[] if each in FAST and type(each.trigger) is fast else pytest.mark.slow)
        for each in (*FAST, *SLOW)
    ]


@pytest.fixture(scope="module")
def scarce_cluster() -> Iterator[Cluster]:
    flags = (*FLAGS, f"--standby-memory-bytes={FEW_BLOCKS * BLOCK_BYTES}")
    with running_cluster(flags=flags, name="the cluster with hardly any memory for replicas") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def late_cluster() -> Iterator[Cluster]:
    flags = (*FLAGS, f"--replication-bandwidth={BLOCK_BYTES // 16}")
    with running_cluster(flags=flags, name="the cluster whose replication falls behind") as cluster:
        yield cluster


@pytest.mark.parametrize("scenario", scenarios(SeveralInFlight))
def test_with_a_standby_too_small_for_everything(
    scenario: Scenario, scarce_cluster: Cluster, stock_reference: Reference
) -> None:
    kill = scenario.kill
    scarce_cluster.wait_settled()
    before = lane(scarce_cluster, kill.pipeline, kill.stage)["dropped"]
    seen = kill_and_compare(scenario, scarce_cluster, stock_reference)
    assert seen.most_dropped > before, "the standby was to be too small"
    assert 0 < seen.most_bytes <= FEW_BLOCKS * BLOCK_BYTES
    assert seen.lowest_coverage < 1


@pytest.mark.parametrize("scenario", scenarios())
def test_with_replication_that_falls_behind(
    scenario: Scenario, late_cluster: Cluster, stock_reference: Reference
) -> None:
    late_cluster.wait_settled()
    seen = kill_and_compare(scenario, late_cluster, stock_reference)
    assert seen.tokens_behind > MANY_TOKENS, "replication was to be behind"
    assert seen.lowest_coverage < 1


def kill_and_compare(scenario: Scenario, cluster: Cluster, stock: Reference) -> Seen:
    """The test of the full suite; returns what was seen of the lane's replication meanwhile."""
    kill = scenario.kill
    killed = cluster.status()["pipelines"][kill.pipeline]["nodes"][kill.stage]
    shot = Shot(kill, scenario.trigger)
    with watching(cluster, kill.pipeline, kill.stage) as seen:
        outcome = run(cluster, scenario.requests, [shot])
    record = cluster.wait_recovered(shot.unix_time, kill.pipeline, kill.stage)
    check_record(record, killed)
    assert_identical(scenario.requests, stock, outcome.recordings)
    print(f"{scenario}: {record['recomputed_tokens']} tokens recomputed for {record['requests']} requests, {seen}")
    check_rejoined(cluster.wait_settled(), killed, kill)
    return seen
