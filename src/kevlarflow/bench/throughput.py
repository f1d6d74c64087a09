"""No failure: what does KevlarFlow cost while nothing goes wrong?

In each round each system is started afresh, warmed up, and given the same closed loops: the same prompts, the same
number of tokens, at several numbers of streams. Streams are pinned to pipelines (vLLM's own header), so that both are
balanced alike. The systems take turns, and what counts is the ratio within a round.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import msgspec

from kevlarflow.bench.experiment import Say, Void, require_whole, running, turns, whole_rounds
from kevlarflow.bench.load import closed_loop
from kevlarflow.bench.machine import CpuMeter, wait_quiet
from kevlarflow.bench.measure import summarize
from kevlarflow.bench.prompts import clients
from kevlarflow.bench.recipes import NAMES, Recipe, make, own_caches
from kevlarflow.bench.results import Load, Round, Throughput
from kevlarflow.bench.systems import System, SystemFailed

WARM_UP_TOKENS = 16
ATTEMPTS = 3
DISTURBED_SHARE = 0.1
"""A load during which others used more than this share of the machine is measured again."""


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    recipe: Recipe
    rounds: int = 3
    streams: tuple[int, ...] = (1, 4, 16)
    tokens: int = 128
    """Output tokens of a request."""
    systems: tuple[str, ...] = NAMES
    seed: int = 0
    patience_seconds: float = 60.0
    """How long a load waits for others to leave the machine alone."""


def run(plan: Plan, result: Throughput, folder: Path, say: Say) -> None:
    """Run the rounds that `result` lacks and add them; what cannot be measured is void and said so."""
    whole = whole_rounds(((each.number, each.system, _is_good(plan, each)) for each in result.rounds), plan.systems)
    result.attempts += [
        f"round {each.number}, {each.system}: void: {each.void}"
        for each in result.rounds
        if each.number not in whole and each.void is not None
    ]
    result.rounds[:] = [each for each in result.rounds if each.number in whole]
    for number, name in turns(plan.rounds, plan.systems):
        if number in whole:
            continue
        this = Round(number, name)
        result.rounds.append(this)
        say(f"round {number} of {plan.rounds}: {name} starts")
        try:
            _round(plan, this, make(name, plan.recipe, folder, own_caches(folder, name)), say)
        except (SystemFailed, Void) as error:
            this.void = str(error)
            say(f"round {number}: {name}: void: {error}")


def _is_good(plan: Plan, this: Round) -> bool:
    return this.void is None and [load.summary.streams for load in this.loads] == list(plan.streams)


def _round(plan: Plan, this: Round, system: System, say: Say) -> None:
    with running(system, this.leftovers) as ready_seconds:
        this.ready_seconds = ready_seconds
        say(f"  ready in {ready_seconds:.1f} s; warming up")
        for streams in plan.streams:
            _load(plan, system, f"warm/{this.number}", streams, 1, WARM_UP_TOKENS)
        for streams in plan.streams:
            load = _quietest(plan, system, this.number, streams)
            this.loads.append(load)
            told = load.summary
            say(
                f"  {streams:>2} streams: {told.tokens_per_second:6.1f} tokens/s, TTFT {told.ttft_p50 * 1e3:.0f} ms, "
                f"TPOT {told.tpot_p50 * 1e3:.1f} ms (others used {load.strangers:.0%} of the machine)"
            )
            system.require_alive()


def _quietest(plan: Plan, system: System, number: int, streams: int) -> Load:
    """Measure a load; again, if others disturbed it, with other prompts. The least disturbed attempt counts."""
    attempts: list[Load] = []
    while len(attempts) < ATTEMPTS and all(load.strangers > DISTURBED_SHARE for load in attempts):
        seed = f"{number}/{len(attempts)}"
        attempts.append(_load(plan, system, seed, streams, requests_each(streams), plan.tokens))
    return min(attempts, key=lambda load: load.strangers)


def _load(plan: Plan, system: System, seed: str, streams: int, requests: int, tokens: int) -> Load:
    work = clients(f"{plan.seed}/{seed}/{streams}", streams, requests, tokens, plan.recipe.pipelines)
    meter = CpuMeter(lambda: [process.pid for process in system.processes()])
    asyncio.run(wait_quiet(meter, plan.patience_seconds))
    meter.start()
    recorded = asyncio.run(closed_loop(system.address, system.model, work))
    strangers = meter.strangers()
    require_whole(recorded, tokens)
    return Load(summarize(recorded, streams), strangers)


def requests_each(streams: int) -> int:
    """Requests of a client: more when there are few, so that every load lasts long enough to mean something."""
    return max(2, 4 - int(math.log2(streams)) // 2)
