"""The experiment about detection: what is asked, how answers are counted, what is still missing, what a report says."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from kevlarflow.bench import detection, load
from kevlarflow.bench.detection import TOKENS, Answers, Plan, requests_of
from kevlarflow.bench.detection_report import alarms_table, detection_table, faults_table
from kevlarflow.bench.detection_results import Detection, Fault, Kind, Life, Stretch
from kevlarflow.bench.hogs import Hogs
from kevlarflow.bench.recipes import Recipe
from kevlarflow.bench.streams import Address, Request, Stream
from kevlarflow.faults.processes import identify, is_alive

PLAN = Plan(recipe=Recipe(), minutes=30, kills=3)


# ---- the load


def test_prompts_come_again_as_new_ones_to_the_prefix_cache() -> None:
    asked = list(itertools.islice(requests_of(PLAN, 0), 6))
    assert [len(request.body["prompt"]) for request in asked] == [4096] * 6
    for first, again in zip(asked[:3], asked[3:], strict=True):
        assert first.body["prompt"] == again.body["prompt"]
        assert first.body["cache_salt"] != again.body["cache_salt"]
    assert asked[0].body["prompt"] != asked[1].body["prompt"]
    assert isinstance(next(requests_of(PLAN, PLAN.long_clients)).body["prompt"], str)


def test_each_client_stays_with_its_pipeline_and_each_pipeline_has_clients_of_both_kinds() -> None:
    """Clients that change gather where it is slow, and one pipeline after the other idles."""
    kinds = set()
    for client in range(PLAN.long_clients + PLAN.short_clients):
        asked = list(itertools.islice(requests_of(PLAN, client), 7))
        assert len({request.pipeline for request in asked}) == 1
        kinds.add((asked[0].pipeline, client < PLAN.long_clients))
    assert len(kinds) == 2 * PLAN.recipe.pipelines


def test_the_cluster_has_room_for_the_long_prompts_and_a_type_that_can_be_compared() -> None:
    started = PLAN.started()
    assert started.max_model_len >= 4096 + TOKENS
    assert started.dtype == "float32"
    assert Plan(recipe=Recipe(dtype="bfloat16", max_model_len=8192)).started() == Recipe(
        dtype="bfloat16", max_model_len=8192
    )


def test_an_endless_loop_ends_with_the_requests_under_way_and_is_not_driven_by_failures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[Stream] = []

    async def send(_: Address, __: str, request: Request, **___: object) -> Stream:
        await asyncio.sleep(0.001)
        return Stream(request.name, 0.0, failure="refused" if request.name.startswith("long") else None)

    monkeypatch.setattr(load, "send", send)
    clients = [requests_of(PLAN, client) for client in (0, PLAN.long_clients)]
    looks = iter([False] * 10)
    asyncio.run(load.endless_loop(Address("", 0), "", clients, ended.append, lambda: next(looks, True)))
    names = [stream.name for stream in ended]
    assert sum(name.startswith("long") for name in names) == 1, "it waits before it asks again"
    assert len(names) == 10


def answer(name: str, text: str = " so", tokens: int = TOKENS, **fields: object) -> Stream:
    stream = Stream(name, 0.0, counts=[tokens], pieces=[text], usage_tokens=tokens, finish_reason="length", done=True)
    for field, value in fields.items():
        setattr(stream, field, value)
    return stream


def test_answers_are_counted_where_they_end_and_compared_with_the_first_to_the_same_prompt() -> None:
    answers, calm, struck = Answers(), Stretch(), Stretch()
    answers.take(answer("long client 0 prompt 0, lap 0"), calm)
    answers.take(answer("short client 3 prompt 0, lap 0", " other"), calm)
    answers.take(answer("long client 0 prompt 0, lap 1"), struck)
    assert (calm.requests, calm.long_requests, calm.tokens) == (2, 1, 2 * TOKENS)
    assert (struck.requests, struck.lost, struck.different) == (1, [], [])
    answers.take(answer("long client 0 prompt 0, lap 2", " else"), struck)
    answers.take(answer("short client 3 prompt 0, lap 1", tokens=TOKENS - 1), struck)
    answers.take(answer("short client 3 prompt 0, lap 2", failure="HTTP 503"), struck)
    assert struck.different == ["long client 0 prompt 0, lap 2"]
    assert [each.partition(":")[0] for each in struck.lost] == [f"short client 3 prompt 0, lap {lap}" for lap in (1, 2)]


# ---- hogs


def test_hogs_use_the_machine_until_they_are_ended() -> None:
    with Hogs(1) as hogs:
        (pid,) = hogs.pids
        deadline = time.monotonic() + 30
        while hogs.cpu_seconds() < 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_hogs_end_with_whoever_has_started_them() -> None:
    program = "from kevlarflow.bench.hogs import Hogs\nwith Hogs(1) as hogs: print(hogs.pids[0], flush=True); input()"
    keeper = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    with keeper:
        assert keeper.stdout is not None
        pid = int(keeper.stdout.readline())
        keeper.kill()
    hog = identify(pid)
    deadline = time.monotonic() + 10
    try:
        while hog is not None and is_alive(hog):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- going on


def fault(number: int, kind: Kind, seconds: float | None = 0.1, void: str | None = None) -> Fault:
    return Fault(number, kind, "node-0-1#1", "1 gone", seconds, 9.0, void)


def result(*lives: Life) -> Detection:
    measured = PLAN.empty()
    measured.lives.extend(lives)
    return measured


def test_faults_that_are_missing_come_in_turns_and_void_ones_again() -> None:
    assert result().missing(2) == ["crash", "hang", "crash", "hang"]
    life = Life(faults=[fault(1, "crash"), fault(2, "hang", void="gone"), fault(3, "crash")])
    assert result(life).missing(3) == ["crash", "hang", "hang", "hang"]
    assert result(life).void == "gone"
    assert result(life, Life(faults=[fault(1, "hang")])).void is None
    assert result(life, Life(void="it died")).void == "it died"


def test_a_report_that_has_everything_starts_no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(detection, "make", None)
    faults = [fault(number, kind) for number, kind in enumerate(("crash", "hang") * 3, 1)]
    whole = result(Life(calm=Stretch(1000.0)), Life(calm=Stretch(800.0), faults=faults))
    said: list[str] = []
    detection.run(PLAN, whole, tmp_path, said.append)
    assert said == ["detection: the report has its 30 minutes and 3 faults of each kind"]
    with pytest.raises(TypeError):
        detection.run(PLAN, result(Life(calm=Stretch(1700.0), faults=faults)), tmp_path, said.append)


# ---- the report


def test_false_alarms_are_counted_named_and_judged() -> None:
    calm = Stretch(900.0, 450.0, 90.0, 0.0, 100, 20, 4000)
    quiet = alarms_table(result(Life(calm=calm), Life(calm=calm)), cores=2)
    assert quiet.rows[0] == ("1, no fault", "15.0", "0", "0", "100", "20", "0", "0", "4.4", "25%", "5%", "0%")
    assert "Required: no false alarm in 30 minutes without a fault; 0 in 30.0: reached." in quiet.remarks
    short = alarms_table(result(Life(calm=calm)), cores=2)
    assert "Required: no false alarm in 30 minutes without a fault; 0 in 15.0: NOT REACHED." in short.remarks
    loud = Stretch(900.0, alarms=["NodeSilent(node-0-1#1)"], lost=["short client 3: reset"])
    table = alarms_table(result(Life(calm=calm), Life(calm=loud)), cores=2)
    assert "Required: no false alarm in 30 minutes without a fault; 1 in 30.0: NOT REACHED." in table.remarks
    assert "false alarm (cluster 2, no fault): NodeSilent(node-0-1#1)" in table.remarks
    assert "lost (cluster 2, no fault): short client 3: reset" in table.remarks


def test_minutes_whose_alarms_nobody_knows_do_not_count() -> None:
    """The journal of the first cluster cannot be read; the second one was quiet, for 10 minutes only."""
    unknown = Life(calm=Stretch(1200.0), void="the journal cannot be read", has_journal=False)
    watched = result(unknown, Life(calm=Stretch(600.0)))
    remarks = alarms_table(watched, cores=2).remarks
    assert "Required: no false alarm in 30 minutes without a fault; 0 in 10.0: NOT REACHED." in remarks
    assert "cluster 1 ended before its time: the journal cannot be read; its minutes do not count" in remarks
    assert watched.calm_seconds() == 600.0


def faults_of(kind: Kind, seconds: Sequence[float | None]) -> Detection:
    return result(Life(faults=[fault(number, kind, each) for number, each in enumerate(seconds, 1)]))


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        (faults_of("crash", [0.1] * 19 + [0.29]), "worst of 20 290 ms: reached"),
        (faults_of("crash", [0.1] * 19 + [0.31]), "worst of 20 310 ms: NOT REACHED"),
        (faults_of("hang", [0.5] * 19 + [None]), "worst of 20 never: NOT REACHED"),
        (faults_of("hang", [0.5] * 199 + [5.0]), "p99 500 ms: reached"),
        (faults_of("hang", [0.5] * 97 + [1.5] * 3), "p99 1,500 ms: NOT REACHED"),
    ],
)
def test_a_p99_is_said_only_of_enough_faults_and_one_that_is_never_noticed_counts(
    measured: Detection, said: str
) -> None:
    assert said in "\n".join(detection_table(measured).remarks)


def test_void_faults_are_named_and_not_counted() -> None:
    measured = result(Life(faults=[fault(1, "crash"), fault(2, "hang", void="it left by itself")]))
    assert [row[:2] for row in detection_table(measured).rows] == [("crash", "1")]
    table = faults_table(measured)
    assert [row[0] for row in table.rows] == ["1/1"]
    assert table.remarks == ["cluster 1, fault 2: void: it left by itself"]
