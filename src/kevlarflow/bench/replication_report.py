"""Tables and pictures of the experiments about replication, computed from their results alone."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from kevlarflow.bench.measure import ratios, spread
from kevlarflow.bench.replication_results import (
    CostLoad,
    ReplicationCost,
    Resume,
    Resumption,
    StandbyMemory,
    Transfers,
)
from kevlarflow.bench.table import NOTHING, Table, milliseconds, told_before, verdict

MIB = 2**20
PHASES = ("relink", "restore", "recompute", "reissue", "total")
WHOLE = ("total",)
PARTS = {
    "detecting and planning": ("detect", "plan"),
    "relinking and restoring": ("relink", "restore"),
    "computing again": ("recompute",),
    "issuing again": ("reissue",),
}
"""Whose seconds make up those of the whole recovery. Relinking and restoring overlap."""
MOST_COPIES = 1.5
LEAST_THROUGHPUT = 0.98
MOST_TPOT = 1.03
MOST_COPIED = 1.1


# ---- resume


def resume_table(result: Resume) -> Table:
    """Recovery time against the length of contexts, with and without replication."""
    rows = [_resume_row(result, point) for point in _typical(result)]
    headers = (
        "context", "replicas", *PHASES, "rounds, ms", "client, longest pause", "recomputed", "restored", "copy",
        "above shortest", "above / copy", "step before",
    )  # fmt: skip
    streams = result.points[0].streams if result.points else 0
    return Table(f"Recovery time against context length, {streams} streams", headers, rows, _resume_remarks(result))


def _resume_row(result: Resume, point: Resumption) -> tuple[str, ...]:
    return (
        str(point.context),
        "on" if point.replicated else "off",
        *(milliseconds(point.phases[phase]) for phase in PHASES),
        _rounds(result, point),
        milliseconds(point.longest_pause),
        f"{point.recomputed_tokens:,.0f}",
        f"{point.restored_bytes / MIB:.0f} MiB" if point.replicated else NOTHING,
        milliseconds(point.copy_seconds) if point.replicated else NOTHING,
        _or_nothing(above(result, point, WHOLE), lambda seconds: f"{seconds * 1e3:+,.0f} ms"),
        _or_nothing(_in_copies(result, point), "{:.2f}".format),
        milliseconds(point.step_seconds),
    )


def _valid(result: Resume) -> list[Resumption]:
    return [point for point in result.points if point.void is None]


def _typical(result: Resume) -> list[Resumption]:
    """For each length, with and without replication, the median of every figure over the rounds."""
    rounds: dict[tuple[bool, int], list[Resumption]] = collections.defaultdict(list)
    for point in _valid(result):
        rounds[not point.replicated, point.context].append(point)
    return [_median(points) for _, points in sorted(rounds.items())]


def _median(points: Sequence[Resumption]) -> Resumption:
    phases = {phase: statistics.median(point.phases[phase] for point in points) for phase in points[0].phases}
    numbers = ("recomputed_tokens", "restored_bytes", "copy_seconds", "step_seconds", "longest_pause")
    medians = {name: statistics.median(getattr(point, name) for point in points) for name in numbers}
    return msgspec.structs.replace(points[0], phases=phases, **medians)


def _rounds(result: Resume, typical: Resumption) -> str:
    """How many there were, and how far apart their totals lie."""
    setting = (typical.context, typical.replicated)
    totals = [each.phases["total"] for each in _valid(result) if (each.context, each.replicated) == setting]
    return f"{len(totals)}: {min(totals) * 1e3:,.0f} to {max(totals) * 1e3:,.0f}" if len(totals) > 1 else "1"


def _shortest(result: Resume) -> Resumption | None:
    return min((each for each in _typical(result) if each.replicated), key=lambda each: each.context, default=None)


def above(result: Resume, point: Resumption, phases: Sequence[str]) -> float | None:
    """Seconds of these phases above those of the shortest contexts; None for those and without replication."""
    base = _shortest(result)
    if base is None or not point.replicated or point.context == base.context:
        return None
    return sum(point.phases[phase] - base.phases[phase] for phase in phases)


def _in_copies(result: Resume, point: Resumption, *, beside_a_step: bool = False) -> float | None:
    """What the whole recovery takes above that of the shortest contexts, in plain copies of the bytes restored.

    `beside_a_step`: without what an ordinary step takes longer than one of those, as measured before the kills. The
    step that was in flight has to be computed once more, and would have been computed without a failure as well.
    """
    seconds, base = above(result, point, WHOLE), _shortest(result)
    if seconds is None or base is None:
        return None
    if beside_a_step:
        seconds -= point.step_seconds - base.step_seconds
    return seconds / max(point.copy_seconds, 1e-9)


def _or_nothing(value: float | None, form: Callable[[float], str]) -> str:
    return NOTHING if value is None else form(value)


def _resume_remarks(result: Resume) -> list[str]:
    remarks = told_before(result.attempts)
    remarks += [
        f"{point.context} tokens, replication {'on' if point.replicated else 'off'}, round {point.number}: "
        f"void: {point.void}"
        for point in result.points
        if point.void is not None
    ]
    remarks += [f"not finished: {result.void}"] if result.void else []
    remarks += [f"Started with {result.flags}."] if result.flags else []
    for point in (each for each in _valid(result) if each.replicated):
        if point.recomputed_tokens >= point.most_recomputed + point.streams * result.stages:
            remarks.append(
                f"NOT REACHED: {point.context} tokens: {point.recomputed_tokens} tokens recomputed; less than "
                f"{point.most_recomputed + point.streams * result.stages} were required"
            )
    on = [point for point in _typical(result) if point.replicated]
    for what, beside_a_step in (("above / copy", False), ("the same beside the step that is issued again", True)):
        found = [_in_copies(result, point, beside_a_step=beside_a_step) for point in on]
        worst = max((ratio for ratio in found if ratio is not None), default=None)
        if worst is not None:
            remarks.append(
                f"Required: {what} at most {MOST_COPIES}; worst {worst:.2f}: {verdict(worst <= MOST_COPIES)}."
            )
    remarks += [parts for point in on if (parts := _parts(result, point))]
    remarks.append(
        "total and the phases before it: the cluster's own record. client, longest pause: what users see, from SIGKILL "
        "to the token that ended the longest wait of any stream, of the waits that began at most one ordinary wait "
        "after it."
    )
    remarks.append(
        "copy: a plain copy of the bytes restored, block by block, in the same run. above shortest: time of the whole "
        "recovery, above that of the shortest contexts. What is computed and issued again runs the model, and each of "
        "its tokens reads all KV before it: so does an ordinary step, whose length before the kill is shown."
    )
    return remarks


def _parts(result: Resume, point: Resumption) -> str:
    """Where the time above that of the shortest contexts goes; empty where there is none."""
    base, total = _shortest(result), above(result, point, WHOLE)
    if base is None or total is None:
        return ""
    seconds = {name: above(result, point, phases) or 0.0 for name, phases in PARTS.items()}
    parts = ", ".join(f"{each * 1e3:+,.0f} {name}" for name, each in seconds.items())
    copies = seconds["relinking and restoring"] / max(point.copy_seconds, 1e-9)
    step = point.step_seconds - base.step_seconds
    return (
        f"{point.context} tokens, ms above {base.context} tokens: {total * 1e3:+,.0f}, of which {parts}. Relinking and "
        f"restoring alone: {copies:.2f} copies. An ordinary step takes {step * 1e3:+,.0f} ms."
    )


# ---- cost


def cost_table(result: ReplicationCost) -> Table:
    """Replication on and off under the same load."""
    on, off = _by_round(result, True), _by_round(result, False)
    numbers = sorted(on.keys() & off.keys())
    rows: list[tuple[str, ...]] = []
    for label, field, scale, form in (
        ("throughput", "tokens_per_second", 1.0, "{:.1f} tokens/s"),
        ("TPOT p50", "tpot_p50", 1e3, "{:.1f} ms"),
        ("TPOT p99", "tpot_p99", 1e3, "{:.1f} ms"),
        ("TTFT p50", "ttft_p50", 1e3, "{:.0f} ms"),
    ):
        values = [[getattr(side[number].summary, field) for number in numbers] for side in (off, on)]
        if not numbers:
            break
        cells = (form.format(spread([value * scale for value in each]).median) for each in values)
        middle = spread(ratios(values[1], values[0]))
        rows.append((label, *cells, f"{middle.median:.3f} ({middle.lowest:.3f} to {middle.highest:.3f})"))
    headers = ("", "replication off", "replication on", "ratio")
    title = f"Cost of replication without a failure, {len(numbers)} rounds"
    return Table(title, headers, rows, _cost_remarks(result, [on[n] for n in numbers], [off[n] for n in numbers]))


def _by_round(result: ReplicationCost, replicated: bool) -> dict[int, CostLoad]:
    return {
        load.number: load
        for load in result.loads
        if load.replicated == replicated and load.void is None and load.summary is not None
    }


def _cost_remarks(result: ReplicationCost, on: Sequence[CostLoad], off: Sequence[CostLoad]) -> list[str]:
    remarks = told_before(result.attempts)
    remarks += [f"round {load.number}: void: {load.void}" for load in result.loads if load.void is not None]
    remarks += [f"not finished: {result.void}"] if result.void else []
    tokens = sum(load.computed_tokens for load in on)
    if not tokens or not result.kv_bytes_per_token:
        return remarks
    whole = sum(load.full_bytes for load in on) / tokens / result.kv_bytes_per_token
    parts = sum(load.partial_bytes for load in on) / tokens / result.kv_bytes_per_token
    remarks.append(
        f"For each token whose KV was written (prompts included), {whole:.3f} of its {result.kv_bytes_per_token:,.0f} "
        f"bytes were copied in full blocks, and {parts:.3f} in partly filled ones."
    )
    speeds = [(a.summary, b.summary) for a, b in zip(on, off, strict=True) if a.summary and b.summary]
    throughput = spread([a.tokens_per_second / b.tokens_per_second for a, b in speeds]).median
    tpot = spread([a.tpot_p99 / b.tpot_p99 for a, b in speeds]).median
    for what, value, bound, is_reached in (
        ("throughput", throughput, f"at least {LEAST_THROUGHPUT}", throughput >= LEAST_THROUGHPUT),
        ("p99 TPOT", tpot, f"at most {MOST_TPOT}", tpot <= MOST_TPOT),
        ("bytes in full blocks", whole, f"at most {MOST_COPIED}", whole <= MOST_COPIED),
    ):
        remarks.append(f"Required: {what} {bound}; {value:.3f}: {verdict(is_reached)}.")
    strangers = max(load.strangers for load in (*on, *off))
    remarks.append(f"Others used at most {strangers:.0%} of the machine during a load.")
    return remarks


# ---- memory


def memory_table(result: StandbyMemory) -> Table:
    """What the standby and the nodes took over time."""
    rows: list[tuple[str, ...]] = []
    if result.samples:
        most = max(sample.standby_bytes for sample in result.samples)
        first, last = result.samples[0], result.samples[-1]
        blocks = {sample.kv_blocks for sample in result.samples}
        rows = [
            ("fullest standby, most", f"{most / MIB:.1f} MiB", f"limit {result.limit_bytes / MIB:.1f} MiB"),
            ("largest node, first and last", f"{first.node_bytes / MIB:.0f} MiB", f"{last.node_bytes / MIB:.0f} MiB"),
            ("KV blocks of the scheduler", str(min(blocks)), f"stock {result.stock_kv_blocks}"),
            ("requests served", str(result.requests), f"in {last.seconds / 60:.1f} minutes"),
        ]
    return Table("Memory of replication under load", ("", "", ""), rows, list(_memory_remarks(result)))


def _memory_remarks(result: StandbyMemory) -> Iterator[str]:
    yield from told_before(result.attempts)
    if result.void:
        yield f"void: {result.void}"
    if not result.samples:
        return
    over = sum(sample.standby_bytes > result.limit_bytes for sample in result.samples)
    fewer = sum(sample.kv_blocks != result.stock_kv_blocks for sample in result.samples)
    looks = len(result.samples)
    yield f"Required: the standby within its flag; {over} of {looks} looks above it: {verdict(not over)}."
    yield f"Required: as many KV blocks as stock; {fewer} of {looks} looks differ: {verdict(not fewer)}."


# ---- transfer


def transfer_table(result: Transfers) -> Table:
    """Each transfer at each size."""
    rows: list[tuple[str, ...]] = [
        (
            each.transfer,
            f"{each.size / 1024:,.0f} KiB",
            f"{each.round_trip_p50 * 1e6:,.0f} us",
            f"{each.round_trip_p99 * 1e6:,.0f} us",
            f"{each.bytes_per_second / 2**30:.2f} GiB/s",
            f"{each.cpu_seconds * 1e6:,.0f} us",
        )
        for each in result.times
    ]
    headers = ("transfer", "copy", "round trip p50", "p99", "bulk", "CPU, both ends")
    notes = [*result.notes, *([result.void] if result.void else [])]
    return Table("Ways to move a copy to another process", headers, rows, notes)


# ---- picture


def draw_resume(result: Resume, path: Path) -> bool:
    """Draw recovery time against context length as a PNG; False when there is nothing to draw (with)."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    points = _valid(result)
    if not points:
        return False
    figure, (total, restore) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    typical = _typical(result)
    for replicated, label in ((True, "with replication"), (False, "without")):
        chosen = [p for p in typical if p.replicated == replicated]
        total.plot([p.context for p in chosen], [p.phases["total"] for p in chosen], "o-", label=label)
    total.plot([p.context for p in points], [p.phases["total"] for p in points], "k.", markersize=3)
    on = [p for p in typical if p.replicated]
    restore.plot([p.context for p in on], [p.phases["restore"] * 1e3 for p in on], "o-", label="restore phase")
    restore.plot([p.context for p in on], [p.copy_seconds * 1e3 for p in on], "s--", label="plain copy of the bytes")
    for axes, title, unit in ((total, "Recovery, whole", "seconds"), (restore, "Copies put in place", "milliseconds")):
        axes.set(title=title, xlabel=f"tokens of each of {points[0].streams} contexts", ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
