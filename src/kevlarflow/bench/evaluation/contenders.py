"""The systems under test, as the harness sees them: started, hurt, asked what happened, stopped.

`stock` is R servers behind vllm-router, what a careful operator runs today; `stock-dp` is one server; `replay` and
`kevlarflow` are KevlarFlow without and with replication. All get the same flags, environment and model.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil

from kevlarflow.bench import recipes
from kevlarflow.bench.evaluation import tiny_model
from kevlarflow.bench.evaluation.cells import KEVLARFLOW, REPLAY, STOCK, STOCK_DP, Setting
from kevlarflow.bench.evaluation.emulating import emulation
from kevlarflow.bench.evaluation.restarting import Life, Restarting
from kevlarflow.bench.recipes import Recipe
from kevlarflow.bench.streams import Address
from kevlarflow.bench.systems import HOST, SAME_FOR_ALL, ServerProcess, SystemFailed, free_port
from kevlarflow.bench.watch import Watcher
from kevlarflow.config import run_folder_of
from kevlarflow.faults import FaultDidNotHappen, KillServing, Target
from kevlarflow.faults.processes import ProcessIdentity, identify

WORKER = re.compile(r"Worker(?:_DP\d+)?_PP(?P<stage>\d+)")
"""The title of a vLLM worker's process. It names the pipeline only where pipelines depend on each other."""
ENGINE = re.compile(r"EngineCore_DP(?P<rank>\d+)")
"""The title of the process that has started it, if its server has several."""
READY_POLL_SECONDS = 0.1
START_TIMEOUT_SECONDS = 400.0
STATUS_TIMEOUT_SECONDS = 10.0
ROUTER_FLAGS = (
    *("--policy", "round_robin", "--log-level", "warning"),
    *("--health-check-interval-secs", "1", "--health-failure-threshold", "2", "--health-success-threshold", "1"),
    *("--worker-startup-check-interval", "1", "--retry-max-retries", "5", "--max-concurrent-requests", "100000"),
)


class Contender(Protocol):
    """A system under test."""

    pins: bool
    """Whether a request may name its pipeline (vLLM's header); a router knows no such header."""

    @property
    def model(self) -> str:
        """The name that requests ask for."""

    @property
    def address(self) -> Address:
        """Where it listens; valid after `start`."""

    def start(self) -> None:
        """Start it; returns at once."""

    def wait_ready(self) -> float:
        """Seconds from `start` until it takes requests. Raises `SystemFailed`."""

    def victim(self, pipeline: int, stage: int) -> Target:
        """The node or worker that serves a stage of a pipeline now. Raises `FaultDidNotHappen`."""

    def lives(self) -> list[Life]:
        """Restarts so far."""

    def recoveries(self) -> list[dict[str, Any]]:
        """Its own records of recoveries, if it has any."""

    def require_alive(self) -> None:
        """Raise `SystemFailed` when it is gone for good."""

    def processes(self) -> list[ProcessIdentity]:
        """Every living process that belongs to it."""

    def stop(self) -> list[str]:
        """Stop it; returns what it left running. Safe at any time, again too."""


class KevlarFlow:
    """KevlarFlow, watched through its controller."""

    pins = True

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._watcher: Watcher | None = None
        self.model = server.model

    @property
    def address(self) -> Address:
        """See `Contender.address`."""
        return self._server.address

    def start(self) -> None:
        """See `Contender.start`."""
        self._server.start()

    def wait_ready(self) -> float:
        """See `Contender.wait_ready`."""
        seconds = self._server.wait_ready(START_TIMEOUT_SECONDS)
        self._watcher = Watcher(run_folder_of(self.address.port))
        self._watcher.start()
        deadline = time.monotonic() + STATUS_TIMEOUT_SECONDS
        while self._watcher.latest is None:
            if time.monotonic() > deadline:
                raise SystemFailed("KevlarFlow is ready and its controller does not say its status")
            time.sleep(READY_POLL_SECONDS)
        return seconds

    def victim(self, pipeline: int, stage: int) -> Target:
        """See `Contender.victim`."""
        return KillServing(pipeline, stage).aim(self._status())

    def lives(self) -> list[Life]:
        """It is never restarted."""
        return []

    def recoveries(self) -> list[dict[str, Any]]:
        """See `Contender.recoveries`."""
        found: list[dict[str, Any]] = self._status()["recoveries"]
        return found

    def _status(self) -> dict[str, Any]:
        return (self._watcher and self._watcher.latest) or {"pipelines": [], "nodes": [], "recoveries": []}

    def require_alive(self) -> None:
        """See `Contender.require_alive`."""
        self._server.require_alive()

    def processes(self) -> list[ProcessIdentity]:
        """See `Contender.processes`."""
        return self._server.processes()

    def stop(self) -> list[str]:
        """See `Contender.stop`."""
        if self._watcher is not None:
            self._watcher.close()
        return self._server.stop()


class Stock:
    """Servers of stock vLLM, each restarted when it exits; with a router in front unless there is one only."""

    def __init__(self, servers: list[ServerProcess], router: ServerProcess | None) -> None:
        self._servers = [Restarting(server) for server in servers]
        self._router = router
        self._started_at = 0.0
        self.pins = router is None
        self.model = servers[0].model

    @property
    def address(self) -> Address:
        """See `Contender.address`."""
        return (self._router or self._servers[0].server).address

    def start(self) -> None:
        """See `Contender.start`."""
        self._started_at = time.monotonic()
        for server in self._servers:
            server.start()

    def wait_ready(self) -> float:
        """See `Contender.wait_ready`."""
        for server in self._servers:
            # A supervisor goes on restarting; but who never gets ready at all is not a system to measure.
            server.server.wait_ready(START_TIMEOUT_SECONDS)
        if self._router is not None:
            self._router.start()
            self._router.wait_ready(START_TIMEOUT_SECONDS)
        return time.monotonic() - self._started_at

    def victim(self, pipeline: int, stage: int) -> Target:
        """See `Contender.victim`."""
        server = self._servers[0 if self._router is None else pipeline].server
        rank = None if self._router is not None else str(pipeline)
        found = [process for process in server.processes() if _is_worker(process.pid, str(stage), rank)]
        if len(found) != 1:
            raise FaultDidNotHappen(f"stage {stage} of pipeline {pipeline} has {len(found)} workers, not one")
        return Target(f"worker of stage {stage}, pipeline {pipeline}", tuple(found))

    def lives(self) -> list[Life]:
        """See `Contender.lives`."""
        return [life for server in self._servers for life in server.lives]

    def recoveries(self) -> list[dict[str, Any]]:
        """Stock vLLM keeps none."""
        return []

    def require_alive(self) -> None:
        """See `Contender.require_alive`."""
        for server in self._servers:
            if server.failure is not None:
                raise SystemFailed(server.failure)
        if self._router is not None:
            self._router.require_alive()

    def processes(self) -> list[ProcessIdentity]:
        """See `Contender.processes`."""
        routers = self._router.processes() if self._router is not None else []
        return [*routers, *(process for each in self._servers for process in each.server.processes())]

    def stop(self) -> list[str]:
        """See `Contender.stop`."""
        left: list[str] = []
        failures = []
        parts: list[ServerProcess | Restarting] = [*self._servers]
        for each in [self._router, *parts] if self._router is not None else parts:
            try:
                left += each.stop()
            except SystemFailed as error:
                failures.append(str(error))
        if failures:
            raise SystemFailed("; ".join(failures))
        return left


def make(system: str, setting: Setting, folder: Path) -> Contender:
    """A system by its name; its logs go to `folder`. Raises `SystemFailed` when something for it is not installed."""
    recipe, environment = setting.recipe, dict(SAME_FOR_ALL)
    if setting.profile is not None:
        model = tiny_model.make(folder.parent / tiny_model.NAME, recipe.stages, recipe.max_model_len)
        recipe = msgspec.structs.replace(recipe, model=str(model))
        environment |= emulation(setting.profile, folder)
    match system:
        case "kevlarflow" | "replay":
            return KevlarFlow(recipes.kevlarflow(recipe, environment, folder, _own_flags(system, setting)))
        case "stock-dp":
            return Stock([recipes.stock_vllm(recipe, environment, folder, free_port(), STOCK_DP)], None)
        case "stock":
            return _behind_router(recipe, environment, folder)
    raise ValueError(f"there is no system {system!r}: use {', '.join((STOCK, STOCK_DP, REPLAY, KEVLARFLOW))}")


def _own_flags(system: str, setting: Setting) -> list[str]:
    flags = ["--standby-memory-bytes", "0"] if system == REPLAY else []
    if setting.replication_bytes_per_second is not None:
        flags += ["--replication-bandwidth", str(setting.replication_bytes_per_second)]
    return flags


def _behind_router(recipe: Recipe, environment: dict[str, str], folder: Path) -> Stock:
    one = msgspec.structs.replace(recipe, pipelines=1)
    names = [f"stock-{number}" for number in range(recipe.pipelines)]
    servers = [recipes.stock_vllm(one, environment, folder, free_port(), name) for name in names]
    return Stock(servers, router(servers, recipe.served_name, folder))


def router(servers: list[ServerProcess], model: str, folder: Path) -> ServerProcess:
    """vllm-router in front of servers whose ports are known. Raises `SystemFailed` when it is not installed."""
    beside_python = Path(sys.executable).with_name("vllm-router")
    program = str(beside_python) if beside_python.exists() else shutil.which("vllm-router")
    if program is None:
        raise SystemFailed("vllm-router is not installed: run make setup, or pip install --no-deps vllm-router orjson")
    workers = [f"http://{HOST}:{server.address.port}" for server in servers]
    metrics = free_port()

    def command(port: int) -> list[str]:
        where = ["--host", HOST, "--port", str(port), "--prometheus-port", str(metrics)]
        return [program, *where, "--worker-urls", *workers, *ROUTER_FLAGS]

    return ServerProcess("vllm-router", model, command, {}, folder / "router.log")


def _is_worker(pid: int, stage: str, rank: str | None) -> bool:
    """Whether a process is the worker of a stage, of the pipeline of that rank."""
    worker = WORKER.search(_title(pid))
    if worker is None or worker["stage"] != stage:
        return False
    if rank is None:
        return True
    try:
        engine = ENGINE.search(_title(psutil.Process(pid).ppid()))
    except psutil.Error:
        return False
    return engine is not None and engine["rank"] == rank


def _title(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline()) if identify(pid) else ""
    except psutil.Error:
        return ""
