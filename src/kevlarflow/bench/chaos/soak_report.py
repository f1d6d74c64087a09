"""A soak, written down: JSON with everything in it, Markdown for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from kevlarflow.bench.chaos.judge import Verdict
from kevlarflow.bench.chaos.matrix import cases
from kevlarflow.bench.chaos.soak import Round, Soak, judge
from kevlarflow.bench.measure import percentile


def save(soak: Soak, folder: Path, stem: str) -> list[Path]:
    """Write both files, over those of an earlier round; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, text = folder / f"{stem}.json", folder / f"{stem}.md"
    data.write_bytes(msgspec.json.format(msgspec.json.encode(soak), indent=1) + b"\n")
    text.write_text(markdown(soak), encoding="utf-8")
    return [data, text]


def markdown(soak: Soak) -> str:
    """The report for people."""
    return "\n".join(_lines(soak)) + "\n"


def _lines(soak: Soak) -> Iterator[str]:
    plan, machine = soak.plan, soak.machine
    yield f"# Soak: {plan.faults} rounds of faults, one after the other\n"
    yield f"`{soak.command}`, seed {plan.seed}, {plan.cluster.pipelines} pipelines of {plan.cluster.stages} stages, "
    yield f"{plan.load.streams} streams of {', '.join(plan.load.kinds)}, {plan.cluster.dtype}."
    if machine is not None:
        yield f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB; vLLM {machine.vllm}."
    yield "\nEach round deals the next case of the matrix of faults, stages and phases under load, compares every text"
    yield "with a run without faults, and waits until each pipeline is whole again. Each fault is proved from `/proc`."
    yield "\n## Checks\n\n| check | wanted | found | |\n|---|---|---|---|"
    yield from (_row(verdict) for verdict in judge(soak))
    requests, tokens = (sum(getattr(each, what) for each in soak.rounds) for what in ("requests", "tokens"))
    yield f"\n{requests:,} requests, {tokens:,} tokens."
    yield from _matrix(soak)
    yield "\n## Survivors\n\nThe second quarter of the life of each process that was there at the end, and the last.\n"
    yield "| process | rounds | holds |\n|---|---|---|"
    yield from (f"| {trend.process} | {trend.samples} | {trend.told().partition(': ')[2]} |" for trend in soak.trends)
    void = [each for each in soak.rounds if each.void]
    if void:
        yield "\n## Void rounds\n"
        yield from (f"- {_void(each)}" for each in void)


def _void(each: Round) -> str:
    return f"round {each.number}, {each.what}: {each.void}" + (f" ({each.harm})" if each.has_harmed else "")


def _matrix(soak: Soak) -> Iterator[str]:
    yield "\n## Cases\n\nA case that strikes in a phase of a recovery begins with a crash of the stage's node."
    yield "Seconds: the middle one, and the longest.\n"
    yield "| case | rounds | lost | different | detected | largest gap | whole again |\n|---|---|---|---|---|---|---|"
    for case in cases(soak.plan.cluster.stages):
        if rounds := [each for each in soak.done if each.case == case]:
            yield _line(case.name, rounds)
    if soak.done:
        yield _line("all", soak.done)


def _line(name: str, rounds: Sequence[Round]) -> str:
    lost, different = sum(len(each.lost) for each in rounds), sum(len(each.different) for each in rounds)
    times = (
        [seconds for each in rounds for seconds in each.detected_seconds],
        [each.largest_gap_seconds for each in rounds],
        [each.lane_back_seconds for each in rounds],
    )
    return f"| {name} | {len(rounds)} | {lost} | {different} | {' | '.join(map(_spread, times))} |"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{percentile(known, 0.5):.2f}, {max(known):.2f}" if known else ""


def _row(verdict: Verdict) -> str:
    return f"| {verdict.check} | {verdict.wanted} | {verdict.found} | {verdict.mark} |"
