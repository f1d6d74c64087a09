"""The harness sees what a system under test does wrong, and survives it."""

import json
import socket
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from kevlarflow.bench.evaluation import cells, drive, outcome, saved, suite
from kevlarflow.bench.evaluation.cells import Cell
from kevlarflow.bench.evaluation.outcome import CellResult
from kevlarflow.bench.evaluation.workload import Workload, plan
from kevlarflow.bench.systems import ServerProcess, SystemFailed, free_port
from kevlarflow.faults import FaultDidNotHappen, Target

SERVER = Path(__file__).parents[3] / "faulty_server.py"
LOAD = Workload(requests_per_second=8.0, seconds=1.0)
LONG_LOAD = Workload(requests_per_second=8.0, seconds=3.0)
"""So long that requests come after a fault, however late a busy machine lets it strike."""
READY_SECONDS = 60.0
NEVER_READY_SECONDS = 1.0
LATE_SECONDS = 0.5
"""As in the server."""
CELL = Cell("real-2x2", "kevlarflow", "light", "none")


class Faulty:
    """The faulty server as a contender."""

    def __init__(self, mode, folder, port=None):
        # As vLLM's servers behind a router do, it refuses a pipeline that is not its own.
        self.pins = mode != "has-one-pipeline"
        self.patience_seconds = NEVER_READY_SECONDS if mode == "never-ready" else READY_SECONDS

        def command(port):
            return [sys.executable, str(SERVER), str(port), mode]

        self.server = ServerProcess("the faulty server", "m", command, {}, folder / "log", port)
        self.model = "m"
        self.stop = self.server.stop
        self.start = self.server.start
        self.processes = self.server.processes
        self.require_alive = self.server.require_alive

    @property
    def address(self):
        return self.server.address

    def wait_ready(self):
        return self.server.wait_ready(self.patience_seconds)

    def victim(self, pipeline, stage):
        return Target("the only process", tuple(self.processes()[:1]))

    def lives(self):
        return []

    def recoveries(self):
        return []


def run(mode, folder, port=None, load=LOAD):
    return drive.run(CELL, load, folder, lambda _: None, lambda *_: Faulty(mode, folder, port))


@pytest.fixture(scope="module")
def well(tmp_path_factory):
    return run("well", tmp_path_factory.mktemp("well"))


def test_a_system_without_fault_is_found_without_fault(well):
    seen = outcome.window(well.requests, 0.0)
    assert well.void is None
    assert well.seconds > LOAD.seconds
    assert (seen.requests, seen.lost) == (len(plan(LOAD)), 0)
    assert sum(well.good_tokens_per_second) == sum(each.output_tokens for each in plan(LOAD))
    assert outcome.wrong(well, well) == []


def test_a_system_whose_pipelines_cannot_be_named_is_asked_without(tmp_path):
    result = run("has-one-pipeline", tmp_path)
    assert result.void is None
    assert outcome.window(result.requests, 0.0).lost == 0


def test_a_lost_request_is_reported(tmp_path):
    result = run("loses", tmp_path)
    seen = outcome.window(result.requests, 0.0)
    lost = [each for each in result.requests if each.defect is not None]
    assert result.void is None
    assert seen.lost == 1
    assert seen.lost_tokens == lost[0].asked_tokens - 2
    assert sum(result.tokens_per_second) == sum(result.good_tokens_per_second) + 2


def test_a_repeated_token_is_reported(tmp_path):
    result = run("repeats", tmp_path)
    assert len(outcome.repeated(result)) == 1
    assert outcome.window(result.requests, 0.0).lost == 1


def test_a_wrong_token_is_reported(tmp_path, well):
    assert len(outcome.wrong(run("errs", tmp_path), well)) == 1


def test_a_late_first_token_is_reported(tmp_path, well):
    late = run("late", tmp_path)
    # Of the least ones, since a busy machine may make any of them late.
    assert min(each.ttft for each in late.requests) >= LATE_SECONDS > min(each.ttft for each in well.requests)
    assert outcome.window(late.requests, 0.0).ttft_mean >= LATE_SECONDS


def test_a_system_that_dies_loses_what_follows(tmp_path):
    result = run("dies", tmp_path)
    assert result.void is not None
    assert "ended with exit status 3" in result.void


@pytest.fixture
def strikes_soon(monkeypatch):
    soon = msgspec.structs.replace(cells.SETTINGS[CELL.setting], before_seconds=0.5)
    monkeypatch.setitem(cells.SETTINGS, CELL.setting, soon)


def with_fault(make, folder):
    hurt = msgspec.structs.replace(CELL, fault="one-last")
    return drive.run(hurt, LONG_LOAD, folder, lambda _: None, lambda *_: make(folder))


def test_a_system_that_does_not_survive_its_fault_has_a_result(tmp_path, strikes_soon):
    result = with_fault(lambda folder: Faulty("well", folder), tmp_path)
    assert result.void is None
    assert "ended with exit status -9" in result.died
    (strike,) = result.strikes
    assert strike.at >= 0.5
    assert strike.first_token_seconds is None
    after = [each for each in plan(LONG_LOAD) if each.start_seconds > strike.at]
    assert outcome.window(result.requests, strike.at).lost >= len(after) > 0


def test_a_fault_that_did_not_happen_makes_its_cell_void(tmp_path, strikes_soon):
    class Elusive(Faulty):
        def victim(self, pipeline, stage):
            raise FaultDidNotHappen("no node serves stage 1 of pipeline 0")

    assert with_fault(lambda folder: Elusive("well", folder), tmp_path).void == "no node serves stage 1 of pipeline 0"


def test_the_arrival_of_every_token_is_kept(tmp_path):
    result = run("well", tmp_path)
    streams = json.loads((tmp_path / drive.STREAMS).read_text())
    assert [sum(each["counts"]) for each in streams] == [each.tokens for each in result.requests]
    assert all(len(each["times"]) == each["usage_tokens"] for each in streams)


def test_a_system_that_is_never_ready_is_void(tmp_path):
    result = run("never-ready", tmp_path)
    assert result.void == f"the faulty server was not ready after 1 s: see {tmp_path / 'log'}"


def test_a_port_in_use_is_void(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port := free_port()))
        taken.listen()
        result = run("well", tmp_path, port)
    assert result.void == f"the faulty server cannot start: port {port} is in use"


def test_a_rate_of_zero_is_void_in_one_line(tmp_path):
    assert run("well", tmp_path, load=Workload(0.0, 1.0)).void == (
        "a rate of 0 requests/s sends nothing: use more than 0"
    )


def test_void_cells_do_not_stop_a_suite_and_are_run_again(tmp_path):
    cells = [Cell("real-2x2", "kevlarflow", "light", "none", seed) for seed in range(3)]
    modes = {0: "well", 1: "never-ready", 2: "well"}
    ran = []

    def run_cell(cell, folder):
        ran.append(cell.seed)
        return drive.run(cell, LOAD, folder, lambda _: None, lambda *_: Faulty(modes[cell.seed], folder))

    loads, said = dict.fromkeys(cells, LOAD), []
    assert suite.run(loads, tmp_path, run_cell, said.append) == 1
    assert [line.split()[0] for line in said if "min left" in line] == ["[1/3]", "[2/3]", "[3/3]"]
    assert suite.run(loads, tmp_path, run_cell, said.append) == 1
    assert f"2 of 3 cells are done already (in {tmp_path})" in said
    assert ran == [0, 1, 2, 1]


def test_what_was_void_before_a_cell_was_run_again_is_kept(tmp_path):
    """It may have been the system's own doing."""
    modes = ["never-ready", "dies", "well", "well"]

    def run_cell(cell, folder):
        return drive.run(cell, LOAD, folder, lambda _: None, lambda *_: Faulty(modes.pop(0), folder))

    said = []
    for _ in range(3):
        suite.run({CELL: LOAD}, tmp_path, run_cell, said.append)
    found = saved.load(tmp_path, CELL)
    assert found.void is None
    first, second = found.attempts
    assert first.startswith("void: the faulty server was not ready after 1 s")
    assert second.startswith("void: the faulty server ended with exit status 3")
    assert f"; attempt 3; 1: {first}; 2: {second}" in said[-1]
    suite.run({CELL: msgspec.structs.replace(LOAD, requests_per_second=9.0)}, tmp_path, run_cell, said.append)
    assert saved.load(tmp_path, CELL).attempts == [], "under other conditions it is another cell"


def test_a_cell_of_another_load_is_run_again(tmp_path):
    ran = []

    def run_cell(cell, folder):
        ran.append(folder)
        return drive.run(cell, LOAD, folder, lambda _: None, lambda *_: Faulty("well", folder))

    suite.run({CELL: LOAD}, tmp_path, run_cell, lambda _: None)
    suite.run({CELL: msgspec.structs.replace(LOAD, requests_per_second=9.0)}, tmp_path, run_cell, lambda _: None)
    assert len(ran) == 2


def test_the_time_left_follows_what_the_others_have_taken():
    now = [0.0]
    progress = suite.Progress(lambda: now[0])
    expected = progress.left([CELL])

    def takes_twice_as_long():
        now[0] += 2 * expected
        return CellResult(CELL, "")

    progress.run(CELL, takes_twice_as_long)
    assert progress.left([CELL]) == pytest.approx(2 * expected)


def test_a_machine_that_fails_makes_its_cell_void(tmp_path):
    def make(*_):
        raise OSError("no space left")

    assert drive.run(CELL, LOAD, tmp_path, lambda _: None, make).void == "no space left"


def test_a_system_that_cannot_be_stopped_costs_one_cell_only(tmp_path):
    cells = [Cell("real-2x2", "kevlarflow", "light", "none", seed) for seed in range(2)]

    class Stubborn(Faulty):
        def __init__(self, mode, folder):
            super().__init__(mode, folder)
            self.stop = self.refuse

        def refuse(self):
            self.server.stop()
            raise SystemFailed("it cannot be stopped")

    def run_cell(cell, folder):
        make = Faulty if cell.seed else Stubborn
        return drive.run(cell, LOAD, folder, lambda _: None, lambda *_: make("well", folder))

    assert suite.run(dict.fromkeys(cells, LOAD), tmp_path, run_cell, lambda _: None) == 1
    first, second = (saved.load(tmp_path, cell) for cell in cells)
    assert first.void == "it cannot be stopped"
    assert len(first.requests) == len(plan(LOAD))
    assert second.void is None


def test_an_error_that_nobody_has_foreseen_is_written_down(tmp_path):
    def make(*_):
        raise KeyError("recoveries")

    said = drive.run(CELL, LOAD, tmp_path, lambda _: None, make).void
    assert said == f"KeyError: 'recoveries' (see {tmp_path / 'error.txt'})"
    assert "Traceback" in (tmp_path / "error.txt").read_text()


def test_a_cell_without_emulation_is_no_emulated_cell(tmp_path):
    emulated = msgspec.structs.replace(CELL, setting="a10-2x4-1g")
    result = drive.run(emulated, LOAD, tmp_path, lambda _: None, lambda *_: Faulty("well", tmp_path))
    assert result.void == "no step of stage 0 took its emulated time: see the logs"


def test_nothing_is_left_running(tmp_path):
    run("well", tmp_path)
    run("never-ready", tmp_path)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(SERVER) in (p.info["cmdline"] or [])]
