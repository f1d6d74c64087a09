"""A kill of the failover experiment over a made-up cluster: what a system does wrong after it is an outcome."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kevlarflow.bench import failover
from kevlarflow.bench.failover import Plan
from kevlarflow.bench.machine import Machine
from kevlarflow.bench.measure import Pause
from kevlarflow.bench.recipes import Recipe
from kevlarflow.bench.report import harm, kills_table, markdown, pauses_table, phases_table, void
from kevlarflow.bench.results import Failover, Kill, Report
from kevlarflow.bench.streams import Request, Stream
from kevlarflow.bench.systems import SystemFailed

PHASES = dict.fromkeys(("detect", "plan", "relink", "restore", "recompute", "reissue"), 0.01) | {"total": 0.06}
TOKEN_SECONDS = 0.005
TIMEOUT_SECONDS = 2.0
NOT_AT_HOME = "after 180 s still not: every lane at home"
PLAN = Plan(Recipe(stages=1, pipelines=1), kills=1, streams=2, tokens=30)


class Cluster:
    """A pipeline of one node, which is a real process, and a load whose streams go on until the load is over."""

    address, model = None, "m"

    def __init__(self) -> None:
        self.node = subprocess.Popen(["sleep", "600"])
        self.records = ["crash", "rejoin"]
        """The causes of what it has recorded since the kill."""
        self.state = "done"
        self.loses = False
        self.loses_at_once = False

    @property
    def latest(self) -> dict[str, Any]:
        is_dead = self.node.poll() is not None
        return {
            "pipelines": [{"id": 0, "nodes": ["node-0-0"]}],
            "nodes": [{"id": "node-0-0", "incarnation": 1, "pids": [self.node.pid], "state": "ready"}],
            "recoveries": [self._record(cause) for cause in self.records] if is_dead else [],
        }

    def _record(self, cause: str) -> dict[str, Any]:
        place = {"cause": cause, "pipeline": 0, "stage": 0, "to": "node-1-0", "state": self.state}
        return place | {"time": time.time(), "seconds": PHASES, "recomputed_tokens": 0}

    async def closed_loop(
        self,
        _: Any,
        __: Any,
        work: Sequence[Sequence[Request]],
        listener: Callable[[Stream], None] | None = None,
        over: Callable[[], bool] = lambda: False,
    ) -> list[Stream]:
        clients = [Stream(each[0].name, time.monotonic(), each[0].pipeline) for each in work]
        if self.loses_at_once:
            clients[0].failure = "HTTP 503"
            return clients
        while listener is not None and not over():
            for stream in clients:
                stream.times.append(time.monotonic())
                stream.counts.append(1)
                listener(stream)
            await asyncio.sleep(TOKEN_SECONDS)
        for stream in clients:
            stream.usage_tokens, stream.finish_reason, stream.done = stream.tokens, "length", True
        if self.loses:
            clients[0].failure = "HTTP 503"
        return clients


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    async def nothing(*_: object) -> None:
        pass

    one = Cluster()
    for name in ("wait_quiet", "_until_settled"):
        monkeypatch.setattr(failover, name, nothing)
    monkeypatch.setattr(failover, "closed_loop", one.closed_loop)
    monkeypatch.setattr(failover, "LONGEST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(failover, "AFTERWARDS_SECONDS", 0.02)
    monkeypatch.setattr(failover, "RECOVERY_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    # However many tokens arrive, a stream has those that were asked for.
    monkeypatch.setattr(Stream, "defect", lambda self, _: self.failure and f"{self.name}: {self.failure}")
    yield one
    one.node.kill()
    one.node.wait()


def kills(
    cluster: Cluster,
    said: list[str] | None = None,
    wanted: int = 1,
    into: Failover | None = None,
    require_alive: Callable[[], None] = lambda: None,
) -> Failover:
    result = into or Failover(PLAN.streams)
    plan = msgspec.structs.replace(PLAN, kills=wanted)
    system = SimpleNamespace(address=None, model="m", require_alive=require_alive, processes=list)
    say = (said if said is not None else []).append
    asyncio.run(failover._kills(plan, result, system, cluster, say))  # type: ignore[arg-type]
    return result


def never_at_home_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lane is at home once, before the first kill."""
    looks = iter([None])

    async def until_settled(_: object) -> None:
        if next(looks, SystemFailed) is SystemFailed:
            raise SystemFailed(NOT_AT_HOME)

    monkeypatch.setattr(failover, "_until_settled", until_settled)


def report(result: Failover) -> Report:
    machine = Machine("a processor", 2, 23.0, "3.11", "0.32.0", "2.13", "0.1.0")
    return Report("kevlarflow bench", "2026-11-23T15:00:00+00:00", machine, Recipe(), failover=result)


def test_a_kill_that_costs_nobody_anything_is_said_so(cluster: Cluster) -> None:
    result = kills(cluster)
    (kill,) = result.kills
    assert (kill.void, kill.lost, kill.failure, len(kill.affected)) == (None, [], None, 2)
    assert any("0 streams lost, 0 of 1 kills" in each and ": reached" in each for each in pauses_table(result).remarks)
    assert harm(report(result)) == []


def test_a_stream_that_is_lost_after_a_kill_is_its_outcome(cluster: Cluster) -> None:
    cluster.loses = True
    said: list[str] = []
    result = kills(cluster, said)
    (kill,) = result.kills
    assert kill.void is None
    assert kill.lost == ["client 0 request 0: HTTP 503"]
    assert [pause.stream for pause in kill.affected] == ["client 1 request 0"], "the others are measured"
    assert "1 streams lost (client 0 request 0: HTTP 503)" in said[-1]
    remarks = pauses_table(result).remarks
    assert "kill 1: 1 streams lost (client 0 request 0: HTTP 503)" in remarks
    assert any("1 streams lost, 0 of 1 kills" in each and "NOT REACHED" in each for each in remarks)
    (row,) = kills_table(result).rows
    assert dict(zip(kills_table(result).headers, row, strict=True))["lost"] == "1"
    assert harm(report(result)) == ["kill 1: 1 streams lost (client 0 request 0: HTTP 503)"]
    assert void(report(result)) == []


@pytest.mark.parametrize(
    ("records", "state", "failure", "recovered"),
    [
        ([], "done", "after 2 s still not: a record of the crash or hang", False),
        (["crash"], "done", "after 2 s still not: a record of the rejoin", True),
        (["crash"], "failed", "the crash or hang is recorded as failed", False),
    ],
)
def test_a_recovery_that_is_late_or_fails_is_an_outcome_of_its_kill(
    records: list[str], state: str, failure: str, recovered: bool, cluster: Cluster
) -> None:
    cluster.records, cluster.state = records, state
    said: list[str] = []
    result = kills(cluster, said)
    (kill,) = result.kills
    assert (kill.void, kill.failure, kill.rejoin_seconds) == (None, failure, None)
    assert bool(kill.phases) is recovered
    assert failure in said[-1]
    assert f"kill 1: {failure}" in pauses_table(result).remarks
    assert any(
        "0 streams lost, 1 of 1 kills" in each and "NOT REACHED" in each for each in pauses_table(result).remarks
    )
    assert len(kills_table(result).rows) == 1
    assert bool(phases_table(result).rows) is recovered
    assert harm(report(result)) == [f"kill 1: {failure}"]


@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize(
    ("records", "failure"),
    [(["crash", "rejoin"], NOT_AT_HOME), (["crash"], "after 2 s still not: a record of the rejoin")],
)
def test_a_lane_that_is_never_at_home_again_is_the_outcome_of_the_last_kill(
    wanted: int, records: list[str], failure: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_at_home_again(monkeypatch)
    cluster.records = records
    said: list[str] = []
    result = kills(cluster, said, wanted)
    (kill,) = result.kills
    assert (result.void, kill.void, kill.failure) == (None, None, failure)
    assert NOT_AT_HOME in said[-1]
    assert harm(report(result)) == [f"kill 1: {failure}"]


def test_a_cluster_that_ends_after_a_kill_is_its_outcome(cluster: Cluster) -> None:
    alive = iter([None])

    def require_alive() -> None:
        if next(alive, SystemFailed) is SystemFailed:
            raise SystemFailed("KevlarFlow ended")

    result = kills(cluster, wanted=2, require_alive=require_alive)
    (kill,) = result.kills
    assert (result.void, kill.void, kill.failure) == (None, None, "KevlarFlow ended")


def test_lanes_that_are_never_at_home_leave_no_kill_to_blame(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    never_at_home_again(monkeypatch)
    asyncio.run(failover._until_settled(cluster))  # type: ignore[arg-type]
    with pytest.raises(SystemFailed, match=NOT_AT_HOME):
        kills(cluster)


def test_a_kill_that_was_none_after_which_no_lane_comes_home_is_not_passed_over(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_at_home_again(monkeypatch)
    cluster.loses_at_once = True
    result = kills(cluster)
    assert [(kill.void is None, kill.failure) for kill in result.kills] == [(False, NOT_AT_HOME)]
    assert any("NOT REACHED" in each for each in pauses_table(result).remarks)


def test_the_harm_of_an_earlier_attempt_counts_after_a_better_one(cluster: Cluster) -> None:
    earlier = Failover(2, [Kill(1, 0, 0, lost=["s: HTTP 503"]), Kill(2, 0, 0, void="the streams had ended")])
    result = kills(cluster, into=failover.anew(failover.anew(earlier, 2), 2))
    assert [kill.harm for kill in result.kills] == [[]]
    assert harm(report(result)) == ["kill 1: 1 streams lost (s: HTTP 503)"]
    assert any(
        "0 of 1 kills not recovered from in time, and 1 such outcomes of earlier attempts: NOT REACHED" in each
        for each in pauses_table(result).remarks
    )
    assert msgspec.json.decode(msgspec.json.encode(report(result)), type=Report).failover == result


def test_what_was_lost_before_the_kill_counts_though_that_is_void(cluster: Cluster) -> None:
    cluster.loses_at_once = True
    result = kills(cluster)
    (kill,) = result.kills
    assert (kill.void, kill.lost) == ("the streams had ended before the kill", ["client 0 request 0: HTTP 503"])
    assert cluster.node.poll() is None
    assert any("NOT REACHED" in each for each in pauses_table(result).remarks)
    assert harm(report(result)) != []


def test_a_kill_after_which_no_stream_went_on_can_be_shown_and_leaves_a_trace() -> None:
    kill = Kill(1, 0, 0, "node-0-0#1", lost=["s: HTTP 503"], failure="after 60 s still not: a record of the rejoin")
    result = Failover(16, [kill])
    assert "NOT REACHED" in markdown(report(result))
    assert failover.anew(result, 16).attempts == [
        "1 kills under 16 streams",
        "kill 1: 1 streams lost (s: HTTP 503)",
        "kill 1: after 60 s still not: a record of the rejoin",
    ]


def test_kills_of_an_older_report_have_lost_nothing() -> None:
    old = msgspec.to_builtins(Kill(1, 0, 0, affected=[Pause("s", 0.1, 0.2, 0.2, 9)], phases=PHASES))
    del old["lost"], old["failure"]
    assert msgspec.convert(old, Kill).harm == []
