"""One cell: start the system, warm it up, send the load, strike, wait for the last stream, stop, judge.

The harness judges itself as well. A fault that cannot be seen in /proc, a system that is never ready, too many steps
that overran their emulated time, processes left running: each makes the cell void, with the reason.
"""

from __future__ import annotations

import asyncio
import datetime
import math
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kevlarflow.bench.evaluation.cells import SETTINGS, Cell, Strike, conditions, strikes
from kevlarflow.bench.evaluation.contenders import Contender, make
from kevlarflow.bench.evaluation.emulating import step_complaint, step_counts
from kevlarflow.bench.evaluation.outcome import (
    CellResult,
    LifeRecord,
    StrikeRecord,
    arrivals,
    first_token_after,
    record,
)
from kevlarflow.bench.evaluation.workload import Planned, Workload, plan, request_of
from kevlarflow.bench.experiment import Say, Void, require_whole
from kevlarflow.bench.load import closed_loop, open_loop
from kevlarflow.bench.machine import CpuMeter, describe
from kevlarflow.bench.prompts import clients
from kevlarflow.bench.streams import Stream
from kevlarflow.bench.systems import SystemFailed
from kevlarflow.errors import KevlarFlowError
from kevlarflow.faults import FaultDidNotHappen, strike, verify

WARM_UP_STREAMS = 4
WARM_UP_TOKENS = 8
DRAIN_SECONDS = 90.0
"""A stream may take as long as the load, and so much more: a queue is no failure."""
SETTLE_SECONDS = 60.0
"""After the load, how long a restarted server may take to make its first token."""
POLL_SECONDS = 0.2
ERROR = "error.txt"
STREAMS = "streams.json"
"""Beside the logs: every stream with the arrival of each of its tokens."""

MakeContender = Callable[[Cell, Path], Contender]


def contender(cell: Cell, folder: Path) -> Contender:
    """The system that a cell names."""
    return make(cell.system, SETTINGS[cell.setting], folder)


def run(
    cell: Cell, workload: Workload, folder: Path, say: Say, make_contender: MakeContender = contender
) -> CellResult:
    """Run a cell; whatever goes wrong with it is its `void`. Logs and raw counts go to `folder`."""
    began = time.monotonic()
    result = CellResult(
        cell,
        begun=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=(here := describe()),
        requests_per_second=workload.requests_per_second,
        load_seconds=workload.seconds,
    )
    system: Contender | None = None
    try:
        requests = plan(workload)
        result.load = msgspec.structs.replace(workload, trace=Path(workload.trace).name)
        result.conditions = conditions(cell, requests, here)
        system = make_contender(cell, folder)
        system.start()
        result.ready_seconds = system.wait_ready()
        say(f"  ready in {result.ready_seconds:.1f} s; {len(requests)} requests in {workload.seconds:.0f} s")
        streams = asyncio.run(_measure(cell, workload, requests, system, result, say))
        (folder / STREAMS).write_bytes(msgspec.json.encode(streams))
    except Exception as error:  # The other cells have their turn all the same.
        result.void = _told(error, folder)
    finally:
        if system is not None:
            _stop(system, result, folder)
    result.steps = step_counts(folder)
    profile = SETTINGS[cell.setting].profile
    emulated = profile.stages if profile is not None else 0
    result.void = result.void or step_complaint(result.steps, emulated) or _leftover_complaint(result)
    result.seconds = time.monotonic() - began
    return result


def _stop(system: Contender, result: CellResult, folder: Path) -> None:
    """Whatever happens here, what was measured before is kept."""
    try:
        result.leftovers = system.stop()
    except Exception as error:
        result.void = result.void or _told(error, folder)


def _told(error: Exception, folder: Path) -> str:
    """What went wrong, in a line; what nobody has foreseen is written down whole."""
    if isinstance(error, (KevlarFlowError, Void, OSError)):
        return str(error)
    (folder / ERROR).write_text("".join(traceback.format_exception(error)))
    return f"{type(error).__name__}: {error} (see {folder / ERROR})"


def _leftover_complaint(result: CellResult) -> str | None:
    return f"it left {len(result.leftovers)} processes running" if result.leftovers else None


async def _measure(
    cell: Cell, workload: Workload, requests: Sequence[Planned], system: Contender, result: CellResult, say: Say
) -> list[Stream]:
    pipelines = SETTINGS[cell.setting].recipe.pipelines
    require_whole(await _ask(system, "warm up", WARM_UP_TOKENS, pipelines), WARM_UP_TOKENS)
    meter = CpuMeter(lambda: [process.pid for process in system.processes()])
    meter.start()
    result.load_begun = begun = time.monotonic()
    sent = [
        request_of(each, str(workload.seed), number % pipelines if system.pins else None)
        for number, each in enumerate(requests)
    ]
    starts = [each.start_seconds for each in requests]
    load = asyncio.create_task(
        open_loop(system.address, system.model, sent, starts, timeout_seconds=workload.seconds + DRAIN_SECONDS)
    )
    script = asyncio.create_task(_strike(cell, system, begun, say))
    try:
        struck = await script
    except FaultDidNotHappen:
        load.cancel()
        raise
    try:
        streams, _ = await asyncio.gather(load, _until_restarted(system, begun + workload.seconds))
        system.require_alive()
    except SystemFailed as error:
        if not struck:
            raise
        # It did not survive the fault: that is a result.
        result.died = str(error)
    result.strangers = meter.strangers()
    _keep(result, requests, streams, struck, system, begun)
    return streams


async def _ask(system: Contender, seed: str, tokens: int, pipelines: int) -> list[Stream]:
    """A few streams at once, spread over the pipelines."""
    work = clients(seed, WARM_UP_STREAMS, 2, tokens, pipelines)
    if not system.pins:
        # A router hands vLLM's header on, to servers that have one pipeline each and refuse any other.
        work = [[msgspec.structs.replace(request, pipeline=None) for request in each] for each in work]
    return await closed_loop(system.address, system.model, work)


async def _strike(cell: Cell, system: Contender, begun: float, say: Say) -> list[StrikeRecord]:
    before = SETTINGS[cell.setting].before_seconds
    return [await _one(each, before + each.after_seconds, system, begun, say) for each in strikes(cell)]


async def _one(each: Strike, due: float, system: Contender, begun: float, say: Say) -> StrikeRecord:
    await asyncio.sleep(max(0.0, begun + due - time.monotonic()))
    target = await asyncio.to_thread(system.victim, each.pipeline, each.stage)
    struck = strike(target)
    seconds = await asyncio.to_thread(verify, struck)
    say(f"  {struck.at - begun:.1f} s: killed {target.name} (dead after {seconds * 1e3:.0f} ms)")
    return StrikeRecord(struck.at - begun, each.pipeline, each.stage, target.name)


async def _until_restarted(system: Contender, load_ends_at: float) -> None:
    """After the load, wait a while until what was restarted has made a token; nobody else asks for one any more."""
    await asyncio.sleep(max(0.0, load_ends_at - time.monotonic()))
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(life.first_token_at is None for life in system.lives()) and time.monotonic() < deadline:
        await _ask(system, "is it back", 1, 1)
        await asyncio.sleep(POLL_SECONDS)


def _keep(
    result: CellResult,
    requests: Sequence[Planned],
    streams: Sequence[Stream],
    struck: list[StrikeRecord],
    system: Contender,
    begun: float,
) -> None:
    result.requests = [record(each, stream, begun) for each, stream in zip(requests, streams, strict=True)]
    result.tokens_per_second = arrivals(streams, begun)
    whole = [stream for each, stream in zip(requests, streams, strict=True) if not stream.defect(each.output_tokens)]
    result.good_tokens_per_second = arrivals(whole, begun)
    result.lives = [
        LifeRecord(
            life.server,
            life.ended_at - begun,
            life.ready_at and life.ready_at - begun,
            life.first_token_at and life.first_token_at - begun,
        )
        for life in system.lives()
    ]
    result.recoveries = system.recoveries()
    for each in struck:
        each.first_token_seconds = (
            first_token_after(streams, each.pipeline, begun + each.at)
            if system.pins
            else _restarted(result.lives, f"stock-{each.pipeline}", each.at)
        )
    result.strikes = struck


def _restarted(lives: Sequence[LifeRecord], server: str, fault_at: float) -> float | None:
    """Seconds from the fault to the first token of the server that was hit, as it counts its tokens itself."""
    first = [life.first_token for life in lives if life.server == server and life.ended >= fault_at]
    seconds = min((each - fault_at for each in first if each is not None), default=math.nan)
    return None if math.isnan(seconds) else seconds
