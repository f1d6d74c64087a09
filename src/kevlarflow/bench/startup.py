"""Ready: from the command to the first 200 of ``/health``, with the model on the disk.

Each system has folders of its own for compiled code, which are emptied for a cold start and kept for the warm one that
follows. Health can be claimed, so that every start is followed by a first request, which has to succeed.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
from pathlib import Path

import msgspec

from kevlarflow.bench.experiment import Say, Void, require_whole, running, turns, whole_rounds
from kevlarflow.bench.machine import CpuMeter, wait_quiet
from kevlarflow.bench.measure import time_to_first_token
from kevlarflow.bench.prompts import passage
from kevlarflow.bench.recipes import NAMES, Recipe, make, own_caches
from kevlarflow.bench.results import Start, Startup
from kevlarflow.bench.streams import completion, send
from kevlarflow.bench.systems import System, SystemFailed

COLD, WARM = "cold", "warm"
FIRST_TOKENS = 4


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    recipe: Recipe
    rounds: int = 2
    caches: tuple[str, ...] = (COLD, WARM)
    systems: tuple[str, ...] = NAMES
    patience_seconds: float = 60.0
    """How long a start waits for others to leave the machine alone."""


def run(plan: Plan, result: Startup, folder: Path, say: Say) -> None:
    """Run the starts that `result` lacks and add them; what cannot be measured is void and said so."""
    measured = ((each.number, (each.system, each.cache), _is_good(each)) for each in result.starts)
    whole = whole_rounds(measured, list(itertools.product(plan.systems, plan.caches)))
    result.attempts += [
        f"round {each.number}, {each.system}, {each.cache} caches: void: {each.void}"
        for each in result.starts
        if each.number not in whole and each.void is not None
    ]
    result.starts[:] = [each for each in result.starts if each.number in whole]
    for number, name in turns(plan.rounds, plan.systems):
        if number in whole:
            continue
        caches = own_caches(folder / "startup", name)
        for cache in plan.caches:
            if cache == COLD:
                shutil.rmtree(caches, ignore_errors=True)
            start = Start(number, name, cache)
            result.starts.append(start)
            try:
                _start(plan, make(name, plan.recipe, folder, caches), start)
                say(f"round {number} of {plan.rounds}: {name}, {cache} caches: ready in {start.ready_seconds:.1f} s")
            except (SystemFailed, Void) as error:
                start.void = str(error)
                say(f"round {number}: {name}, {cache} caches: void: {error}")


def _is_good(start: Start) -> bool:
    return start.void is None and start.ready_seconds is not None


def _start(plan: Plan, system: System, start: Start) -> None:
    meter = CpuMeter(lambda: [process.pid for process in system.processes()])
    asyncio.run(wait_quiet(meter, plan.patience_seconds))
    meter.start()
    with running(system, start.leftovers) as ready_seconds:
        start.ready_seconds = ready_seconds
        start.strangers = meter.strangers()
        request = completion("first request", passage(f"start {start.number}"), FIRST_TOKENS)
        stream = asyncio.run(send(system.address, system.model, request))
        require_whole([stream], FIRST_TOKENS)
        start.first_token_seconds = time_to_first_token(stream)
