"""Three pipelines: the stage is lost, and lost again at the donor before the replacement is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from integration.cluster import FLAGS, Cluster, running_cluster
from integration.failover import assert_identical, wait_until_all_go_on
from kevlarflow.faults import KillServing
from parity import workload
from parity.client import Replay, replay
from parity.reference import Reference

pytestmark = pytest.mark.timeout(900)

STAGE = 1


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    flags = FLAGS
    with running_cluster(stages=2, pipelines=3, flags=flags, name="the 3 x 2 cluster") as cluster:
        yield cluster


@pytest.mark.slow
def test_a_second_loss_of_the_same_stage_is_survived(three: Cluster, stock_reference: Reference) -> None:
    streams = workload.steady()
    times: list[float] = []
    servers: list[str] = []

    def kill_and_wait() -> None:
        servers.append(three.status()["pipelines"][0]["nodes"][STAGE])
        times.append(time.time())
        three.inject(KillServing(0, STAGE))
        three.wait_recovered(times[-1], 0, STAGE)

    async def kill_twice(current: Replay) -> None:
        assert await current.reached(lambda progress: progress.tokens > 4 * len(streams))
        await asyncio.to_thread(kill_and_wait)
        await asyncio.to_thread(wait_until_all_go_on, current, 0)
        assert not current.over, "the streams ended before the second kill"
        await asyncio.to_thread(kill_and_wait)

    recordings = replay(three.base_url, streams, pipelines=3, beside=kill_twice)
    assert servers[0] == f"node-0-{STAGE}"
    assert servers[1] != servers[0], "the second loss was to hit the donor, before the replacement was back"
    losses = [each for each in three.status()["recoveries"] if each["cause"] == "crash"]
    # The donor served its own pipeline as well, so its death calls for two recoveries.
    assert len(losses) == 3
    assert all(each["state"] == "done" and each["lost_requests"] == 0 for each in losses), losses
    assert_identical(streams, stock_reference, recordings)
    three.wait_settled()
