"""Figures in the style of the paper, as PNG: TTFT around a failure, latency against rate, phases of a recovery."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kevlarflow.bench.evaluation.cells import KEVLARFLOW, NO_FAULT, REPLAY, STOCK, STOCK_DP, SYSTEMS, Cell
from kevlarflow.bench.evaluation.comparison import Row, emulation_note
from kevlarflow.bench.evaluation.outcome import CellResult
from kevlarflow.bench.measure import percentile
from kevlarflow.types import Phases

ROLLING_SECONDS = 10.0
COLOURS = {KEVLARFLOW: "#0b6e4f", REPLAY: "#6fb98f", STOCK: "#c8553d", STOCK_DP: "#e3a857"}
DOTS_PER_INCH = 120


def draw(results: Sequence[CellResult], rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw what the cells allow; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    valid = [result for result in results if result.void is None]
    return [
        *_each(valid, folder, "around", _around),
        *_rates([row for row in rows if row.void is None], folder),
        *_each([result for result in valid if _phases_of(result)], folder, "phases", _phases),
    ]


def _each(
    results: Sequence[CellResult], folder: Path, kind: str, body: Callable[[Sequence[CellResult], Path], None]
) -> Iterator[Path]:
    """One figure for each setting, rate and fault script that at least two systems went through."""
    hurt = sorted((r for r in results if r.strikes), key=lambda r: (_scene(r.cell), list(SYSTEMS).index(r.cell.system)))
    for scene, group in itertools.groupby(hurt, lambda r: _scene(r.cell)):
        found = list(group)
        if len({each.cell.system for each in found}) > 1:
            path = folder / f"{kind}.{'.'.join(map(str, scene))}.png"
            body(found, path)
            yield path


def _scene(cell: Cell) -> tuple[str, str, str, int]:
    return cell.setting, cell.rate, cell.fault, cell.seed


def _around(results: Sequence[CellResult], path: Path) -> None:
    """TTFT and goodput before and after the failure."""
    figure, axes = _axes(1, 3, (15, 4.2))
    for result in results:
        assert result.fault_at is not None
        style = {"color": COLOURS[result.cell.system], "label": result.cell.system}
        points = [(each.sent - result.fault_at, each.ttft) for each in result.requests if each.first is not None]
        axes[0].plot(*_rolling(points, _mean), **style)
        axes[1].plot(*_rolling(points, _p99), **style)
        bins = enumerate(result.good_tokens_per_second[: round(result.load_seconds)])
        axes[2].plot(*_rolling(((second - result.fault_at, float(count)) for second, count in bins), _mean), **style)
    for axis, title in zip(axes, ("TTFT, rolling average", "TTFT, rolling p99"), strict=False):
        axis.set(xlabel="sent, s after the fault", ylabel="time to first token, s", yscale="log", title=title)
    axes[2].set(xlabel="s after the fault", ylabel="tokens/s of whole requests", ylim=(0, None), title="goodput")
    for axis in axes:
        axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
        axis.legend(fontsize=8)
    _save(figure, path, _about(results[0].cell))


def _rolling(
    points: Iterable[tuple[float, float]], measure: Callable[[list[float]], float]
) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    times = [at for at, _ in ordered]
    values = [measure([value for t, value in ordered if at - ROLLING_SECONDS < t <= at]) for at in times]
    return times, values


def _rates(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    for setting in sorted({row.cell.setting for row in rows}):
        here = [row for row in rows if row.cell.setting == setting and row.cell.seed == 0]
        if len({row.rate for row in here}) > 1:
            path = folder / f"latency.{setting}.png"
            _latency_against_rate(here, path)
            yield path


def _latency_against_rate(rows: Sequence[Row], path: Path) -> None:
    figure, axes = _axes(1, 2, (11, 4.2))
    kinds = sorted({(list(SYSTEMS).index(row.cell.system), row.cell.system, row.cell.fault) for row in rows})
    for _, system, fault in kinds:
        line = sorted((row for row in rows if (row.cell.system, row.cell.fault) == (system, fault)), key=_rate)
        style = {"linestyle": "-" if fault == NO_FAULT else "--", "marker": "o", "color": COLOURS[system]}
        label = f"{system}, {'no fault' if fault == NO_FAULT else fault}"
        for axis, field in zip(axes, ("latency_mean", "latency_p99"), strict=True):
            axis.plot([row.rate for row in line], [getattr(row.window, field) for row in line], label=label, **style)
    for axis, title in zip(axes, ("average", "p99"), strict=True):
        axis.set(xlabel="requests/s", ylabel="latency, s", title=title, ylim=(0, None))
    axes[0].legend(fontsize=7)
    _save(figure, path, f"latency against request rate, {rows[0].cell.setting}\n{emulation_note(rows[0].cell.setting)}")


def _rate(row: Row) -> float:
    return row.rate


def _phases(results: Sequence[CellResult], path: Path) -> None:
    bars = [(result.cell.system, _phases_of(result)) for result in results]
    figure, axes = _axes(len(bars), 1, (9, 1.2 + 1.5 * len(bars)))
    for axis, (system, phases) in zip(axes, bars, strict=True):
        begun = 0.0
        for number, (phase, seconds) in enumerate(phases):
            axis.barh([0], [seconds], left=begun, color=f"C{number}", label=f"{phase} {_short(seconds)}")
            begun += seconds
        axis.set(yticks=[0], yticklabels=[system], xlabel="seconds", xlim=(0, None))
        axis.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path, f"phases of a recovery (scales differ)\n{_about(results[0].cell)}")


def _phases_of(result: CellResult) -> list[tuple[str, float]]:
    """The phases of the first recovery, by the system's own record or by the supervisor's."""
    losses = [each for each in result.recoveries if each["cause"] in {"crash", "hang"}]
    if losses:
        return [(phase, losses[0]["seconds"].get(phase) or 0.0) for phase in Phases.__struct_fields__]
    if not result.lives or result.fault_at is None:
        return []
    life = result.lives[0]
    marks = [result.fault_at, life.ended, life.ready, life.first_token]
    known = [mark for mark in marks if mark is not None]
    names = ("exit noticed", "restart until ready", "first token")
    return [(name, later - before) for name, (before, later) in zip(names, itertools.pairwise(known), strict=False)]


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _about(cell: Cell) -> str:
    return f"{cell.setting}, rate {cell.rate}, fault {cell.fault}, seed {cell.seed}\n{emulation_note(cell.setting)}"


def _axes(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _p99(values: list[float]) -> float:
    return percentile(values, 0.99) if values else math.nan


def _mean(values: list[float]) -> float:
    return statistics.fmean(values)
