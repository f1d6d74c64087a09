"""Replays a workload against a cluster and lets faults strike at their moments."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence

import httpx

from integration.cluster import Cluster, metric_in
from integration.waiting import until
from kevlarflow.faults import Fault, FaultDidNotHappen, Progress, Struck, Target, Trigger, strike, verify
from kevlarflow.faults.triggers import RequestState
from parity.client import Observer, Recording, Replay, replay
from parity.compare import compare_all, unexcused
from parity.reference import Reference
from parity.workload import Request

METRICS_POLL_SECONDS = 0.1
PREEMPTIONS = "vllm:num_preemptions"
PREFIX_HITS = "vllm:prefix_cache_hits"
TOKENS_FURTHER = 3
"""More than may have been on their way."""
REPLAY_TIMEOUT_SECONDS = 150.0
"""No single request of a replay takes that long here, failover included."""


@dataclasses.dataclass
class Shot:
    """One fault and its moment."""

    fault: Fault
    trigger: Trigger
    target: Target | None = None
    struck: Struck | None = None
    unix_time: float = 0.0
    replay_time: float = 0.0
    """Seconds from the start of the replay, to be compared with the times of a recording."""

    def consider(self, progress: Progress, now: float) -> None:
        """Strike if this is the moment."""
        if self.struck is not None or self.target is None:
            return
        if self.trigger.missed(progress):
            raise FaultDidNotHappen(f"{self.trigger} can no longer come true")
        if self.trigger.due(progress):
            self.unix_time = time.time()
            self.replay_time = now
            self.struck = strike(self.target)


@dataclasses.dataclass
class Outcome:
    """What a replay has shown."""

    recordings: dict[str, Recording]
    preemptions: float
    prefix_hits: float
    shots: list[Shot]

    def gaps_after(self, shot: Shot) -> dict[str, float]:
        """For each stream that was under way at the fault: seconds from the fault to its next event."""
        gaps: dict[str, float] = {}
        for name, recording in self.recordings.items():
            later = [at for at in recording.times if at > shot.replay_time]
            if later and len(later) < len(recording.times):
                gaps[name] = later[0] - shot.replay_time
        return gaps


def run(cluster: Cluster, requests: Sequence[Request], shots: Sequence[Shot] = ()) -> Outcome:
    """Replay the requests; each shot strikes at its moment, and is verified before this returns."""
    before = {name: cluster.metric(name) for name in (PREEMPTIONS, PREFIX_HITS)}
    for shot in shots:
        shot.target = cluster.aim(shot.fault)

    def observe(progress: Progress, now: float) -> None:
        for shot in shots:
            shot.consider(progress, now)

    async def watch(current: Replay) -> None:
        await _watch_preemptions(cluster, current, observe)

    recordings = replay(
        cluster.base_url,
        requests,
        pipelines=cluster.pipelines,
        observer=observe,
        beside=watch if shots else None,
        timeout=REPLAY_TIMEOUT_SECONDS,
    )
    for shot in shots:
        if shot.struck is None:
            raise FaultDidNotHappen(f"the moment never came: {shot.trigger}")
        verify(shot.struck)
    after = {name: cluster.metric(name) for name in (PREEMPTIONS, PREFIX_HITS)}
    return Outcome(
        recordings,
        preemptions=after[PREEMPTIONS] - before[PREEMPTIONS],
        prefix_hits=after[PREFIX_HITS] - before[PREFIX_HITS],
        shots=list(shots),
    )


async def _watch_preemptions(cluster: Cluster, current: Replay, observe: Observer) -> None:
    pipelines = range(cluster.pipelines)
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=20.0) as client:
        page = (await client.get("/metrics")).text
        first = {pipeline: metric_in(page, PREEMPTIONS, pipeline) for pipeline in pipelines}
        while not current.over:
            await asyncio.sleep(METRICS_POLL_SECONDS)
            page = (await client.get("/metrics")).text
            for pipeline in pipelines:
                counted = metric_in(page, PREEMPTIONS, pipeline) - first[pipeline]
                current.progress.preemptions[pipeline] = int(counted)
            observe(current.progress, current.now())


def wait_until_all_go_on(current: Replay, pipeline: int) -> None:
    """Until each request that was under way on the pipeline has come further, or ended.

    A second loss before that would be held against those that have not: nobody computes them a third time.
    """

    def under_way() -> dict[str, int]:
        requests = list(current.progress.requests.items())
        return {
            name: each.tokens
            for name, each in requests
            if each.pipeline == pipeline and each.state is not RequestState.ENDED
        }

    before = under_way()

    def went_on() -> bool:
        return all(before.get(name, -TOKENS_FURTHER) + TOKENS_FURTHER <= tokens for name, tokens in under_way().items())

    until("every request that was under way to go on", went_on, REPLAY_TIMEOUT_SECONDS, poll=0.02)


def assert_identical(requests: Sequence[Request], stock: Reference, recordings: Mapping[str, Recording]) -> None:
    """Every event as in the reference; ties that excuse a difference are listed."""
    differences = compare_all(requests, stock.recordings, recordings, stock.margins)
    for difference in differences:
        if difference.excused:
            print(difference)
    wrong = unexcused(differences)
    assert not wrong, f"{len(wrong)} differences:\n" + "\n".join(str(each)[:500] for each in wrong[:20])
