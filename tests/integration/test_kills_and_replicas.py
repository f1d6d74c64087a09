"""Kills that hit replication itself, on three pipelines: whatever dies, the tokens are those of stock vLLM.

The bandwidth of replication is low, so that a ring that heals takes seconds to catch up, and a kill finds it at that.
When nobody is left who knows the stage (two pipelines, both nodes of a stage), see `test_total_loss`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

import pytest

from integration.cluster import BLOCK_SIZE, FLAGS, Cluster, losses_since, running_cluster
from integration.failover import assert_identical
from integration.test_parity_under_failure import PREEMPTION
from integration.waiting import until
from integration.watching import Row, lane
from kevlarflow.faults import KillNode, KillServing, Progress
from parity.client import Replay, replay
from parity.reference import Reference

pytestmark = pytest.mark.timeout(900)

PIPELINE, STAGE = LANE = (0, 1)
BANDWIDTH = str(1 << 19)
SECONDS = 60.0


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    flags = (*FLAGS, f"--replication-bandwidth={BANDWIDTH}")
    with running_cluster(stages=2, pipelines=3, flags=flags, name="the 3 x 2 cluster with little bandwidth") as cluster:
        yield cluster


def under_load(cluster: Cluster, stock: Reference, hurt: Callable[[Replay], None]) -> None:
    """Hurt the cluster while several long streams of the pipeline are decoded; every event must be stock's."""
    cluster.wait_settled()

    async def wait_and_hurt(current: Replay) -> None:
        assert await current.reached(busy)
        await asyncio.to_thread(hurt, current)

    recordings = replay(cluster.base_url, PREEMPTION, pipelines=3, beside=wait_and_hurt)
    assert_identical(PREEMPTION, stock, recordings)
    lost = [each for each in cluster.status()["recoveries"] if each["lost_requests"]]
    assert not lost
    cluster.wait_settled()


def busy(progress: Progress) -> bool:
    """Whether several streams of the burst are under way."""
    return progress.decoding_on(PIPELINE) >= 4


def kill_serving(cluster: Cluster) -> str:
    """Kill the node that serves the stage and wait for the failover; returns its id."""
    killed = serving(cluster)
    since = time.time()
    cluster.inject(KillServing(PIPELINE, STAGE))
    assert cluster.wait_recovered(since, PIPELINE, STAGE)["state"] == "done"
    return killed


def serving(cluster: Cluster) -> str:
    return str(cluster.status()["pipelines"][PIPELINE]["nodes"][STAGE])


def test_a_kill_while_the_ring_is_still_catching_up(three: Cluster, stock_reference: Reference) -> None:
    """Two in a row of the same stage; the second hits the donor, whose new standby has but a part of the lane."""

    def has_but_a_part() -> bool:
        row = lane(three, PIPELINE, STAGE)
        return row["standby"] is not None and row["lag_tokens"] > 2 * BLOCK_SIZE

    def kill_twice(current: Replay) -> None:
        first = kill_serving(three)
        until("a new standby that has but a part of the lane", has_but_a_part, SECONDS, poll=0.02)
        assert not current.over, "the streams ended before the second kill"
        assert kill_serving(three) != first, "the second kill was to hit the donor"

    under_load(three, stock_reference, kill_twice)


@pytest.mark.slow
def test_a_kill_of_the_standby_itself(three: Cluster, stock_reference: Reference) -> None:
    healed: list[Row] = []

    def kill_standby(current: Replay) -> None:
        standby = lane(three, PIPELINE, STAGE)["standby"]
        assert standby not in (None, serving(three))
        three.inject(KillNode(standby))

        def forgotten() -> bool:
            row = lane(three, PIPELINE, STAGE)
            return row["standby"] != standby or not row["coverage"]

        def covered() -> Row | None:
            row = lane(three, PIPELINE, STAGE)
            return row if row["standby"] is not None and row["coverage"] > 0 and row["bytes"] else None

        until("what the dead standby had to count no more", forgotten, SECONDS)
        # The third node, or the dead one's replacement if that is quicker.
        healed.append(until("another standby with some of the lane", covered, SECONDS))
        assert not current.over, "the streams ended before the ring had healed"
        # What the new standby has is good: the lane goes on from it.
        kill_serving(three)

    under_load(three, stock_reference, kill_standby)
    assert healed


@pytest.mark.slow
def test_a_kill_of_a_node_and_its_standby_at_once(three: Cluster, stock_reference: Reference) -> None:
    def kill_both(_: Replay) -> None:
        node, standby = serving(three), lane(three, PIPELINE, STAGE)["standby"]
        assert standby not in (None, node)
        since = time.time()
        three.inject(KillNode(node), KillNode(standby))

        def saved_by_the_third() -> bool:
            # The standby may have been chosen as the donor before its own death was seen: that recovery fails.
            losses = [each for each in losses_since(three.status(), since) if (each["pipeline"], each["stage"]) == LANE]
            last = losses[-1] if losses else {"state": "running"}
            return last["state"] == "done" and not str(last["to"]).startswith((node, standby))

        until("the third node to serve the stage", saved_by_the_third, SECONDS)

    under_load(three, stock_reference, kill_both)
