"""Cells on the disk: below the output folder one JSON file each, and a folder for the logs of its system."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kevlarflow.bench.evaluation.cells import Cell, is_of_today
from kevlarflow.bench.evaluation.outcome import CellResult
from kevlarflow.errors import UsageError

CHANGED = "its setting has changed since: run it again"


def path_of(output: Path, cell: Cell) -> Path:
    """Where a cell is saved."""
    return output / "cells" / f"{cell.name}.json"


def logs_of(output: Path, cell: Cell) -> Path:
    """Where the logs of a cell's system are."""
    return output / "logs" / cell.name


def save(output: Path, result: CellResult) -> None:
    """Save a cell, whole or not at all."""
    path = path_of(output, result.cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    unfinished.write_bytes(msgspec.json.encode(result) + b"\n")
    unfinished.replace(path)


def load(output: Path, cell: Cell) -> CellResult | None:
    """A saved cell; None when there is none."""
    path = path_of(output, cell)
    return read(path) if path.exists() else None


def load_all(output: Path) -> list[CellResult]:
    """All saved cells; those whose setting has changed since are void. Raises `UsageError` when there is none."""
    found = [read(path) for path in sorted((output / "cells").glob("*.json"))]
    if not found:
        raise UsageError(f"{output} holds no cells: run kevlarflow bench run SUITE --output {output} first")
    for each in found:
        if not is_of_today(each.cell, each.conditions):
            each.void = each.void or CHANGED
    return found


def read(path: Path) -> CellResult:
    """One saved cell. Raises `UsageError` when the file is something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=CellResult)
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} is no cell of this KevlarFlow ({error}): remove it") from error
