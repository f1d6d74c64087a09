"""Memory: does the standby stay within its flag, and does vLLM's scheduler see as many KV blocks as stock's?

A cluster with replication serves a steady load for some minutes, and is looked at every second. Stock vLLM is started
once with the same flags, to be asked for its number of blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec
import psutil

from kevlarflow.bench.experiment import Say, Void, require_whole, running
from kevlarflow.bench.kv_cache import fullest_standby, kv_cache, read_page
from kevlarflow.bench.load import closed_loop
from kevlarflow.bench.prompts import clients
from kevlarflow.bench.recipes import KEVLARFLOW, STOCK, Recipe, make, own_caches
from kevlarflow.bench.replication_results import MemorySample, StandbyMemory
from kevlarflow.bench.systems import System, SystemFailed
from kevlarflow.bench.watch import StatusDocument, Watcher
from kevlarflow.config import run_folder_of

LOOK_SECONDS = 1.0
SAY_SECONDS = 30.0


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    recipe: Recipe
    minutes: float = 10.0
    streams: int = 16
    tokens: int = 96
    seed: int = 0


def run(plan: Plan, result: StandbyMemory, folder: Path, say: Say) -> None:
    """Ask stock vLLM, then run the cluster; what `result` has already is not measured again."""
    try:
        if not result.stock_kv_blocks:
            say(f"standby-memory: {STOCK} starts, to be asked for its number of KV blocks")
            stock = make(STOCK, plan.recipe, folder, own_caches(folder, STOCK))
            with running(stock, []):
                result.stock_kv_blocks = kv_cache(read_page(stock.address, "/metrics"), plan.recipe.pipelines).blocks
            say(f"  {result.stock_kv_blocks} blocks")
        if not result.samples or result.samples[-1].seconds < plan.minutes * 60:
            # One cluster has to be watched all the time.
            result.samples, result.requests = [], 0
            say(f"standby-memory: {KEVLARFLOW} starts, for {plan.minutes:g} minutes of load")
            system = make(KEVLARFLOW, plan.recipe, folder, own_caches(folder, KEVLARFLOW))
            with running(system, []):
                asyncio.run(_observe(plan, result, system, say))
    except (SystemFailed, Void) as error:
        result.void = str(error)
        say(f"standby-memory: {error}")


async def _observe(plan: Plan, result: StandbyMemory, system: System, say: Say) -> None:
    watcher = Watcher(run_folder_of(system.address.port))
    watcher.start()
    began = time.monotonic()
    load = asyncio.create_task(_load(plan, result, system, began))
    said = began
    try:
        while not load.done():
            await asyncio.sleep(LOOK_SECONDS)
            if watcher.latest is not None:
                result.samples.append(sample(watcher.latest, time.monotonic() - began))
                result.limit_bytes = max([row["limit_bytes"] for row in watcher.latest["replication"]], default=0)
            if time.monotonic() - said > SAY_SECONDS and result.samples:
                said = time.monotonic()
                say(told(result.samples[-1], result))
        await load
    finally:
        load.cancel()
        watcher.close()


async def _load(plan: Plan, result: StandbyMemory, system: System, began: float) -> None:
    """Closed loops with new prompts, until the time is over."""
    batch = 0
    while time.monotonic() - began < plan.minutes * 60:
        batch += 1
        work = clients(f"{plan.seed}/memory/{batch}", plan.streams, 1, plan.tokens, plan.recipe.pipelines)
        streams = await closed_loop(system.address, system.model, work)
        require_whole(streams, plan.tokens)
        result.requests += len(streams)
        system.require_alive()


def sample(status: StatusDocument, seconds: float) -> MemorySample:
    """One look: a status document, and the resident memory of its nodes."""
    return MemorySample(
        seconds=round(seconds, 1),
        standby_bytes=fullest_standby(status),
        node_bytes=max((_resident(node["pid"]) for node in status["nodes"] if node["pid"]), default=0),
        kv_blocks=min((engine["kv_blocks"] or 0 for engine in status["engines"]), default=0),
    )


def _resident(pid: int) -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def told(last: MemorySample, result: StandbyMemory) -> str:
    """One line about the last look."""
    return (
        f"  {last.seconds:.0f} s: fullest standby {last.standby_bytes / 2**20:.0f} of "
        f"{result.limit_bytes / 2**20:.0f} MiB, largest node {last.node_bytes / 2**20:.0f} MiB, "
        f"{last.kv_blocks} KV blocks (stock: {result.stock_kv_blocks})"
    )
