"""Lanes move under load: home to a replacement, and away from a node that is drained. No stream notices."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest

from integration.cluster import KEVLARFLOW, Cluster
from integration.waiting import until
from kevlarflow.bench.streams import Address, Stream, completion, send
from kevlarflow.faults import KillServing

pytestmark = pytest.mark.timeout(900)

PROMPTS = [f"Chapter {number}. The keeper of the lighthouse looked at the sea and" for number in range(4)]
TOKENS = 120
LONGEST_GAP_SECONDS = 0.3
"""No move opens a longer pause, where the streams have none like that anyway."""
ADDED_SECONDS = 0.15
"""What it may add to the longest that they have where the machine is crowded."""
ROUND_TIMEOUT_SECONDS = 120.0
COMMAND_TIMEOUT_SECONDS = 180.0
"""A node that is started by hand imports everything itself, on a busy machine."""


class Load:
    """Streams that begin again as soon as they end, each with the same prompt every time."""

    def __init__(self, cluster: Cluster, tokens: int = TOKENS) -> None:
        self._tokens = tokens
        self._address = Address("127.0.0.1", cluster.port)
        self._model: str = cluster.status()["model"]
        self._stopping = False
        self.streams: list[Stream] = []
        self.first = {f"{number}/0" for number in range(len(PROMPTS))}
        """Names of the streams that begin first."""

    async def _client(self, number: int) -> None:
        round_number = 0
        while not self._stopping:
            request = completion(f"{number}/{round_number}", PROMPTS[number], self._tokens, number % 2)
            self.streams.append(await send(self._address, self._model, request))
            round_number += 1

    async def run(self, meanwhile: Callable[[], Any]) -> Any:
        """Keep the streams going until `meanwhile`, on a thread of its own, has returned."""
        clients = [asyncio.create_task(self._client(number)) for number in range(len(PROMPTS))]
        try:
            return await asyncio.to_thread(meanwhile)
        finally:
            self._stopping = True
            await asyncio.gather(*clients)

    def wait_for_a_round(self) -> None:
        """Until every prompt has been answered once, without a failure: the others are compared with that."""
        until("a whole round", lambda: {stream.name for stream in self.streams} >= self.first, ROUND_TIMEOUT_SECONDS)

    def longest_gap(self, since: float, until_: float) -> float:
        """The longest pause of any stream that overlaps a span of monotonic time."""
        gaps = [
            after - before
            for stream in self.streams
            for before, after in zip(stream.times, stream.times[1:], strict=False)
            if after > since and before < until_
        ]
        return max(gaps)

    def require_whole(self) -> None:
        """Every stream arrived whole, and said what the first one with its prompt said."""
        defects = [defect for stream in self.streams if (defect := stream.defect(self._tokens))]
        assert not defects
        for number in range(len(PROMPTS)):
            texts = {stream.text for stream in self.streams if stream.name.startswith(f"{number}/")}
            assert len(texts) == 1, texts


def moves_since(cluster: Cluster, unix_time: float, cause: str) -> list[dict[str, Any]]:
    records = cluster.status()["recoveries"]
    return [each for each in records if each["cause"] == cause and each["time"] >= unix_time]


def wait_moved(cluster: Cluster, since: float, cause: str, count: int = 1) -> list[dict[str, Any]]:
    def moved() -> list[dict[str, Any]] | None:
        records = moves_since(cluster, since, cause)
        return records if len(records) >= count and all(each["state"] == "done" for each in records) else None

    return until(f"{count} moves because of a {cause}", moved, COMMAND_TIMEOUT_SECONDS)


def gap_of(load: Load, record: dict[str, Any], calm_until: float) -> tuple[float, float]:
    """The longest pause around a move, and the longest of the calm before all and of the two seconds before the move.

    Unix times.
    """
    ahead = time.time() - time.monotonic()
    at = record["time"] - ahead
    before = max(load.longest_gap(0.0, calm_until - ahead), load.longest_gap(at - 2.0, at - 0.1))
    return load.longest_gap(at, at + record["seconds"]["total"]), before


def test_a_lane_comes_home_under_load_and_no_stream_notices(grid: Cluster) -> None:
    load = Load(grid)

    def kill_and_wait() -> tuple[float, dict[str, Any]]:
        load.wait_for_a_round()
        at = time.time()
        grid.inject(KillServing(pipeline=0, stage=1))
        (record,) = wait_moved(grid, at, "rejoin")
        time.sleep(1.0)
        return at, record

    killed_at, record = asyncio.run(load.run(kill_and_wait))
    load.require_whole()
    assert record["requests"] > 0, "it was to move under load"
    gap, before = gap_of(load, record, killed_at)
    print(f"back after {record['time'] - killed_at:.1f} s; gap {gap:.3f} s, before it {before:.3f} s; {record}")
    assert gap < max(LONGEST_GAP_SECONDS, before + ADDED_SECONDS)


def kevlarflow(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    command = [KEVLARFLOW, *words, "--port", str(cluster.port)]
    return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS, check=False)


def test_a_node_is_drained_under_load_and_replaced_by_hand(grid: Cluster) -> None:
    load = Load(grid)
    pid = next(each["pid"] for each in grid.status()["nodes"] if each["id"] == "node-0-1")

    def drain_and_join() -> tuple[float, subprocess.CompletedProcess[str], list[dict[str, Any]]]:
        load.wait_for_a_round()
        at = time.time()
        drained = kevlarflow(grid, "drain", "node-0-1")
        (away,) = wait_moved(grid, at, "drain")
        time.sleep(1.0)
        node = next(each for each in grid.status()["nodes"] if each["id"] == "node-0-1")
        assert node["state"] == "dead"
        refused = kevlarflow(grid, "drain", "node-1-1")
        assert refused.returncode == 1
        assert "there is no other node of stage 1: join one first" in refused.stderr
        again = kevlarflow(grid, "drain", "node-0-1")
        assert again.returncode == 1
        assert "node-0-1 has left already" in again.stderr
        command = [KEVLARFLOW, "node", "--join", "node-0-1", "--port", str(grid.port)]
        joined = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        (home,) = wait_moved(grid, at, "rejoin")
        node = next(each for each in grid.status()["nodes"] if each["id"] == "node-0-1")
        assert node["pid"] == joined.pid
        taken = kevlarflow(grid, "node", "--join", "node-0-1")
        assert taken.returncode == 1
        assert "is taken by" in taken.stderr
        time.sleep(1.0)
        return at, drained, [away, home]

    calm_until, drained, records = asyncio.run(load.run(drain_and_join))
    load.require_whole()
    assert drained.returncode == 0, drained.stderr
    assert "has left" in drained.stdout
    until("the drained node to be gone", lambda: not _runs(pid), 30.0)
    for record in records:
        gap, before = gap_of(load, record, calm_until)
        print(f"gap {gap:.3f} s, before it {before:.3f} s; {record}")
        assert record["lost_requests"] == 0
        assert gap < max(LONGEST_GAP_SECONDS, before + ADDED_SECONDS)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False
