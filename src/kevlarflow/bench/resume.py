"""Resuming from replicas: does a failure cost the same however long the contexts are?

So many streams with prompts of one length run on the pipeline that loses a node of its last stage, the worst one to
lose: without replicas every token goes through all stages again. With replication the kill waits until the standby
has all full blocks. Where the time went is the cluster's own record; beside it stands a plain copy of as many bytes as
were restored, measured in the same run. Each length in each round is a point; what a report has already is not measured
again. Without replication one round is enough: what takes minutes is no matter of milliseconds.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kevlarflow.bench.experiment import Say, Void, running, until
from kevlarflow.bench.kv_cache import KvCache, kv_cache, lag_tokens, read_page
from kevlarflow.bench.measure import gaps, pause_after
from kevlarflow.bench.memory_copy import copy_seconds
from kevlarflow.bench.prompts import token_prompt
from kevlarflow.bench.recipes import KEVLARFLOW, Recipe, make, own_caches
from kevlarflow.bench.replication_results import Resume, Resumption
from kevlarflow.bench.streams import Request, Stream, completion, send
from kevlarflow.bench.systems import System, SystemFailed
from kevlarflow.bench.watch import StatusDocument, Watcher, is_settled, recovery_after
from kevlarflow.config import run_folder_of
from kevlarflow.faults import FaultDidNotHappen, KillServing, Struck, strike, verify

PIPELINE = 0
EARLIEST_TOKEN = 12
UNFINISHED = "it was not measured to its end"
"""Of a point until it is, for whoever interrupts it."""
TOKENS_AFTER = 3
"""Tokens that each stream must still bring after the recovery."""
TOKENS_OF_A_RUN = 64
"""About as many are generated before the recovery is over."""
MOST_TOKENS = 500
LONGEST_CONTEXT = 8192
"""The window of the default model."""
LEAST_KV_BYTES = 1600 << 20
"""In 16 bits it holds eight of its contexts of 7,500 tokens on one of two stages, twice: a donor has two lanes."""
STREAM_TIMEOUT_SECONDS = 1_200.0
BEGIN_TIMEOUT_SECONDS = 900.0
RECOVERY_TIMEOUT_SECONDS = 600.0
SETTLE_TIMEOUT_SECONDS = 300.0
CATCH_UP_TIMEOUT_SECONDS = 120.0


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    recipe: Recipe
    contexts: tuple[int, ...] = (256, 1024, 2048, 4096, 7500)
    replicated: tuple[bool, ...] = (True, False)
    streams: int = 8
    rounds: int = 3
    """With replication."""
    seed: int = 0

    def missing(self, result: Resume, replicated: bool) -> list[tuple[int, int]]:
        """(round, context) of each point that `result` does not have, round by round."""
        rounds = range(1, self.rounds + 1) if replicated else (1,)
        points = [(number, context) for number in rounds for context in self.contexts]
        return [(number, context) for number, context in points if not result.has(context, replicated, number)]


def run(plan: Plan, result: Resume, folder: Path, say: Say) -> None:
    """Measure every point that `result` does not have yet."""
    for replicated in plan.replicated:
        missing = plan.missing(result, replicated)
        if not missing:
            continue
        say(f"resume: {KEVLARFLOW} starts, replication {'on' if replicated else 'off'}")
        recipe = plan.recipe if replicated else without_replication(plan.recipe)
        system = make(KEVLARFLOW, recipe, folder, own_caches(folder, KEVLARFLOW))
        try:
            with running(system, []):
                asyncio.run(_points(plan, missing, replicated, result, system, say))
        except SystemFailed as error:
            result.void = str(error)
            say(f"resume: {error}")


def without_replication(recipe: Recipe) -> Recipe:
    """The same, but for replicas."""
    return msgspec.structs.replace(recipe, ours=(*recipe.ours, "--standby-memory-bytes", "0"))


async def _points(
    plan: Plan, missing: Sequence[tuple[int, int]], replicated: bool, result: Resume, system: System, say: Say
) -> None:
    cache = kv_cache(read_page(system.address, "/metrics"), plan.recipe.pipelines)
    watcher = Watcher(run_folder_of(system.address.port))
    watcher.start()
    try:
        for number, context in missing:
            point = Resumption(context, replicated, plan.streams, number, cache.block_size, void=UNFINISHED)
            result.points.append(point)
            try:
                await _Point(plan, point, system, watcher, cache).measure()
                point.void = None
                say(told(point))
            except (Void, FaultDidNotHappen) as error:
                point.void = str(error)
                say(f"  {context} tokens: void: {error}")
            await until("every lane at home", lambda: _settled(watcher.latest), SETTLE_TIMEOUT_SECONDS)
    finally:
        watcher.close()


def _settled(status: StatusDocument | None) -> bool:
    return status is not None and is_settled(status)


class _Point:
    """One kill."""

    def __init__(self, plan: Plan, point: Resumption, system: System, watcher: Watcher, cache: KvCache) -> None:
        self._plan = plan
        self._point = point
        self._system = system
        self._watcher = watcher
        self._cache = cache
        self._stage = plan.recipe.stages - 1
        self._random = random.Random(f"{plan.seed}/{point.replicated}/{point.number}/{point.context}")
        self._streams: dict[str, Stream] = {}
        self._live_tokens: list[int] = []
        """Of each stream, at the kill."""

    async def measure(self) -> None:
        """Run the load, kill, and write down what came of it."""
        self._require_room()
        tasks = [asyncio.create_task(self._send(request)) for request in self._requests()]
        try:
            await until("every stream to have begun", self._begun, BEGIN_TIMEOUT_SECONDS)
            if self._point.replicated:
                await until("the standby to have all full blocks", self._caught_up, CATCH_UP_TIMEOUT_SECONDS)
            self._note_load()
            # Anywhere in a step: what was waited for came with a token, and then the newest copies are on their way.
            await asyncio.sleep(self._random.random() * self._point.step_seconds)
            unix_time = time.time()
            struck = await self._kill()
            record = await until("a record of the recovery", lambda: self._record(unix_time), RECOVERY_TIMEOUT_SECONDS)
            counts = {name: stream.tokens for name, stream in self._streams.items()}
            await until("every stream to go on", lambda: self._went_on(counts), RECOVERY_TIMEOUT_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self._note_recovery(record, struck)

    def _require_room(self) -> None:
        """The donor serves two lanes in the memory of one: whoever has no room there is computed again later."""
        point = self._point
        needed = point.streams * math.ceil((point.context + TOKENS_OF_A_RUN) / self._cache.block_size)
        room = (self._cache.blocks - 1) // 2
        if needed > room:
            raise Void(
                f"{point.streams} such contexts need {needed} KV blocks, and a node that serves two lanes has {room} "
                "for each: give more --kv-cache-memory-bytes or fewer --resume-streams"
            )

    def _requests(self) -> list[Request]:
        tokens = min(MOST_TOKENS, self._plan.recipe.max_model_len - self._point.context - 1)
        requests = []
        for number in range(self._plan.streams):
            name = f"{self._plan.seed}/{self._point.replicated}/{self._point.number}/{self._point.context}/{number}"
            prompt = token_prompt(name, self._point.context)
            request = completion(name, "", tokens, PIPELINE)
            requests.append(msgspec.structs.replace(request, body=request.body | {"prompt": prompt}))
        return requests

    async def _send(self, request: Request) -> Stream:
        def listen(stream: Stream) -> None:
            self._streams[stream.name] = stream

        return await send(self._system.address, self._system.model, request, listen, STREAM_TIMEOUT_SECONDS)

    def _begun(self) -> bool:
        streams = self._streams.values()
        for stream in streams:
            if stream.failure is not None:
                raise Void(f"{stream.name}: {stream.failure}")
        return len(streams) == self._plan.streams and min(stream.tokens for stream in streams) >= EARLIEST_TOKEN

    def _caught_up(self) -> bool:
        self._require_running()
        lag = lag_tokens(self._watcher.latest or {"replication": ()}, PIPELINE, self._stage)
        return lag is not None and lag < self._plan.streams * self._cache.block_size

    def _require_running(self) -> None:
        for stream in self._streams.values():
            if stream.failure is not None or stream.done:
                raise Void(f"{stream.name} ended before the kill: {stream.failure or 'it had all of its tokens'}")

    def _note_load(self) -> None:
        point, streams = self._point, self._streams.values()
        self._live_tokens = [point.context + stream.tokens for stream in streams]
        point.live_tokens = sum(self._live_tokens)
        point.step_seconds = statistics.median(gap for stream in streams for gap in gaps(stream)[-EARLIEST_TOKEN:])

    async def _kill(self) -> Struck:
        assert self._watcher.latest is not None
        struck = strike(KillServing(PIPELINE, self._stage).aim(self._watcher.latest))
        await asyncio.to_thread(verify, struck)
        return struck

    def _record(self, unix_time: float) -> dict[str, Any] | None:
        self._system.require_alive()
        return recovery_after(self._watcher.latest or {"recoveries": []}, unix_time, PIPELINE, self._stage)

    def _went_on(self, counts: dict[str, int]) -> bool:
        for stream in self._streams.values():
            if stream.failure is not None:
                raise Void(f"{stream.name} failed after the kill: {stream.failure}")
        return all(s.done or s.tokens >= counts[name] + TOKENS_AFTER for name, s in self._streams.items())

    def _note_recovery(self, record: dict[str, Any], struck: Struck) -> None:
        point = self._point
        if record["state"] != "done" or record["lost_requests"]:
            raise Void(f"the recovery is recorded as {record['state']}, {record['lost_requests']} requests lost")
        if record["requests"] != point.streams:
            raise Void(f"the recovery carried {record['requests']} requests over, not {point.streams}")
        point.phases, point.recomputed_tokens = record["seconds"], record["recomputed_tokens"]
        pauses = [pause_after(stream, struck.at) for stream in self._streams.values()]
        point.longest_pause = max(pause.resumed_seconds for pause in pauses if pause is not None)
        if point.replicated:
            block_bytes = self._plan.recipe.kv_cache_memory_bytes // self._cache.blocks
            blocks = restored_blocks(self._live_tokens, point.recomputed_tokens, self._cache.block_size)
            point.restored_bytes = blocks * block_bytes
            point.copy_seconds = copy_seconds(block_bytes, blocks)


def restored_blocks(live_tokens: Sequence[int], recomputed_tokens: int, block_size: int) -> int:
    """Blocks that were put in place for streams of so many tokens: whole ones, the partly filled last ones included.

    What was computed again is taken to be the same number of tokens of each stream, its last ones.
    """
    lacking = recomputed_tokens // max(1, len(live_tokens))
    return sum(math.ceil(max(0, tokens - lacking) / block_size) for tokens in live_tokens)


def told(point: Resumption) -> str:
    """One line about a point."""
    phases = ", ".join(
        f"{name} {point.phases[name] * 1e3:.0f}" for name in ("relink", "restore", "recompute", "reissue")
    )
    return (
        f"  {point.streams} x {point.context} tokens: {point.phases['total'] * 1e3:.0f} ms ({phases}), "
        f"{point.recomputed_tokens} tokens recomputed, {point.restored_bytes / 2**20:.0f} MiB restored, which a plain "
        f"copy moves in {point.copy_seconds * 1e3:.0f} ms"
    )
