"""`kevlarflow status --json` keeps its contract, and answers within a second when others do not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytest

from integration.cluster import KEVLARFLOW, Cluster, losses_since
from integration.waiting import until
from kevlarflow.bench.systems import free_port
from kevlarflow.control.status import ask_status
from kevlarflow.faults import KillServing, Struck

pytestmark = pytest.mark.timeout(600)

LONGEST_ANSWER_SECONDS = 1.0
NODE_STATES = {"starting", "ready", "suspect", "dead", "draining"}
PIPELINE_STATES = {"starting", "serving", "recovering", "waiting"}
FIELDS = {
    "pipelines": {"id", "state", "epoch", "nodes"},
    "engines": {"id", "pid", "pipeline", "state", "running", "waiting", "kv_blocks"},
    "nodes": {"id", "incarnation", "pid", "pids", "host", "stage", "state", "lanes"},
    "replication": {"pipeline", "stage", "standby", "lag_tokens", "bytes", "limit_bytes", "coverage"},
    "recoveries": {
        "id", "state", "time", "pipeline", "stage", "cause", "from", "to", "requests", "lost_requests",
        "recomputed_tokens", "seconds",
    },
}  # fmt: skip

SECONDS = {"detect", "plan", "relink", "restore", "recompute", "reissue", "total"}


def timed_status(cluster: Cluster) -> tuple[dict[str, Any], float]:
    """The document and how long it took, without the start of a Python interpreter: a crowded machine is no news."""
    start = time.monotonic()
    return ask_status(cluster.run_folder, 10.0), time.monotonic() - start


def require_fields(status: dict[str, Any], name: str) -> None:
    """A list of the document is not empty, and its entries have what they should."""
    assert status[name], f"no {name}"
    assert all(set(entry) >= FIELDS[name] for entry in status[name]), name


def test_the_document_keeps_the_contract(grid: Cluster) -> None:
    status = grid.ask()
    assert status["model"] == "smollm2-135m-instruct"
    assert status["main_pid"] == grid.process.pid
    until("the engines report", lambda: grid.ask()["replication"], timeout=30)
    status = grid.ask()
    for name in FIELDS.keys() - {"recoveries"}:
        require_fields(status, name)
    assert len(status["pipelines"]) == len(status["engines"]) == grid.pipelines
    assert len(status["nodes"]) == grid.pipelines * grid.stages
    for pipeline in status["pipelines"]:
        assert pipeline["state"] in PIPELINE_STATES
        assert len(pipeline["nodes"]) == grid.stages
    for node in status["nodes"]:
        assert node["state"] in NODE_STATES
        assert node["pid"] == node["pids"][0]
        os.kill(node["pid"], 0)
    for engine in status["engines"]:
        assert engine["kv_blocks"] > 0
        os.kill(engine["pid"], 0)
    pids = [process["pid"] for process in (*status["nodes"], *status["engines"])]
    assert len(set(pids)) == len(pids), "every node and every engine is a process of its own"


def test_it_answers_in_time_while_an_engine_is_stopped(grid: Cluster) -> None:
    engine = grid.status()["engines"][0]["pid"]
    os.kill(engine, signal.SIGSTOP)
    try:
        until("the engine is stopped", lambda: process_state(engine) == "T", timeout=30)
        for _ in range(3):
            _, seconds = timed_status(grid)
            assert seconds < LONGEST_ANSWER_SECONDS
    finally:
        os.kill(engine, signal.SIGCONT)
    grid.wait_settled()


def test_it_answers_in_time_during_a_recovery_and_tells_of_it(grid: Cluster) -> None:
    since = time.time()
    struck: list[Struck] = grid.inject(KillServing(1, 0))
    slowest, told = 0.0, False
    deadline = time.monotonic() + 60
    while not told:
        assert time.monotonic() < deadline, "status never told of the recovery"
        status, seconds = timed_status(grid)
        slowest = max(slowest, seconds)
        told = any(each["state"] == "done" for each in losses_since(status, since))
    assert slowest < LONGEST_ANSWER_SECONDS
    dead = struck[0].target.processes[0].pid
    status = grid.wait_settled()
    assert dead not in [node["pid"] for node in status["nodes"]], "a replaced node leaves the list"
    require_fields(status, "recoveries")
    assert all(set(recovery["seconds"]) >= SECONDS for recovery in status["recoveries"])
    ids = [recovery["id"] for recovery in status["recoveries"]]
    assert len(set(ids)) == len(ids)


def test_it_fails_when_nothing_answers() -> None:
    command = [KEVLARFLOW, "status", "--port", str(free_port()), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode != 0
    assert len(answer.stderr.strip().splitlines()) == 1


def process_state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]
