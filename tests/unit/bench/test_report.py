"""Reports: from results made by hand to the cells of the tables."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from rich.console import Console

from kevlarflow.bench import failover as measuring
from kevlarflow.bench.machine import Machine
from kevlarflow.bench.measure import LoadSummary, Pause
from kevlarflow.bench.recipes import KEVLARFLOW, STOCK, Recipe
from kevlarflow.bench.report import (
    kills_table,
    markdown,
    pauses_table,
    phases_table,
    rich_table,
    rounds_table,
    save,
    startup_table,
    tables,
    throughput_table,
    void,
)
from kevlarflow.bench.results import Failover, Kill, Load, Report, Round, Start, Startup, Throughput
from kevlarflow.bench.systems import SystemFailed

PHASES = {
    "detect": 0.005,
    "plan": 0.001,
    "relink": 0.02,
    "restore": 0,
    "recompute": 0.1,
    "reissue": 0.03,
    "total": 0.156,
}


def load(rate: float, streams: int = 4) -> Load:
    summary = LoadSummary(streams, 8, 1024, 10.0, rate, 0.1, 0.2, 1 / rate, 2 / rate, 0.3)
    return Load(summary, strangers=0.05)


def life(number: int, system: str, rate: float, void: str | None = None) -> Round:
    return Round(number, system, 30.0, [load(rate)], void=void)


def throughput() -> Throughput:
    return Throughput([
        life(1, STOCK, 100.0), life(1, KEVLARFLOW, 98.0),
        life(2, KEVLARFLOW, 110.0), life(2, STOCK, 100.0),
        life(3, STOCK, 50.0), life(3, KEVLARFLOW, 500.0, void="a stream failed"),
    ])  # fmt: skip


def pause(seconds: float) -> Pause:
    return Pause("s", seconds / 2, seconds, seconds + 0.01, 40)


def failover() -> Failover:
    return Failover(16, [
        Kill(1, 0, 0, "node-0-0#1", "node-1-0", [pause(0.2), pause(0.4)], [pause(0.1)], PHASES, 900, 5.0, 0.25, 0.2),
        Kill(2, 0, 1, "node-0-1#1", "node-1-1", [pause(0.3)], [pause(0.1)], PHASES | {"total": 0.5}, 800, 6.0),
        Kill(3, 1, 0, void="a stream failed", affected=[pause(99.0)]),
    ])  # fmt: skip


def report() -> Report:
    machine = Machine("a processor", 2, 23.0, "3.11", "0.32.0", "2.13", "0.1.0")
    startup = Startup([Start(1, STOCK, "cold", 120.0), Start(1, KEVLARFLOW, "cold", 40.0)])
    return Report(
        command="kevlarflow bench", begun="2026-11-23T15:00:00+00:00", machine=machine, recipe=Recipe(eager=True),
        notes=["a note"], throughput=throughput(), startup=startup, failover=failover(),
    )  # fmt: skip


def test_ratios_are_taken_within_rounds_and_void_rounds_count_for_nothing():
    rows = {(row[0], row[1]): row[2:] for row in throughput_table(throughput()).rows}
    stock, ours, ratio = rows["4", "throughput"]
    assert (stock, ours) == ("100.0 tokens/s", "104.0 tokens/s")
    assert ratio == "1.040 (0.980 to 1.100)"


def test_a_void_round_is_said_so():
    assert any(
        "round 3, KevlarFlow: void: a stream failed" in remark for remark in throughput_table(throughput()).remarks
    )


def test_a_system_that_never_ran_leaves_a_gap_and_no_ratio():
    rows = throughput_table(Throughput([life(1, KEVLARFLOW, 98.0), Round(1, STOCK, void="it died")])).rows
    assert rows[0] == ("4", "throughput", "-", "98.0 tokens/s", "-")


def test_rounds_are_listed_as_they_ran():
    rows = rounds_table(throughput()).rows
    assert rows[1] == ("1", KEVLARFLOW, "30.0 s", "4", "98.0 tokens/s", "100 ms", "10.2 ms", "5%")
    assert len(rows) == 5


def test_startup_row():
    table = startup_table(Startup([Start(1, STOCK, "cold", 120.0), Start(1, KEVLARFLOW, "cold", 40.0)]))
    assert table.rows == [("cold caches", "120.0 s", "40.0 s", "0.333 (0.333 to 0.333)")]


def test_pauses_are_split_by_stage_and_leave_void_kills_out():
    rows = pauses_table(failover()).rows
    assert [(*row[:3], *row[7:9]) for row in rows] == [
        ("all", "2", "3", "300 ms", "400 ms"),
        ("first stage", "1", "2", "300 ms", "400 ms"),
        ("last stage", "1", "1", "300 ms", "300 ms"),
    ]


def test_a_kill_that_is_not_measured_to_its_end_is_void_and_costs_no_table(monkeypatch: pytest.MonkeyPatch):
    async def nothing(*_: object) -> None:
        pass

    async def never_back(*_: object) -> None:
        raise SystemFailed("after 60 s still not: a record of the rejoin")

    for name, instead in {"closed_loop": nothing, "wait_quiet": nothing, "_until_settled": nothing}.items():
        monkeypatch.setattr(measuring, name, instead)
    monkeypatch.setattr(measuring, "_kill", never_back)
    result, system = failover(), SimpleNamespace(address=None, model="m", require_alive=lambda: None)
    with pytest.raises(SystemFailed):
        asyncio.run(measuring._kills(measuring.Plan(Recipe()), result, system, None, print))
    assert "kill 1: void: it was not measured to its end" in pauses_table(result).remarks
    assert len(kills_table(result).rows) == 2
    assert len(phases_table(result).rows) == len(PHASES)


def test_phases():
    rows = {row[0]: row[1:] for row in phases_table(failover()).rows}
    assert rows["detect"] == ("5.0 ms", "5.0 ms")
    assert rows["total"] == ("328 ms", "500 ms")


def test_the_gap_of_the_move_home_stands_beside_that_before_it():
    rows = kills_table(failover()).rows
    assert [row[-3:] for row in rows] == [("5.0 s", "250 ms", "200 ms"), ("6.0 s", "-", "-")]


def test_everything_void_is_listed():
    assert void(report()) == ["a stream failed", "a stream failed"]


def test_markdown_has_every_table_and_what_was_measured_on():
    text = markdown(report())
    for expected in ("`kevlarflow bench`", "a processor", "a note", "## No failure", "## Ready", "--enforce-eager"):
        assert expected in text
    assert text.count("## ") == len(list(tables(report())))
    assert "| all | 2 | 3 |" in text


def test_a_report_is_saved_and_can_be_read_again(tmp_path: Path):
    data, text = save(report(), tmp_path / "new")
    assert msgspec.json.decode(data.read_bytes(), type=Report) == report()
    assert json.loads(data.read_text())["machine"]["cores"] == 2
    assert text.read_text() == markdown(report())
    assert data.stem == "20261123-150000-throughput-startup-failover"


def test_empty_results_can_be_shown():
    empty = Report(
        "c", "2026-11-23T15:00:00+00:00", report().machine, Recipe(), [], Throughput(), Startup(), Failover(16)
    )
    console = Console(width=100, record=True, quiet=True)
    for table in tables(empty):
        console.print(rich_table(table))
    assert "Benchmark" in markdown(empty)
