"""A real cluster for tests: starts ``kevlarflow serve``, asks it, hurts it, and checks that it leaves nothing behind.

It is used as a user would, through HTTP and the command line; only its status is asked for directly. What the tests
know of its processes comes from the status document and from /proc.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from integration.waiting import POLL_SECONDS, until
from kevlarflow.bench.systems import free_port
from kevlarflow.config import RUN_FOLDER_VARIABLE, run_folder_of
from kevlarflow.control.status import ask_status
from kevlarflow.errors import ClusterUnreachable
from kevlarflow.faults import Fault, Struck, Target, strike, verify
from kevlarflow.faults.processes import ProcessIdentity, command_line, identify, is_alive, with_environment

START_TIMEOUT_SECONDS = 300.0
STOP_TIMEOUT_SECONDS = 30.0
RECOVERY_TIMEOUT_SECONDS = 60.0
REJOIN_TIMEOUT_SECONDS = 120.0
STATUS_TIMEOUT_SECONDS = 20.0

KEVLARFLOW = str(Path(sys.executable).with_name("kevlarflow"))
BLOCK_SIZE = 32
KV_BLOCKS = 44
LAYERS_PER_STAGE = 15
BYTES_PER_TOKEN_AND_LAYER = 2 * 3 * 64 * 4
"""K and V, heads, head size, float32: SmolLM2-135M."""

FLAGS = (
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=1024",
    "--max-num-batched-tokens=256",
    "--max-num-seqs=16",
    f"--block-size={BLOCK_SIZE}",
    # Too small for the burst of the workload, so that running requests are preempted.
    f"--kv-cache-memory-bytes={KV_BLOCKS * BLOCK_SIZE * LAYERS_PER_STAGE * BYTES_PER_TOKEN_AND_LAYER}",
    "--seed=0",
)
PATIENT_SECONDS = 120
"""For `--replacement-wait`: on a crowded machine the usual 45 s may pass before a replacement is there."""

Status = dict[str, Any]


class Cluster:
    """A running cluster of `pipelines` x `stages` nodes."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, stages: int, pipelines: int) -> None:
        self.process = process
        self.port = port
        self.stages = stages
        self.pipelines = pipelines
        self.base_url = f"http://127.0.0.1:{port}"
        self.run_folder = run_folder_of(port)

    # ---- asking

    def ask(self) -> Status:
        """What ``kevlarflow status --json`` prints, asked once."""
        command = [KEVLARFLOW, "status", "--port", str(self.port), "--json"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=STATUS_TIMEOUT_SECONDS, check=False)
        assert answer.returncode == 0, f"status failed: {answer.stderr.strip()}"
        document: Status = json.loads(answer.stdout)
        return document

    def status(self) -> Status:
        """The same for tests that are about something else and ask often: without an interpreter for each question."""
        deadline = time.monotonic() + STATUS_TIMEOUT_SECONDS
        while True:
            try:
                return ask_status(self.run_folder, STATUS_TIMEOUT_SECONDS)
            except ClusterUnreachable:
                if time.monotonic() >= deadline or self.process.poll() is not None:
                    raise
                time.sleep(POLL_SECONDS)  # Its controller is being started again.

    def healthy(self) -> bool:
        """Whether /health is 200."""
        try:
            return httpx.get(f"{self.base_url}/health", timeout=10.0).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def metric(self, name: str, pipeline: int | None = None) -> float:
        """Sum of a metric of vLLM's over the engines, or its value for one."""
        text = httpx.get(f"{self.base_url}/metrics", timeout=20.0).text
        return metric_in(text, name, pipeline)

    def settled(self) -> Status | None:
        """The status if nothing is going on: every place has its node, every lane is at home, no request."""
        status = self.status()
        home = [[f"node-{p}-{s}" for s in range(self.stages)] for p in range(self.pipelines)]
        calm = (
            [pipeline["nodes"] for pipeline in status["pipelines"]] == home
            and all(pipeline["state"] == "serving" for pipeline in status["pipelines"])
            and sorted(node["id"] for node in status["nodes"]) == sorted(itertools.chain(*home))
            and all(node["state"] == "ready" for node in status["nodes"])
            and all(engine["state"] == "ready" for engine in status["engines"])
            and not any(engine["running"] or engine["waiting"] for engine in status["engines"])
        )
        return status if calm else None

    # ---- waiting

    def wait_settled(self, timeout: float = REJOIN_TIMEOUT_SECONDS) -> Status:
        """Wait until every replacement has taken its lane back and no request is left."""
        self.require_alive()
        return until("every node at home, no request left", self.settled, timeout, poll=0.3)

    def wait_recovered(
        self, after: float, pipeline: int, stage: int, timeout: float = RECOVERY_TIMEOUT_SECONDS
    ) -> dict[str, Any]:
        """Wait for the end of the recovery that a loss at Unix time `after` called for; return its record."""

        def ended() -> dict[str, Any] | None:
            for recovery in losses_since(self.status(), after):
                if (recovery["pipeline"], recovery["stage"]) == (pipeline, stage):
                    return recovery if recovery["state"] != "running" else None
            return None

        return until(f"recovery of pipeline {pipeline}, stage {stage}", ended, timeout)

    def require_alive(self) -> None:
        """Fail at once when the supervisor has gone."""
        assert self.process.poll() is None, f"serve ended with {self.process.returncode}:\n{self.log_tail()}"

    # ---- hurting

    def aim(self, fault: Fault) -> Target:
        """The processes that a fault would hit now."""
        return fault.aim(self.status())

    def inject(self, *faults: Fault) -> list[Struck]:
        """Inject faults together, and make sure that each happened."""
        status = self.status()
        targets = [fault.aim(status) for fault in faults]
        struck = [strike(target) for target in targets]
        for each in struck:
            verify(each)
        return struck

    # ---- processes

    def processes(self) -> list[ProcessIdentity]:
        """Every living process of the run: descendants of the supervisor, and whatever carries its run folder."""
        pids = {self.process.pid, *with_environment(RUN_FOLDER_VARIABLE, str(self.run_folder))}
        with suppress(psutil.NoSuchProcess):
            pids |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        return [process for pid in sorted(pids) if (process := identify(pid)) is not None]

    def api_server_pid(self) -> int:
        """The process that is the parent of the engines."""
        parents = {psutil.Process(engine["pid"]).ppid() for engine in self.status()["engines"]}
        assert len(parents) == 1, f"the engines have several parents: {parents}"
        return parents.pop()

    def log_tail(self, characters: int = 4000) -> str:
        """The end of what the supervisor printed, and of the logs of its children."""
        logs = [self.serve_log, *sorted(self.run_folder.with_suffix(".logs").glob("*.log"))]
        parts = [f"--- {log.name}\n{log.read_text(errors='replace')[-characters:]}" for log in logs if log.exists()]
        return "\n".join(parts)

    @property
    def serve_log(self) -> Path:
        """Where the output of ``kevlarflow serve`` goes."""
        return _log_folder() / f"serve-{self.port}.log"

    def stop(self) -> None:
        """End it as a user would, and check that nothing of it is left."""
        processes = self.processes()
        shared = shared_memory_of(processes)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_SECONDS)
        finally:
            leftovers = [process for process in {*processes, *self.processes()} if is_alive(process)]
            for process in leftovers:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        assert not leftovers, f"left running: {[command_line(process.pid) for process in leftovers]}"
        assert not self.run_folder.exists(), f"left behind: {self.run_folder}"
        left = [name for name in shared if Path(name).exists()]
        assert not left, f"shared memory left behind: {left}"


@contextmanager
def running_cluster(
    *, stages: int = 2, pipelines: int = 2, flags: Sequence[str] = FLAGS, name: str = ""
) -> Iterator[Cluster]:
    """A cluster that is ready, for the length of a block."""
    port = free_port()
    command = [KEVLARFLOW, "serve", "-pp", str(stages), "-dp", str(pipelines), "--port", str(port), *flags]
    log = _log_folder() / f"serve-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    cluster = Cluster(process, port, stages, pipelines)
    try:
        started = time.monotonic()
        until(f"/health of {name or 'the cluster'}", lambda: _ready(cluster), START_TIMEOUT_SECONDS)
        cluster.wait_settled(START_TIMEOUT_SECONDS - (time.monotonic() - started))
        yield cluster
    except BaseException:
        print(cluster.log_tail())
        raise
    finally:
        cluster.stop()
    # Faults were intended.
    shutil.rmtree(cluster.run_folder.with_suffix(".logs"), ignore_errors=True)
    cluster.serve_log.unlink()


def _ready(cluster: Cluster) -> bool:
    cluster.require_alive()
    # What dies before `serve` has said so itself dies during start-up, which ends everything.
    return cluster.healthy() and "ready in " in cluster.serve_log.read_text()


def _log_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"kevlarflow-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def losses_since(status: Status, after: float) -> list[dict[str, Any]]:
    """Recoveries that began since a Unix time because a node was lost, oldest first."""
    return [each for each in status["recoveries"] if each["time"] >= after and each["cause"] in {"crash", "hang"}]


def metric_in(text: str, name: str, pipeline: int | None = None) -> float:
    """Sum of a metric in a Prometheus page, over all engines or for one."""
    total, seen = 0.0, False
    for line in text.splitlines():
        match = re.fullmatch(rf"{re.escape(name)}(?:_total)?(?:\{{(.*)\}})? (\S+)", line)
        if match and (pipeline is None or f'engine="{pipeline}"' in (match[1] or "")):
            total, seen = total + float(match[2]), True
    assert seen, f"/metrics has no {name}" + ("" if pipeline is None else f" of engine {pipeline}")
    return total


def shared_memory_of(processes: Sequence[ProcessIdentity]) -> set[str]:
    """Files in /dev/shm that processes have mapped."""
    found: set[str] = set()
    for process in processes:
        with suppress(OSError):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            found |= {line.split(maxsplit=5)[5] for line in maps.splitlines() if "/dev/shm/" in line}
    return {name for name in found if not name.endswith(" (deleted)")}
