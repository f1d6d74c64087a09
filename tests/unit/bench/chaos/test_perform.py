"""A performance over stand-ins: the client, the faults and the processes are real, the server only says tokens."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kevlarflow.bench.chaos import strikes
from kevlarflow.bench.chaos.judge import Observed, harm, judge
from kevlarflow.bench.chaos.perform import Performance
from kevlarflow.bench.chaos.scenario import parse
from kevlarflow.bench.streams import Address
from kevlarflow.faults import FaultDidNotHappen
from kevlarflow.faults.processes import identify, is_stopped

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
TOKEN_SECONDS = 0.01
SOME_TOKENS = 5
LOAD = "load: {streams: 3, tokens: 30, kinds: [greedy, cancelled]}"
BASE = f"""
about: for a test
cluster: {{stages: 1, pipelines: 1}}
{LOAD}
"""
CRASH = "faults: [{kind: crash, at: {tokens: 12}}]\n"


class Standin:
    """A cluster of one node: its status, told as a watcher would, and a server that streams numbers.

    When its node is gone it has another one a moment later, unless `is_hopeless`.
    """

    def __init__(self, *, is_hopeless: bool = False, words: str = "word") -> None:
        self.words = words
        self.changes_words = False
        self.gives_up_stopped = False
        self.refuses_after: int | None = None
        self.served = 0
        self.node = self._spawn()
        self._is_hopeless = is_hopeless
        self._incarnation = 1
        self._recoveries: list[dict[str, Any]] = []

    latest_at = property(lambda self: time.monotonic())

    @property
    def latest(self) -> dict[str, Any]:
        identity = identify(self.node.pid)
        if identity is None and not self._is_hopeless:
            self._recoveries.append(self._record())
            self.node, self._incarnation = self._spawn(), self._incarnation + 1
        alive = identify(self.node.pid) is not None
        node = {"id": "node-0-0", "incarnation": self._incarnation, "pids": [self.node.pid]}
        return {
            "model": "stand-in",
            "pipelines": [{"id": 0, "state": "serving" if alive else "waiting", "nodes": ["node-0-0"]}],
            "engines": [{"pipeline": 0, "pid": 1, "state": "ready", "running": 0, "waiting": 0}],
            "nodes": [node | {"state": "ready" if alive else "dead"}],
            "recoveries": self._recoveries,
        }

    def _watch(self) -> None:
        identity = identify(self.node.pid)
        if self.gives_up_stopped and identity is not None and is_stopped(identity) and not self._recoveries:
            self._recoveries.append(self._record() | {"cause": "hang"})

    def _record(self) -> dict[str, Any]:
        place = {"pipeline": 0, "stage": 0, "from": "node-0-0", "to": "node-0-0"}
        number = len(self._recoveries) + 1
        return place | {
            "id": number, "cause": "crash", "time": time.time(), "state": "done", "seconds": {"total": 0.25}
        }  # fmt: skip

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        tokens = json.loads(await reader.readexactly(length))["max_tokens"]
        self.served += 1
        words = f"{self.words}{self.served}" if self.changes_words else self.words
        writer.write(HEAD)
        try:
            for number in range(tokens):
                if self.refuses_after is not None and self.served > self.refuses_after and number == SOME_TOKENS:
                    self._say(writer, {"error": "lost"})
                    break
                finish = "length" if number == tokens - 1 else None
                choice = {"text": words, "token_ids": [number], "finish_reason": finish}
                self._say(writer, {"choices": [choice]})
                await writer.drain()
                await asyncio.sleep(TOKEN_SECONDS)
                self._watch()
            self._say(writer, {"choices": [], "usage": {"completion_tokens": tokens}})
            writer.write(b"data: [DONE]\n\n")
        except ConnectionError:
            pass
        writer.close()

    def _say(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
def standin() -> Iterator[Standin]:
    cluster = Standin()
    yield cluster
    cluster.node.kill()
    cluster.node.wait()


def perform(
    cluster: Standin, text: str, lines: list[str] | None = None, base: str = BASE, seen: Observed | None = None
) -> Observed:
    scenario = parse(base + text, "s.yaml")

    async def main() -> Observed:
        async with await asyncio.start_server(cluster.serve, "127.0.0.1", 0) as server:
            address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
            say = (lines if lines is not None else []).append
            performance = Performance(scenario, address, cluster, say)
            performance.seen = seen or performance.seen
            return await performance.perform()

    return asyncio.run(main())


def broken(text: str, seen: Observed) -> list[str]:
    return [verdict.check for verdict in judge(parse(BASE + text, "s.yaml").checks, seen) if not verdict.holds]


def test_a_crash_is_done_proved_and_judged(standin: Standin) -> None:
    victim = standin.node
    text = CRASH + "checks: {detected_seconds: 10, lane_back_seconds: 10, largest_gap_seconds: 10}"
    lines: list[str] = []
    seen = perform(standin, text, lines)
    assert victim.wait() == -signal.SIGKILL
    assert broken(text, seen) == []
    assert [answer.was_cancelled for answer in seen.answers] == [False, True, False]
    assert seen.answers[1].stream.tokens == 10
    assert [answer.tokens.ids for answer in seen.answers] == [list(range(count)) for count in (30, 10, 30)]
    assert [record["id"] for record in seen.recoveries] == [1]
    assert "crash: pipeline 0, stage 0 from node-0-0 to node-0-0, done in 250 ms ()" in lines
    assert any("crash node-0-0#1" in line and "gone after" in line for line in lines)


def test_other_texts_than_without_faults_are_seen(standin: Standin) -> None:
    standin.changes_words = True
    assert broken(CRASH, perform(standin, CRASH)) == ["texts identical"]


def test_a_limit_that_cannot_hold_does_not_hold(standin: Standin) -> None:
    text = CRASH + "checks: {largest_gap_seconds: 0.0001}"
    assert broken(text, perform(standin, text)) == ["largest gap"]


def test_a_lane_that_does_not_come_back_is_waited_for_no_longer_than_allowed() -> None:
    cluster = Standin(is_hopeless=True)
    text = CRASH + "checks: {lane_back_seconds: 0.3}"
    assert broken(text, perform(cluster, text)) == ["lane back within"]
    cluster.node.wait()


def test_a_frozen_process_is_thawed(standin: Standin) -> None:
    text = "faults: [{kind: stop, thaw_after_seconds: 0.05, at: {seconds: 0.02}}]"
    seen = perform(standin, text)
    assert broken(text, seen) == []
    assert "state T" in seen.faults[0].proof
    assert standin.node.poll() is None


@pytest.mark.parametrize(("believed_seconds", "unexpected"), [(60.0, 1), (0.01, 0)])
def test_only_a_freeze_that_lasts_may_cost_its_node(
    standin: Standin, believed_seconds: float, unexpected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strikes, "STOPPED_AFTER_SECONDS", believed_seconds)
    standin.gives_up_stopped = True
    seen = perform(standin, "faults: [{kind: stop, thaw_after_seconds: 0.1, at: {tokens: 3}}]")
    assert len(seen.unexpected) == unexpected
    assert len(seen.recoveries) == 1


def test_a_freeze_that_has_to_cost_its_node_and_does_not_is_found(standin: Standin) -> None:
    text = """faults: [{kind: stop, thaw_after_seconds: 0.1, lost: true, at: {tokens: 3}}]
checks: {detected_seconds: 1, lane_back_seconds: 0.2}
"""
    assert broken(text, perform(standin, text)) == ["detected within", "lane back within"]


def test_a_slow_process_is_slow_for_its_time_and_proved_to_have_been(standin: Standin) -> None:
    text = "faults: [{kind: slow, seconds: 1, share: 0.3, period_seconds: 0.3, at: {tokens: 3}}]"
    load = "load: {streams: 1, requests: 4, tokens: 30, stay: true, kinds: [greedy]}"
    seen = perform(standin, text, base=BASE.replace(LOAD, load))
    assert "of the time" in seen.faults[0].proof
    assert standin.node.poll() is None
    assert broken(text + "\nchecks: {moved_seconds: 60}", seen) == ["moved within"]


@pytest.mark.parametrize("moment", ["{tokens: 90}", "{seconds: 60}", "{phase: recovering}"])
def test_a_moment_that_never_comes_voids_the_run(standin: Standin, moment: str) -> None:
    with pytest.raises(FaultDidNotHappen, match="before the moment came"):
        perform(standin, f"faults: [{{kind: crash, at: {moment}}}]")
    assert standin.node.poll() is None


def test_a_target_that_is_not_there_voids_the_run_and_the_others_are_undone(standin: Standin) -> None:
    with pytest.raises(FaultDidNotHappen, match="no replacement"):
        perform(
            standin,
            """faults:
  - {kind: stop, at: {tokens: 1}}
  - {kind: crash, target: {role: replacement}, at: {tokens: 20}}
""",
        )
    standin.node.send_signal(signal.SIGTERM)
    # A stopped process would not end by SIGTERM.
    assert standin.node.wait(20) == -signal.SIGTERM


def test_requests_that_were_lost_in_a_void_run_are_seen(standin: Standin) -> None:
    """A defect that ends the load before the next fault is due must not hide behind the fault that is missing."""
    standin.refuses_after = 3
    seen = Observed()
    text = """faults:
  - {kind: stop, thaw_after_seconds: 0.02, at: {tokens: 3}}
  - {kind: crash, at: {tokens: 60}}
"""
    with pytest.raises(FaultDidNotHappen, match="before the moment came"):
        perform(standin, text, seen=seen)
    found = harm(parse(BASE + text, "s.yaml").checks, seen)
    assert [verdict.check for verdict in found if "3 of 3" in verdict.found] == ["requests lost"]


def test_requests_that_were_lost_before_any_fault_are_no_mere_void(standin: Standin) -> None:
    """Nor is a node that was given up meanwhile: no fault excuses what happens where there is none."""
    standin.refuses_after = 0
    standin.gives_up_stopped = True
    standin.node.send_signal(signal.SIGSTOP)
    seen = Observed()
    text = CRASH + "checks: {lost_requests: null}"
    with pytest.raises(FaultDidNotHappen, match="3 requests failed before any fault: client 0"):
        perform(standin, text, seen=seen)
    found = {verdict.check: verdict.found for verdict in harm(parse(BASE + text, "s.yaml").checks, seen)}
    assert list(found) == ["unexpected losses", "requests lost without a fault"]
    assert found["requests lost without a fault"].startswith("3 (client 0")


def test_a_fault_that_is_due_when_the_load_has_ended_does_not_strike(standin: Standin) -> None:
    performance = Performance(parse(BASE + CRASH, "s.yaml"), Address("127.0.0.1", 1), standin, print)

    async def main() -> None:
        load = asyncio.create_task(asyncio.sleep(0))
        await load
        performance.tokens["client 0"] = 12
        await performance._fault(performance.scenario.faults[0], load)

    with pytest.raises(FaultDidNotHappen, match="the load had ended"):
        asyncio.run(main())
    assert standin.node.poll() is None


def test_a_void_run_that_cost_nothing_has_done_no_harm(standin: Standin) -> None:
    seen = Observed()
    with pytest.raises(FaultDidNotHappen):
        perform(standin, CRASH.replace("12", "90"), seen=seen)
    assert len(seen.answers) == 3
    assert harm(parse(BASE + CRASH, "s.yaml").checks, seen) == []
