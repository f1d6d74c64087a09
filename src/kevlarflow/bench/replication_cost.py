"""The cost of replication when nothing fails: two clusters, one with and one without, under the same load in turns.

Both run all the time, and the one whose turn it is not sleeps: so rounds are short, follow each other closely, and
what the machine does meanwhile falls on both alike. A round is one load on each; what counts is the ratio within it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kevlarflow.bench.experiment import Say, Void, require_whole, running, until, whole_rounds
from kevlarflow.bench.kv_cache import Sent, counted, kv_cache, read_page, sent
from kevlarflow.bench.load import closed_loop
from kevlarflow.bench.machine import CpuMeter, wait_quiet
from kevlarflow.bench.measure import summarize
from kevlarflow.bench.prompts import clients
from kevlarflow.bench.recipes import KEVLARFLOW, Recipe, make, own_caches
from kevlarflow.bench.replication_results import CostLoad, ReplicationCost
from kevlarflow.bench.resume import without_replication
from kevlarflow.bench.systems import System, SystemFailed
from kevlarflow.bench.watch import Watcher, is_settled
from kevlarflow.config import run_folder_of

WARM_UP_TOKENS = 16
COUNTERS = ("vllm:prompt_tokens", "vllm:generation_tokens")
CALM_SECONDS = 1.0
"""Nothing more is copied when the counters have stood still for so long."""
SETTLE_TIMEOUT_SECONDS = 60.0


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    recipe: Recipe
    rounds: int = 6
    streams: int = 16
    requests_each: int = 2
    tokens: int = 64
    seed: int = 0
    patience_seconds: float = 60.0


def run(plan: Plan, result: ReplicationCost, folder: Path, say: Say) -> None:
    """Run the rounds that `result` does not have yet."""
    measured = ((load.number, load.replicated, load.void is None and load.summary is not None) for load in result.loads)
    done = whole_rounds(measured, (True, False))
    result.attempts += [
        f"round {load.number}, replication {'on' if load.replicated else 'off'}: void: {load.void}"
        for load in result.loads
        if load.number not in done and load.void is not None
    ]
    result.loads = [load for load in result.loads if load.number in done]
    missing = [number for number in range(1, plan.rounds + 1) if number not in done]
    if not missing:
        return
    try:
        with contextlib.ExitStack() as stack:
            sides = {}
            for replicated in (True, False):
                say(f"replication-cost: {KEVLARFLOW} starts, replication {'on' if replicated else 'off'}")
                sides[replicated] = stack.enter_context(_side(plan, replicated, folder))
            for number in missing:
                _round(plan, number, sides, result, say)
    except SystemFailed as error:
        result.void = str(error)
        say(f"replication-cost: {error}")


class _Side:
    """One of the two clusters."""

    def __init__(self, system: System, watcher: Watcher) -> None:
        self.system = system
        self.watcher = watcher

    def computed(self) -> int:
        """Tokens whose KV it has written so far."""
        page = read_page(self.system.address, "/metrics")
        return sum(counted(page, name) for name in COUNTERS)

    async def sent(self) -> Sent:
        """What it has copied so far, once it is calm."""
        await until("the cluster to be calm", self._calm, SETTLE_TIMEOUT_SECONDS)
        while True:
            before = self._sent()
            await asyncio.sleep(CALM_SECONDS)
            if self._sent() == before:
                return before

    def _sent(self) -> Sent:
        return sent(self.watcher.latest or {"replication": ()})

    def _calm(self) -> bool:
        return self.watcher.latest is not None and is_settled(self.watcher.latest)


@contextlib.contextmanager
def _side(plan: Plan, replicated: bool, folder: Path) -> Iterator[_Side]:
    recipe = plan.recipe if replicated else without_replication(plan.recipe)
    own = folder / ("on" if replicated else "off")
    own.mkdir(exist_ok=True)
    system = make(KEVLARFLOW, recipe, own, own_caches(folder, KEVLARFLOW))
    with running(system, []):
        watcher = Watcher(run_folder_of(system.address.port))
        watcher.start()
        try:
            warm_up = clients("warm", plan.streams, 1, WARM_UP_TOKENS, plan.recipe.pipelines)
            asyncio.run(closed_loop(system.address, system.model, warm_up))
            yield _Side(system, watcher)
        finally:
            watcher.close()


def _round(plan: Plan, number: int, sides: dict[bool, _Side], result: ReplicationCost, say: Say) -> None:
    order = (True, False) if number % 2 else (False, True)
    for replicated in order:
        load = CostLoad(number, replicated)
        result.loads.append(load)
        try:
            asyncio.run(_load(plan, load, sides[replicated], sides))
            assert load.summary is not None
            say(
                f"  round {number} of {plan.rounds}, replication {'on ' if replicated else 'off'}: "
                f"{load.summary.tokens_per_second:.1f} tokens/s, TPOT p99 {load.summary.tpot_p99 * 1e3:.1f} ms, "
                f"{load.full_bytes / 2**20:.0f} MiB in full blocks and {load.partial_bytes / 2**20:.0f} MiB in partial "
                f"ones (others used {load.strangers:.0%} of the machine)"
            )
        except Void as error:
            load.void = str(error)
            say(f"  round {number}: void: {error}")
    if not result.kv_bytes_per_token:
        cache = kv_cache(read_page(sides[True].system.address, "/metrics"), plan.recipe.pipelines)
        per_stage = plan.recipe.kv_cache_memory_bytes / (cache.blocks * cache.block_size)
        result.kv_bytes_per_token = per_stage * plan.recipe.stages


async def _load(plan: Plan, load: CostLoad, side: _Side, sides: dict[bool, _Side]) -> None:
    seed = f"{plan.seed}/cost/{load.number}"
    work = clients(seed, plan.streams, plan.requests_each, plan.tokens, plan.recipe.pipelines)
    pids = [[process.pid for process in each.system.processes()] for each in sides.values()]
    meter = CpuMeter(lambda: itertools.chain(*pids))
    await wait_quiet(meter, plan.patience_seconds)
    computed, before = side.computed(), await side.sent()
    meter.start()
    streams = await closed_loop(side.system.address, side.system.model, work)
    load.strangers = meter.strangers()
    require_whole(streams, plan.tokens)
    after = await side.sent()
    load.summary = summarize(streams, plan.streams)
    load.computed_tokens = side.computed() - computed
    load.full_bytes, load.partial_bytes = after.full - before.full, after.partial - before.partial
    side.system.require_alive()
