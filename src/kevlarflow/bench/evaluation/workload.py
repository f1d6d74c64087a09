"""Open-loop load: when each request comes, and how long its prompt and its answer are.

Lengths are those of requests that people have sent: drawn from a sample of Azure's conversation trace, scaled to the
model's window. Arrivals are a Poisson process, or the trace's own with its time stretched to the rate.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from kevlarflow.bench.prompts import passage
from kevlarflow.bench.streams import Request, completion
from kevlarflow.errors import UsageError

SAMPLE = Path(__file__).parent / "azure_conv_sample.csv"
COLUMNS = ("seconds", "context_tokens", "generated_tokens")
POISSON, TRACE = "poisson", "trace"
TOKENS_OF_A_SENTENCE = 16
FEWEST_OUTPUT_TOKENS = 4
TRACED_SHARE = 0.9
"""So much of a load's time a trace has to fill."""


class TraceRow(NamedTuple):
    """One request of the trace."""

    seconds: float
    """Since the first one."""
    context_tokens: int
    generated_tokens: int


class Workload(msgspec.Struct, frozen=True):
    """A load before it is drawn."""

    requests_per_second: float
    seconds: float
    """Requests come for so long."""
    length_scale: float = 1 / 8
    """Lengths of the trace are multiplied by this."""
    longest_prompt: int = 1024
    longest_output: int = 128
    arrivals: str = POISSON
    seed: int = 0
    trace: str = str(SAMPLE)


class Planned(msgspec.Struct, frozen=True):
    """One request of a load."""

    name: str
    start_seconds: float
    """From the beginning of the load."""
    prompt_tokens: int
    """About; prompts are whole sentences."""
    output_tokens: int


def read_trace(path: Path) -> list[TraceRow]:
    """The requests of a sample. Raises `UsageError` when it is missing, empty or something else."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        found = csv.DictReader(lines)
        rows = [TraceRow(float(r[COLUMNS[0]]), int(r[COLUMNS[1]]), int(r[COLUMNS[2]])) for r in found]
    except OSError as error:
        raise UsageError(f"the trace {path} cannot be read ({error.strerror}): name another with --trace") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the trace {path} needs the columns {', '.join(COLUMNS)}, all of them numbers") from error
    if not rows:
        raise UsageError(f"the trace {path} holds no request: name another with --trace")
    return rows


def require_rate(requests_per_second: float) -> None:
    """Raises `UsageError` for a rate that sends nothing, or never comes to an end."""
    if not requests_per_second > 0:
        raise UsageError(f"a rate of {requests_per_second:g} requests/s sends nothing: use more than 0")
    if requests_per_second == float("inf"):
        raise UsageError("a rate of inf requests/s never ends: use a number")


def plan(workload: Workload) -> list[Planned]:
    """The requests of a load, the same for the same `Workload`."""
    require_rate(workload.requests_per_second)
    if workload.arrivals not in (POISSON, TRACE):
        raise UsageError(f"there are no {workload.arrivals!r} arrivals: use {POISSON} or {TRACE}")
    trace = read_trace(Path(workload.trace))
    chance = random.Random(workload.seed)
    starts = list(_poisson(workload, chance) if workload.arrivals == POISSON else _as_traced(workload, trace))
    if not starts:
        rate = f"{workload.requests_per_second:g} requests/s"
        raise UsageError(f"at {rate} no request comes within {workload.seconds:g} s: use a higher rate")
    return [
        _planned(workload, number, start, chance.choice(trace) if workload.arrivals == POISSON else trace[number])
        for number, start in enumerate(starts)
    ]


def _poisson(workload: Workload, chance: random.Random) -> Iterator[float]:
    now = chance.expovariate(workload.requests_per_second)
    while now < workload.seconds:
        yield now
        now += chance.expovariate(workload.requests_per_second)


def _as_traced(workload: Workload, trace: Sequence[TraceRow]) -> Iterator[float]:
    own_rate = (len(trace) - 1) / max(trace[-1].seconds - trace[0].seconds, 1e-9)
    stretch = own_rate / workload.requests_per_second
    lasts = (trace[-1].seconds - trace[0].seconds) * stretch
    if lasts < TRACED_SHARE * workload.seconds:
        raise UsageError(
            f"the trace {workload.trace} is over after {lasts:.0f} of {workload.seconds:.0f} s at "
            f"{workload.requests_per_second:g} requests/s: use a lower rate or name a longer one with --trace"
        )
    for row in trace:
        if (start := (row.seconds - trace[0].seconds) * stretch) >= workload.seconds:
            return
        yield start


def _planned(workload: Workload, number: int, start: float, row: TraceRow) -> Planned:
    prompt = round(row.context_tokens * workload.length_scale)
    output = round(row.generated_tokens * workload.length_scale)
    return Planned(
        name=f"request {number}",
        start_seconds=start,
        prompt_tokens=min(max(prompt, TOKENS_OF_A_SENTENCE), workload.longest_prompt),
        output_tokens=min(max(output, FEWEST_OUTPUT_TOKENS), workload.longest_output),
    )


def request_of(planned: Planned, seed: str, pipeline: int | None) -> Request:
    """What is sent: greedy, exactly so many tokens, a prompt that begins as no other does."""
    sentences = max(1, round(planned.prompt_tokens / TOKENS_OF_A_SENTENCE))
    return completion(planned.name, passage(f"{seed}/{planned.name}", sentences), planned.output_tokens, pipeline)
