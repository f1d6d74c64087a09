"""Many seeds on all cores, with progress, until one fails."""

from __future__ import annotations

import collections
import functools
import gc
import logging
import multiprocessing
import multiprocessing.pool
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kevlarflow.sim import fleet, plan
from kevlarflow.sim.shapes import shape_of
from kevlarflow.sim.world import World

SEEDS_AT_ONCE = 25
PROGRESS_SECONDS = 1.0


class Batch(NamedTuple):
    """What a process found in a few seeds."""

    seeds: int
    counts: collections.Counter[str]
    failed: int | None
    error: str


class Outcome(NamedTuple):
    """What all seeds came to. `failed` is the first seed that was seen to fail."""

    seeds: int
    seconds: float
    counts: collections.Counter[str]
    failed: int | None
    error: str


def run_alone(seed: int) -> collections.Counter[str]:
    """One run of a pipeline core alone."""
    world = World(seed, shape_of(seed))
    world.run()
    counts = {"losses": world.recoveries, "waits for a node": world.waits, "preemptions": world.scheduler.preemptions}
    return collections.Counter(counts)


def run_fleet(seed: int) -> collections.Counter[str]:
    """One run of a fleet."""
    return fleet.run(plan.draw(seed)).counts


def run_batch(seeds: range, *, alone: bool = False) -> Batch:
    """Run seeds one after another until one fails."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        return _run_all(seeds, alone=alone)
    finally:
        logging.disable(disabled)


def _run_all(seeds: range, *, alone: bool) -> Batch:
    counts: collections.Counter[str] = collections.Counter()
    for done, seed in enumerate(seeds):
        try:
            counts += run_alone(seed) if alone else run_fleet(seed)
        except Exception as error:
            return Batch(done + 1, counts, seed, f"{type(error).__name__}: {error}".splitlines()[0])
    return Batch(len(seeds), counts, None, "")


def run_many(
    seeds: range, processes: int, *, seconds: float = float("inf"), quiet: bool = False, alone: bool = False
) -> Outcome:
    """Run `seeds` in so many processes, until all are done, one fails, or so many seconds have passed.

    `alone`: a pipeline core alone in place of a fleet.
    """
    begun = time.monotonic()
    done, counts, said_at = 0, collections.Counter[str](), begun
    pieces = [seeds[first : first + SEEDS_AT_ONCE] for first in range(0, len(seeds), SEEDS_AT_ONCE)]
    with multiprocessing.get_context("fork").Pool(processes, _begin) as pool:
        for batch in _batches(pool, pieces, processes, functools.partial(run_batch, alone=alone)):
            done += batch.seeds
            counts += batch.counts
            now = time.monotonic()
            if batch.failed is not None:
                return Outcome(done, now - begun, counts, batch.failed, batch.error)
            if not quiet and now - said_at > PROGRESS_SECONDS:
                said_at = now
                _say(done, len(seeds), now - begun)
            if now - begun > seconds:
                break
    if not quiet and sys.stderr.isatty():
        print(file=sys.stderr)
    return Outcome(done, time.monotonic() - begun, counts, None, "")


def _begin() -> None:
    """In each process. Garbage of a run goes with it; to look for it all the time costs a tenth of the time."""
    # Ctrl-C is for the one who waits for these processes: it ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def _batches(
    pool: multiprocessing.pool.Pool, pieces: list[range], processes: int, run: Callable[[range], Batch]
) -> Iterator[Batch]:
    if processes > 1:
        yield from pool.imap_unordered(run, pieces)
    else:
        yield from map(run, pieces)


def _say(done: int, total: int, seconds: float) -> None:
    """Over the line before on a terminal; every so often elsewhere."""
    line = f"{done:,} of {total:,} schedules, {done / seconds:.0f} a second"
    if sys.stderr.isatty():
        print(f"\r{line}", end="", file=sys.stderr, flush=True)
    elif done % (100 * SEEDS_AT_ONCE) == 0:
        print(line, file=sys.stderr, flush=True)
