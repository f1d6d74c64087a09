"""Where a scenario is performed: a cluster of its own, which has to leave nothing behind, or one that runs already."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from kevlarflow.bench.chaos import scenario as scenarios
from kevlarflow.bench.chaos.judge import Observed
from kevlarflow.bench.chaos.perform import Performance
from kevlarflow.bench.chaos.scenario import Cluster, Scenario
from kevlarflow.bench.chaos.show import Screen
from kevlarflow.bench.recipes import KEVLARFLOW, Recipe, make
from kevlarflow.bench.streams import Address
from kevlarflow.bench.systems import HOST, ServerProcess
from kevlarflow.bench.watch import Watcher
from kevlarflow.config import run_folder_of
from kevlarflow.control import guardian
from kevlarflow.control.status import ask_status
from kevlarflow.faults.processes import ProcessIdentity


def on_own_cluster(scenario: Scenario, folder: Path, screen: Screen) -> Observed:
    """Start the scenario's cluster, perform, stop it, and look for what it left. Logs go to `folder`."""
    server = make(KEVLARFLOW, recipe_of(scenario.cluster), folder)
    left: list[str] = []
    before = shared_memory()
    try:
        with screen.showing():
            server.start()
            screen.say(f"the cluster starts on port {server.address.port}")
            screen.say(f"ready after {server.wait_ready():.1f} s")
            seen = _on_cluster(scenario, server.address, screen)
    finally:
        left += stop_clean(server, before)
    seen.left_behind = left
    return seen


def on_running_cluster(scenario: Scenario, name: str, port: int, screen: Screen) -> Observed:
    """Perform on a cluster that is not ours. Raises `ClusterUnreachable` when there is none."""
    pipelines = ask_status(run_folder_of(port), timeout_seconds=5.0)["pipelines"]
    scenarios.require_places(scenario, name, len(pipelines), len(pipelines[0]["nodes"]))
    with screen.showing():
        screen.say("the cluster runs already: what the scenario says of `cluster` and `left_behind` is not looked at")
        return _on_cluster(scenario, Address(HOST, port), screen)


def _on_cluster(scenario: Scenario, address: Address, screen: Screen) -> Observed:
    with contextlib.closing(Watcher(run_folder_of(address.port))) as watcher:
        watcher.start()
        screen.performance = Performance(scenario, address, watcher, screen.say)
        return asyncio.run(screen.performance.perform())


def recipe_of(cluster: Cluster) -> Recipe:
    """How to start a scenario's cluster."""
    return Recipe(
        model=cluster.model,
        stages=cluster.stages,
        pipelines=cluster.pipelines,
        eager=cluster.eager,
        dtype=cluster.dtype,
        max_model_len=cluster.max_model_len,
        kv_cache_memory_bytes=cluster.kv_cache_memory_bytes,
        extra=("--max-num-batched-tokens", str(cluster.max_num_batched_tokens)),
        ours=cluster.flags,
    )


def stop_clean(server: ServerProcess, before: Collection[str]) -> list[str]:
    """Stop a server; return the processes, folders and shared memory that it left behind.

    `before` is the shared memory that there was before it started.
    """
    left = server.stop()
    folder = run_folder_of(server.address.port)
    left += [str(folder)] if folder.exists() else []
    return left + sorted(shared_memory_since(before, []))


def shared_memory() -> set[str]:
    """Files in /dev/shm that are this user's."""
    found = set()
    for entry in os.scandir(guardian.SHARED_MEMORY):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat(follow_symlinks=False).st_uid == os.getuid():
                found.add(entry.path)
    return found


def shared_memory_since(before: Collection[str], ours: Collection[ProcessIdentity]) -> set[str]:
    """What of it is new and not in use by others alone: what killed processes leave behind is in nobody's maps."""
    others = set(guardian.all_processes()) - {process.pid for process in ours}
    return shared_memory() - set(before) - set().union(*map(guardian.shared_memory_of, others))
