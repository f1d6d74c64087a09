"""The report of cells that were made up: ratios, void cells, the note on emulated time."""

import csv
import math

import pytest

from kevlarflow.bench.evaluation import comparison, document, suite
from kevlarflow.bench.evaluation.cells import Cell
from kevlarflow.bench.evaluation.claims import claims
from kevlarflow.bench.evaluation.outcome import CellResult, LifeRecord, RequestRecord, StrikeRecord
from kevlarflow.errors import UsageError

PLACE = ("a10-2x4-1g", "near", "one-middle")
PHASES = {"detect": 0.05, "plan": 0.01, "relink": 0.02, "restore": 0.1, "recompute": 0.2, "reissue": 0.1}


def cell(system, fault="one-middle"):
    return Cell("a10-2x4-1g", system, "near", fault)


def requests(ttft, latency, digest=1, defect=None):
    return [
        RequestRecord(f"r{n}", n * 1.0, 10, 10, n + ttft, n + latency, 0, digest, defect, n + latency)
        for n in range(160)
    ]


def result(system, mttr, ttft, latency, **more):
    found = CellResult(cell(system), "2026-01-01T00:00:00", requests_per_second=1.0, load_seconds=160.0)
    found.requests = requests(ttft, latency, **more)
    found.good_tokens_per_second = [10] * 160
    found.strikes = [StrikeRecord(40.0, 0, 2, "a node", mttr)]
    return found


@pytest.fixture
def folder(tmp_path):
    ours, theirs = result("kevlarflow", 0.5, 0.2, 2.0), result("stock", 60.0, 2.0, 6.0)
    ours.recoveries = [{"cause": "crash", "recomputed_tokens": 7, "seconds": PHASES}]
    theirs.lives = [LifeRecord("stock-0", 42.0, 95.0, 100.0)]
    calm = [result(system, None, 0.2, latency) for system, latency in (("kevlarflow", 2.02), ("stock-dp", 2.0))]
    for each in calm:
        each.cell = cell(each.cell.system, "none")
        each.strikes = []
    void = CellResult(cell("replay"), "2026-01-01T00:00:00", void="it was never ready")
    for each in (ours, theirs, void, *calm):
        suite.save(tmp_path, each)
    return tmp_path


def test_ratios_are_the_other_by_ours(folder):
    found = comparison.rows(suite.load_all(folder))
    (only,) = comparison.ratios(found)
    assert only.cell.system == "stock"
    assert only.values["MTTR"] == pytest.approx(120)
    assert only.values["average TTFT"] == pytest.approx(10)
    assert only.values["average latency"] == pytest.approx(3)


def test_overhead_is_ours_by_one_stock_server(folder):
    (only,) = comparison.overheads(comparison.rows(suite.load_all(folder)))
    assert only.latency_mean == pytest.approx(1.01)


def test_wrong_output_is_found_by_the_calm_run(folder):
    bad = result("kevlarflow", 0.5, 0.2, 2.0, digest=2)
    suite.save(folder, bad)
    row = next(r for r in comparison.rows(suite.load_all(folder)) if r.cell == bad.cell)
    assert row.wrong == 160


def test_claims_hold_or_not(folder):
    found = {each.text: each.holds for each in claims(comparison.rows(suite.load_all(folder)))}
    assert found["MTTR at least 100x lower than stock's"] is True
    assert found["no request lost or wrong"] is True
    assert found["the paper's 378.9x in average TTFT is reached somewhere"] is False
    assert found["goodput after a loss at least 0.50"] is True
    suite.save(folder, result("kevlarflow", 0.9, 0.2, 2.0, defect="gone"))
    found = {each.text: each.holds for each in claims(comparison.rows(suite.load_all(folder)))}
    assert found["MTTR at least 100x lower than stock's"] is False
    assert found["no request lost or wrong"] is False


def test_a_claim_without_cells_is_left_open(tmp_path):
    suite.save(tmp_path, result("stock", 60.0, 2.0, 6.0))
    holds = {each.holds for each in claims(comparison.rows(suite.load_all(tmp_path)))}
    assert holds == {None}


def test_the_report_names_void_cells_and_says_what_is_emulated(folder):
    text = document.write(folder).read_text()
    assert "| a10-2x4-1g.replay.near.one-middle.0 | **void**: it was never ready" in text
    assert "DEVICE TIME IS EMULATED: A10, 1 Gbps links, slowed down" in text
    assert "| a10-2x4-1g.stock.near.one-middle.0 (e) | 120.0x | 3.0x |" in text
    rows = list(csv.DictReader((folder / "cells.csv").open()))
    assert {row["cell"]: row["recomputed_tokens"] for row in rows}["a10-2x4-1g.kevlarflow.near.one-middle.0"] == "7"
    figures = {path.name for path in (folder / "figures").glob("*.png")}
    assert figures == {"around.a10-2x4-1g.near.one-middle.0.png", "phases.a10-2x4-1g.near.one-middle.0.png"}


def test_a_system_that_died_of_a_fault_is_not_void(folder):
    dead = result("kevlarflow", None, 0.2, 2.0, defect="gone")
    dead.died = "it ended with exit status 1"
    suite.save(folder, dead)
    # Two were under way at the fault, and 120 came after it.
    assert "| a10-2x4-1g.kevlarflow.near.one-middle.0 (e) | 122 | 122 (it died) |" in document.write(folder).read_text()


def test_a_folder_without_cells_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"holds no cells: run kevlarflow bench run SUITE"):
        document.write(tmp_path)


def test_a_system_that_never_came_back_has_no_ratio(folder):
    suite.save(folder, result("stock", None, 2.0, 6.0))
    (only,) = comparison.ratios(comparison.rows(suite.load_all(folder)))
    assert math.isnan(only.values["MTTR"])
