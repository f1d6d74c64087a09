"""Tables of the experiment about detection, computed from its results alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kevlarflow.bench.detection_results import KINDS, Detection, Fault, Kind, Stretch
from kevlarflow.bench.measure import percentile
from kevlarflow.bench.table import NOTHING, Table, milliseconds, verdict

REQUIRED_SECONDS: dict[Kind, float] = {"crash": 0.3, "hang": 1.0}
"""Within which so many of a hundred have to be noticed: 99."""
ENOUGH_FOR_P99 = 100
"""With fewer values the 99th percentile is a guess, and the worst one is shown in its place."""


def alarms_table(result: Detection, cores: int) -> Table:
    """Each stretch of each life: what the cluster did, what it held against its processes, whose the machine was."""
    rows: list[tuple[str, ...]] = []
    for number, life in enumerate(result.lives, 1):
        for name, stretch in (("no fault", life.calm), ("faults", life.struck)):
            if stretch.seconds:
                rows.append((f"{number}, {name}", *_stretch_cells(stretch, cores)))
    headers = (
        "cluster", "minutes", "alarms", "suspected", "requests", "long", "lost", "differ", "tokens/s", "hogs", "others",
        "idle",
    )  # fmt: skip
    title = (
        f"False alarms under {result.clients} clients, {result.long_clients} of them with prompts of "
        f"{result.long_tokens:,} tokens, and {result.hogs} hogs"
    )
    return Table(title, headers, rows, list(_alarm_remarks(result)))


def _stretch_cells(stretch: Stretch, cores: int) -> Iterator[str]:
    yield f"{stretch.seconds / 60:.1f}"
    yield from (str(len(each)) for each in (stretch.alarms, stretch.suspicions))
    yield from (str(each) for each in (stretch.requests, stretch.long_requests))
    yield from (str(len(each)) for each in (stretch.lost, stretch.different))
    yield f"{stretch.tokens / stretch.seconds:.1f}"
    for used in (stretch.hog_seconds, stretch.other_seconds, stretch.idle_seconds):
        yield f"{used / stretch.seconds / cores:.0%}"


def _alarm_remarks(result: Detection) -> Iterator[str]:
    if result.flags:
        yield f"Started with {result.flags}, and the default timeouts."
    for number, life in enumerate(result.lives, 1):
        if life.void is not None:
            unknown = "" if life.has_journal else "; its minutes do not count"
            yield f"cluster {number} ended before its time: {life.void}{unknown}"
        for name, stretch in (("no fault", life.calm), ("faults", life.struck)):
            for what, found in (
                ("false alarm", stretch.alarms),
                ("suspicion", stretch.suspicions),
                ("lost", stretch.lost),
                ("differs", stretch.different),
            ):
                yield from (f"{what} (cluster {number}, {name}): {each}" for each in found)
    count, minutes = sum(len(life.calm.alarms) for life in result.lives), result.calm_seconds() / 60
    is_reached = count == 0 and minutes >= result.minutes
    yield (
        f"Required: no false alarm in {result.minutes:g} minutes without a fault; {count} in {minutes:.1f}: "
        f"{verdict(is_reached)}."
    )
    yield (
        "alarms: nodes, engines or controllers that were given up, complained about or judged slow, and recoveries, "
        "though nobody had hurt them. suspected: what costs nothing, and is how an alarm begins: a node that was "
        "silent for 1 s, stopped, stuck in a step, or deaf, and an engine that did not report for 2 s. differ: answers "
        "that are not the first one to the same prompt. hogs, others, idle: shares of the whole machine; others are "
        "neither the cluster, nor hogs, nor the harness."
    )


def detection_table(result: Detection) -> Table:
    """How soon faults were noticed."""
    rows: list[tuple[str, ...]] = []
    remarks = []
    for kind in KINDS:
        faults = [fault for fault in result.faults if fault.kind == kind]
        if not faults:
            continue
        name, value = _slow_end(faults)
        required = REQUIRED_SECONDS[kind]
        known = [fault.detected_seconds for fault in faults if fault.detected_seconds is not None]
        middle = milliseconds(percentile(known, 0.5)) if known else NOTHING
        rows.append((kind, str(len(faults)), middle, "never" if value is None else milliseconds(value), name))
        remarks.append(
            f"Required: {kind} noticed in under {milliseconds(required)} at p99; {name} "
            f"{'never' if value is None else milliseconds(value)}: {verdict(value is not None and value < required)}."
        )
    remarks.append("From the signal (SIGKILL, or SIGSTOP for good) to the controller's record of the loss.")
    return Table("Detection under the same load", ("fault", "faults", "p50", "slow end", "which is"), rows, remarks)


def _slow_end(faults: Sequence[Fault]) -> tuple[str, float | None]:
    """Its name and its value; no value when a fault was never noticed."""
    known = [fault.detected_seconds for fault in faults if fault.detected_seconds is not None]
    is_p99 = len(faults) >= ENOUGH_FOR_P99
    name = "p99" if is_p99 else f"worst of {len(faults)}"
    if len(known) < len(faults):
        return name, None
    return name, percentile(known, 0.99) if is_p99 else max(known)


def faults_table(result: Detection) -> Table:
    """One row for each fault."""
    rows: list[tuple[str, ...]] = []
    remarks = []
    for number, life in enumerate(result.lives, 1):
        for fault in life.faults:
            if fault.void is not None:
                remarks.append(f"cluster {number}, fault {fault.number}: void: {fault.void}")
                continue
            noticed = "never" if fault.detected_seconds is None else milliseconds(fault.detected_seconds)
            back = NOTHING if fault.back_seconds is None else f"{fault.back_seconds:.1f} s"
            rows.append((f"{number}/{fault.number}", fault.kind, fault.node, fault.proof, noticed, back))
    return Table("Faults", ("fault", "kind", "node", "proof", "noticed after", "lane back"), rows, remarks)
