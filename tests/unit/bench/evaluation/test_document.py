"""The report of cells that were made up: ratios, void cells, the note on emulated time."""

import csv
import json
import math

import msgspec
import pytest

from kevlarflow.bench.evaluation import cells, comparison, document, saved
from kevlarflow.bench.evaluation.cells import SUITES, Cell
from kevlarflow.bench.evaluation.claims import claims
from kevlarflow.bench.evaluation.outcome import CellResult, LifeRecord, RequestRecord, StrikeRecord
from kevlarflow.bench.evaluation.spread import spreads
from kevlarflow.bench.evaluation.workload import plan
from kevlarflow.bench.machine import Machine
from kevlarflow.errors import UsageError

HERE = Machine("a processor", 2, 23.5, "3.11", "0.32", "2.13", "0.1.0 at 1a2b3c4")
PHASES = {"detect": 0.05, "plan": 0.01, "relink": 0.02, "restore": 0.1, "recompute": 0.2, "reissue": 0.1}


def cell(system, fault="one-middle"):
    return Cell("a10-2x4-1g", system, "near", fault)


def under_conditions(found):
    found.load = cells.workload(found.cell)
    found.machine = HERE
    found.conditions = cells.conditions(found.cell, plan(found.load), HERE)
    return found


def requests(ttft, latency, digest=1, defect=None):
    return [
        RequestRecord(f"r{n}", n * 1.0, 10, 10, n + ttft, n + latency, 0, digest, defect, n + latency)
        for n in range(160)
    ]


def result(system, mttr, ttft, latency, **more):
    found = CellResult(cell(system), "2026-01-01T00:00:00", requests_per_second=1.0, load_seconds=160.0)
    found.requests = requests(ttft, latency, **more)
    found.tokens_per_second = found.good_tokens_per_second = [10] * 160
    found.strikes = [StrikeRecord(40.0, 0, 2, "a node", mttr)]
    return under_conditions(found)


@pytest.fixture
def folder(tmp_path):
    ours, theirs = result("kevlarflow", 0.5, 0.2, 2.0), result("stock", 60.0, 2.0, 6.0)
    ours.recoveries = [{"cause": "crash", "recomputed_tokens": 7, "seconds": PHASES}]
    theirs.lives = [LifeRecord("stock-0", 42.0, 95.0, 100.0)]
    calm = [result(system, None, 0.2, latency) for system, latency in (("kevlarflow", 2.02), ("stock-dp", 2.0))]
    for each in calm:
        each.cell = cell(each.cell.system, "none")
        each.strikes = []
    void = under_conditions(CellResult(cell("replay"), "2026-01-01T00:00:00", void="it was never ready"))
    for each in (ours, theirs, void, *calm):
        saved.save(tmp_path, each)
    return tmp_path


def test_ratios_are_the_other_by_ours(folder):
    found = comparison.rows(saved.load_all(folder))
    (only,) = comparison.ratios(found)
    assert only.cell.system == "stock"
    assert only.values["MTTR"] == pytest.approx(120)
    assert only.values["average TTFT"] == pytest.approx(10)
    assert only.values["average latency"] == pytest.approx(3)


def test_overhead_is_ours_by_one_stock_server(folder):
    (only,) = comparison.overheads(comparison.rows(saved.load_all(folder)))
    assert only.latency_mean == pytest.approx(1.01)


def test_wrong_output_is_found_by_the_calm_run(folder):
    bad = result("kevlarflow", 0.5, 0.2, 2.0, digest=2)
    saved.save(folder, bad)
    row = next(r for r in comparison.rows(saved.load_all(folder)) if r.cell == bad.cell)
    assert row.wrong == 160


def test_claims_hold_or_not(folder):
    found = {each.text: each.holds for each in claims(comparison.rows(saved.load_all(folder)))}
    assert found["MTTR at least 100x lower than stock's"] is True
    assert found["no request lost or wrong"] is True
    assert found["the paper's 378.9x in average TTFT is reached somewhere"] is False
    assert found["goodput after a loss at least 0.50 of what it was"] is True
    saved.save(folder, result("kevlarflow", 0.9, 0.2, 2.0, defect="gone"))
    found = {each.text: each.holds for each in claims(comparison.rows(saved.load_all(folder)))}
    assert found["MTTR at least 100x lower than stock's"] is False
    assert found["no request lost or wrong"] is False


def test_a_claim_without_cells_is_left_open(tmp_path):
    saved.save(tmp_path, result("stock", 60.0, 2.0, 6.0))
    holds = {each.holds for each in claims(comparison.rows(saved.load_all(tmp_path)))}
    assert holds == {None}
    assert len(claims(comparison.rows(saved.load_all(tmp_path)))) == 10


def test_output_that_cannot_be_compared_is_not_called_right(tmp_path):
    saved.save(tmp_path, result("kevlarflow", 0.5, 0.2, 2.0))
    (claim,) = [c for c in claims(comparison.rows(saved.load_all(tmp_path))) if c.text == "no request lost or wrong"]
    assert claim.holds is None
    assert "0 wrong in the 0 that can be compared" in claim.found


def test_it_is_told_in_how_many_cells_with_a_fault_nothing_was_lost(folder):
    """One without a fault can break the claim all the same."""
    (claim,) = [c for c in claims(comparison.rows(saved.load_all(folder))) if c.text == "no request lost or wrong"]
    assert claim.found.startswith("0 lost in 1 cells with a fault and 1 without, ")
    assert "stock: 0 lost in 1 cells with a fault, " in claim.found
    calm = result("kevlarflow", None, 0.2, 2.0, defect="gone")
    calm.cell, calm.strikes = cell("kevlarflow", "none"), []
    saved.save(folder, calm)
    (claim,) = [c for c in claims(comparison.rows(saved.load_all(folder))) if c.text == "no request lost or wrong"]
    assert claim.holds is False


def test_goodput_below_the_share_of_nodes_that_is_left_breaks_the_claim(tmp_path):
    low = result("kevlarflow", 0.5, 0.2, 2.0)
    low.tokens_per_second = low.good_tokens_per_second = [10] * 40 + [4] * 120
    saved.save(tmp_path, low)
    found = {each.text: each.holds for each in claims(comparison.rows(saved.load_all(tmp_path)))}
    assert found["goodput after a loss at least 0.50 of what it was"] is False


@pytest.mark.parametrize(("seconds", "holds"), [(200.0, True), (301.0, False)])
def test_the_quick_suite_is_timed(tmp_path, seconds, holds):
    for each in SUITES["quick"]:
        saved.save(tmp_path, under_conditions(CellResult(each, "2026-01-01T00:00:00", seconds=seconds)))
    found = {each.text: each.holds for each in claims(comparison.rows(saved.load_all(tmp_path)))}
    assert found["the quick suite takes less than 10 minutes"] is holds


def test_a_cell_whose_setting_has_changed_since_is_void(folder):
    old = result("kevlarflow", 0.5, 0.2, 2.0)
    old.conditions = "0" + old.conditions[1:] if old.conditions[0] != "0" else "1" + old.conditions[1:]
    saved.save(folder, old)
    assert "| **void**: its setting has changed since: run it again" in document.write(folder).read_text()


def test_cells_under_another_load_are_not_compared(folder):
    other = result("kevlarflow", 0.5, 0.2, 2.0)
    slower = msgspec.structs.replace(cells.workload(other.cell), length_scale=0.5)
    other.conditions = cells.conditions(other.cell, plan(slower), HERE)
    saved.save(folder, other)
    found = comparison.rows(saved.load_all(folder))
    assert list(comparison.ratios(found)) == []
    assert next(row.wrong for row in found if row.cell == other.cell) is None


def test_runs_of_one_cell_are_put_side_by_side(folder, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    saved.save(again, result("kevlarflow", 0.7, 0.2, 2.0))
    rows = [*comparison.rows(saved.load_all(folder)), *comparison.rows(saved.load_all(again))]
    (only,) = spreads(rows)
    assert (only.scene, only.runs) == ("a10-2x4-1g.kevlarflow.near.one-middle", 2)
    assert only.ranges["MTTR"] == (0.5, 0.7)
    assert (
        "| a10-2x4-1g.kevlarflow.near.one-middle | 2 | 0.50 to 0.70 (±17%) |"
        in document.write(folder, [again]).read_text()
    )


def test_the_report_names_void_cells_and_says_what_is_emulated(folder):
    text = document.write(folder).read_text()
    assert "| a10-2x4-1g.replay.near.one-middle.0 | **void**: it was never ready" in text
    assert "DEVICE TIME IS EMULATED: A10, 1 Gbps links, slowed down" in text
    assert "| a10-2x4-1g.stock.near.one-middle.0 (e) | 120.0x | 3.0x |" in text
    rows = list(csv.DictReader((folder / "cells.csv").open()))
    assert {row["cell"]: row["recomputed_tokens"] for row in rows}["a10-2x4-1g.kevlarflow.near.one-middle.0"] == "7"
    figures = {path.name for path in (folder / "figures").glob("*.png")}
    assert figures == {"around.a10-2x4-1g.near.one-middle.0.png", "phases.a10-2x4-1g.near.one-middle.0.png"}


def test_the_report_says_which_attempt_a_cell_was_and_what_the_others_were(folder):
    assert "attempt" not in document.write(folder).read_text()
    ours = result("kevlarflow", 0.5, 0.2, 2.0)
    ours.attempts = ["void: it was never ready", "void: it left 2 processes running"]
    saved.save(folder, ours)
    said = "attempt 3; 1: void: it was never ready; 2: void: it left 2 processes running"
    assert f"- a10-2x4-1g.kevlarflow.near.one-middle.0: {said}\n" in document.write(folder).read_text()


def test_a_cell_that_was_saved_before_attempts_were_kept_has_none(folder):
    path = saved.path_of(folder, cell("kevlarflow"))
    old = json.loads(path.read_text())
    del old["attempts"]
    path.write_text(json.dumps(old))
    assert saved.read(path).attempts == []


def test_a_system_that_died_of_a_fault_is_not_void(folder):
    dead = result("kevlarflow", None, 0.2, 2.0, defect="gone")
    dead.died = "it ended with exit status 1"
    saved.save(folder, dead)
    # Two were under way at the fault, and 120 came after it.
    lost = "| a10-2x4-1g.kevlarflow.near.one-middle.0 (e) | 122 | 122 (0 tokens), and it died |"
    assert lost in document.write(folder).read_text()


def test_a_folder_without_cells_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"holds no cells: run kevlarflow bench run SUITE"):
        document.write(tmp_path)


def test_cells_of_two_machines_are_not_compared_and_both_machines_are_named(folder):
    other = result("kevlarflow", 0.5, 0.2, 2.0)
    other.machine = msgspec.structs.replace(HERE, processor="another one")
    other.conditions = cells.conditions(other.cell, plan(other.load), other.machine)
    saved.save(folder, other)
    assert list(comparison.ratios(comparison.rows(saved.load_all(folder)))) == []
    text = document.write(folder).read_text()
    assert "Machine: a processor, 2 cores" in text
    assert "Machine: another one, 2 cores" in text


def test_the_same_machine_after_a_commit_or_a_restart_is_the_same(folder):
    cell, requests = SUITES["quick"][0], plan(cells.workload(SUITES["quick"][0]))
    later = msgspec.structs.replace(HERE, kevlarflow="0.1.0 at 2b3c4d5", memory_gib=23.4)
    assert cells.conditions(cell, requests, HERE) == cells.conditions(cell, requests, later)


def test_a_load_that_is_not_the_suites_is_named(folder):
    other = result("kevlarflow", 0.5, 0.2, 2.0)
    other.load = msgspec.structs.replace(other.load, arrivals="trace", trace="/somewhere/own.csv")
    saved.save(folder, other)
    said = "But a10-2x4-1g.kevlarflow.near.one-middle.0: trace arrivals"
    assert f"{said}, {other.load.requests_per_second:g} a second, of own.csv." in document.write(folder).read_text()
    other.load = msgspec.structs.replace(cells.workload(other.cell), trace="/another/checkout/azure_conv_sample.csv")
    saved.save(folder, other)
    assert "But " not in document.write(folder).read_text()


@pytest.mark.parametrize("firsts", [(0.5, None), (None, 0.5)])
def test_of_two_pipelines_the_one_that_never_comes_back_counts(folder, firsts):
    ours = result("kevlarflow", 0.5, 0.2, 2.0)
    ours.strikes = [StrikeRecord(40.0, pipeline, 2, "a node", first) for pipeline, first in enumerate(firsts)]
    saved.save(folder, ours)
    found = comparison.rows(saved.load_all(folder))
    assert next(row.mttr for row in found if row.cell == ours.cell) == math.inf
    (claim,) = [each for each in claims(found) if each.text.startswith("MTTR")]
    assert (claim.holds, claim.found) == (False, "never back: a10-2x4-1g.kevlarflow.near.one-middle.0")
    assert "not in the cell" in document.write(folder).read_text()


def test_a_request_that_is_lost_before_the_fault_is_lost(folder):
    ours = result("kevlarflow", 0.5, 0.2, 2.0)
    ours.requests[3] = msgspec.structs.replace(ours.requests[3], defect="gone")
    saved.save(folder, ours)
    (claim,) = [c for c in claims(comparison.rows(saved.load_all(folder))) if c.text == "no request lost or wrong"]
    assert claim.holds is False
    assert claim.found.startswith("1 lost in 1 cells with a fault and 1 without")


def test_goodput_that_is_kept_is_compared_with_all_that_was_delivered(folder):
    """What a request got that is lost later was delivered before the fault all the same."""
    theirs = result("stock", 60.0, 2.0, 6.0)
    theirs.good_tokens_per_second = [5] * 160
    saved.save(folder, theirs)
    row = next(row for row in comparison.rows(saved.load_all(folder)) if row.cell == theirs.cell)
    assert row.goodput_kept == pytest.approx(0.5)


def test_a_cell_of_a_setting_that_is_gone_is_void(folder):
    path = saved.path_of(folder, cell("replay"))
    path.write_text(path.read_text().replace("a10-2x4-1g", "a100-1x1"))
    (gone,) = [each for each in saved.load_all(folder) if each.cell.setting == "a100-1x1"]
    assert gone.void is not None


def test_a_recovery_without_a_record_has_no_bar(folder):
    """Neither system says anything of its phases."""
    for system in ("kevlarflow", "stock"):
        saved.save(folder, result(system, 0.5, 0.2, 2.0))
    document.write(folder)
    assert [path.name for path in (folder / "figures").glob("phases*")] == []


def test_a_system_that_never_came_back_has_no_ratio(folder):
    saved.save(folder, result("stock", None, 2.0, 6.0))
    (only,) = comparison.ratios(comparison.rows(saved.load_all(folder)))
    assert math.isnan(only.values["MTTR"])
