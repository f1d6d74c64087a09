"""Many cells, one after the other: what is done is skipped, what fails does not end the others' turns.

A suite can be stopped at any time and run again: a cell is saved when it is over, and cells that are saved are not run
again, void ones excepted. What a void one was is kept with the next attempt.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kevlarflow.bench.evaluation.cells import SETTINGS, STOCK, STOCK_DP, Cell, conditions
from kevlarflow.bench.evaluation.outcome import CellResult, window
from kevlarflow.bench.evaluation.saved import load, logs_of, save
from kevlarflow.bench.evaluation.workload import Workload, plan
from kevlarflow.bench.experiment import Say
from kevlarflow.bench.machine import describe
from kevlarflow.bench.table import told_attempts

RunCell = Callable[[Cell, Path], CellResult]
SECONDS_TO_START = {STOCK: 120.0, STOCK_DP: 100.0}
OTHERS_START_SECONDS = 30.0
DRAIN_SECONDS = 30.0


class Progress:
    """How long the rest of a suite will take: what its cells should, corrected by what the others have."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ratios: list[float] = []

    def run(self, cell: Cell, body: Callable[[], CellResult]) -> CellResult:
        """Run a cell and learn from it."""
        begun = self._clock()
        result = body()
        if result.void is None:
            self._ratios.append((self._clock() - begun) / expected_seconds(cell))
        return result

    def left(self, cells: Sequence[Cell]) -> float:
        """Seconds that these cells will take."""
        factor = statistics.fmean(self._ratios) if self._ratios else 1.0
        return factor * sum(map(expected_seconds, cells))


def expected_seconds(cell: Cell) -> float:
    """About how long a cell takes."""
    setting = SETTINGS[cell.setting]
    load = setting.before_seconds + setting.after_seconds
    return SECONDS_TO_START.get(cell.system, OTHERS_START_SECONDS) + load + DRAIN_SECONDS


def run(
    loads: Mapping[Cell, Workload], output: Path, run_cell: RunCell, say: Say, progress: Progress | None = None
) -> int:
    """Run the cells that are not done yet, each with its load; save them below `output`. Returns how many are void."""
    progress = progress or Progress()
    cells, here = list(loads), describe()
    alike = {cell: _alike(output, cell, conditions(cell, plan(loads[cell]), here)) for cell in cells}
    todo = [cell for cell, found in alike.items() if found is None or found.void is not None]
    if len(todo) < len(cells):
        say(f"{len(cells) - len(todo)} of {len(cells)} cells are done already (in {output})")
    void = 0
    for number, cell in enumerate(todo):
        say(f"[{number + 1}/{len(todo)}] {cell.name}: {cell.why}; {_minutes(progress.left(todo[number:]))} left")
        folder = logs_of(output, cell)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        result = progress.run(cell, lambda cell=cell, folder=folder: run_cell(cell, folder))  # type: ignore[misc]
        result.attempts = _attempts(alike[cell])
        save(output, result)
        void += result.void is not None
        again = f"; {told_attempts(result.attempts)}" if result.attempts else ""
        say(f"  {told(result)}; {result.seconds:.0f} s in all{again}")
    return void


def _alike(output: Path, cell: Cell, now: str) -> CellResult | None:
    """What is saved of a cell, if it was measured under the conditions of now."""
    found = load(output, cell)
    return found if found is not None and found.conditions == now else None


def _attempts(earlier: CellResult | None) -> list[str]:
    return [] if earlier is None else [*earlier.attempts, f"void: {earlier.void}"]


def told(result: CellResult) -> str:
    """A cell in one line."""
    if result.void is not None:
        return f"void: {result.void}"
    seen = window(result.requests, result.fault_at or 0.0)
    back = ", ".join(f"{s.first_token_seconds:.2f} s" if s.first_token_seconds else "never" for s in result.strikes)
    return (
        f"{seen.requests} requests, {seen.lost} lost; latency {seen.latency_mean:.2f} s (p99 {seen.latency_p99:.2f}), "
        f"TTFT {seen.ttft_mean:.2f} s (p99 {seen.ttft_p99:.2f})" + f"; first token after the fault: {back}" * bool(back)
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"
