"""A soak, written down: JSON with everything in it, Markdown for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from kevlarflow.bench.chaos.judge import Verdict
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
    yield f"# Soak: {plan.faults} crashes, one after the other\n"
    yield f"`{soak.command}`, seed {plan.seed}, {plan.cluster.pipelines} pipelines of {plan.cluster.stages} stages, "
    yield f"{plan.load.streams} streams of {', '.join(plan.load.kinds)}, {plan.cluster.dtype}."
    if machine is not None:
        yield f"{machine.processor}, {machine.cores} cores, {machine.memory_gib} GiB; vLLM {machine.vllm}."
    yield "\nEach round kills a node under load, compares every text with a run without faults, and waits for rejoin."
    yield "\n## Checks\n\n| check | wanted | found | |\n|---|---|---|---|"
    yield from (_row(verdict) for verdict in judge(soak))
    yield f"\n{sum(each.requests for each in soak.done):,} requests, {sum(each.tokens for each in soak.done):,} tokens."
    yield "\n## Times\n\n| seconds | p50 | p99 | longest |\n|---|---|---|---|"
    for name, field in (
        ("detected", "detected_seconds"),
        ("largest gap", "largest_gap_seconds"),
        ("lane back", "lane_back_seconds"),
    ):
        yield from _times(name, field, soak.done)
    yield "\n## Survivors\n\nThe second quarter of the life of each process that was there at the end, and the last.\n"
    yield "| process | rounds | holds |\n|---|---|---|"
    yield from (f"| {trend.process} | {trend.samples} | {trend.told().partition(': ')[2]} |" for trend in soak.trends)
    void = [each for each in soak.rounds if each.void]
    if void:
        yield "\n## Void rounds\n"
        yield from (f"- round {each.number}, {each.what}: {each.void}" for each in void)


def _row(verdict: Verdict) -> str:
    return f"| {verdict.check} | {verdict.wanted} | {verdict.found} | {'holds' if verdict.holds else 'does not hold'} |"


def _times(name: str, field: str, rounds: list[Round]) -> Iterator[str]:
    values = [value for each in rounds if (value := getattr(each, field)) is not None]
    if values:
        yield f"| {name} | {percentile(values, 0.5):.3f} | {percentile(values, 0.99):.3f} | {max(values):.3f} |"
