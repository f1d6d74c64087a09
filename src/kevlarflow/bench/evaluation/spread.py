"""How far runs of one cell lie apart: with other draws of the load, and in other runs of the suite. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec

from kevlarflow.bench.evaluation.comparison import PAPER, Row, measures

THROUGHPUT = "tokens/s"


class SceneSpread(msgspec.Struct, frozen=True):
    """Runs of one system in one setting, at one rate, under one fault script."""

    scene: str
    """A cell's name without its seed."""
    runs: int
    ranges: dict[str, tuple[float, float]]
    """Least and most, by the paper's names and `THROUGHPUT`; those that every run has."""


def spreads(found: Sequence[Row]) -> Iterator[SceneSpread]:
    """Every scene that was run more than once."""
    scenes: dict[tuple[str, float], list[Row]] = {}
    for row in found:
        if row.void is None:
            scenes.setdefault((row.cell.name.rpartition(".")[0], row.rate), []).append(row)
    for (scene, _), rows in sorted(scenes.items()):
        if len(rows) > 1:
            yield SceneSpread(scene, len(rows), dict(_ranges(rows)))


def _ranges(rows: Sequence[Row]) -> Iterator[tuple[str, tuple[float, float]]]:
    columns = zip(*((*measures(row), row.tokens_per_second) for row in rows), strict=True)
    for name, values in zip((*PAPER, THROUGHPUT), columns, strict=True):
        if all(map(math.isfinite, values)):
            yield name, (min(values), max(values))


def half_width(low: float, high: float) -> float:
    """Half of a range, as a share of its middle."""
    return (high - low) / (high + low) if high + low else 0.0
