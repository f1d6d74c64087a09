"""The status as a person sees it."""

from __future__ import annotations

import os

import msgspec
import pytest
from rich.console import Console

from kevlarflow.control.metrics import Metrics
from kevlarflow.control.run_folder import RunFolder
from kevlarflow.control.status import ask_status, render
from kevlarflow.errors import ClusterUnreachable
from kevlarflow.recovery import events
from kevlarflow.recovery.status import status_document
from kevlarflow.types import LaneCoverage, Member, NodeId, PipelineId, Stage
from toy_world import ToyWorld, make_config


def test_the_tables_show_who_borrows_whom():
    world = ToyWorld(make_config())
    world.do(events.ClusterBegun())
    world.heal()
    victim = next(member for member in world.those("ready") if member.node == "node-0-1")
    world.crash(victim)
    world.notice(victim)
    world.answer(PipelineId(0))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(status_document(world.cluster, main_pid=5)))
    text = console.export_text()
    assert "node-1-1 (borrowed)" in text
    assert "crash" in text
    assert "none  main process 5" in text


def test_the_replication_of_each_lane_is_shown_and_measured():
    world = ToyWorld(make_config())
    world.do(events.ClusterBegun())
    world.heal()
    engine = world.cluster.pipelines[0].engine
    lanes = (
        LaneCoverage(Stage(0), Member(NodeId("node-1-0"), 1), 400, 300, 3 << 20, 8 << 20, dropped=7),
        LaneCoverage(Stage(1), None, 0, 0),
    )
    engine.report = msgspec.structs.replace(engine.report, replication=lanes)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(status_document(world.cluster, main_pid=5)))
    (row,) = [line for line in console.export_text().splitlines() if "node-1-0" in line and "75%" in line]
    for shown in ("100", "3.0", "8.0", "7"):
        assert shown in row
    page = Metrics().render(world.cluster, dropped=0, journal_lost=0).decode()
    assert 'kevlarflow_replication_coverage_ratio{pipeline="0",stage="0"} 0.75' in page
    assert 'kevlarflow_replication_lag_tokens{pipeline="0",stage="0"} 100.0' in page
    assert 'kevlarflow_replication_standby_bytes{pipeline="0",stage="0"} 3.145728e+06' in page


def test_who_asks_is_told_why(tmp_path):
    # Its name is part of a path that has to be short enough for a socket.
    folder = tmp_path / "8000"
    missing = (
        rf"^nothing answers on port 8000 \(looked for in {tmp_path}\): is `kevlarflow serve` running there, "
        r"as the same user and with the same XDG_RUNTIME_DIR and TMPDIR\?$"
    )
    with pytest.raises(ClusterUnreachable, match=missing):
        ask_status(folder, 0.1)
    taken = RunFolder(folder)
    starting = rf"^kevlarflow \(main process {os.getpid()}\) is still starting on port 8000: try again in a moment$"
    with pytest.raises(ClusterUnreachable, match=starting):
        ask_status(folder, 0.1)
    (folder / "controller.sock").touch()
    with pytest.raises(ClusterUnreachable, match="does not answer on port 8000: try again"):
        ask_status(folder, 0.1)
    os.close(taken.lock)
    with pytest.raises(ClusterUnreachable, match="nothing answers"):
        ask_status(folder, 0.1)


def test_nothing_is_asked_in_a_folder_that_others_may_have_filled(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    (shared / "8000").mkdir(parents=True)
    (shared / "8000" / "controller.sock").touch()
    shared.chmod(0o777)
    with pytest.raises(ClusterUnreachable, match=rf"^{shared} is open to other users: run chmod 700 {shared}$"):
        ask_status(shared / "8000", 0.1)
    shared.chmod(0o700)
    with pytest.raises(ClusterUnreachable, match=r"^nothing answers"):
        ask_status(shared / "8000", 0.1)
    (tmp_path / "link").symlink_to(shared)
    foreign = r"is not a folder of yours: set XDG_RUNTIME_DIR to a private folder$"
    with pytest.raises(ClusterUnreachable, match=foreign):
        ask_status(tmp_path / "link" / "8000", 0.1)
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(ClusterUnreachable, match=foreign):
        ask_status(shared / "8000", 0.1)


def test_a_pipeline_that_waits_for_a_node_shows_how_long_still():
    world = ToyWorld(make_config(pipelines=1))
    world.do(events.ClusterBegun())
    world.heal()
    (victim,) = (member for member in world.those("ready") if member.node == "node-0-1")
    world.crash(victim)
    world.notice(victim)
    world.tick(15)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(status_document(world.cluster, main_pid=5)))
    (row,) = [line for line in console.export_text().splitlines() if "waiting, 30 s left" in line]
    assert "none" in row


def test_a_disk_that_takes_nothing_is_shown():
    world = ToyWorld(make_config())
    document = status_document(world.cluster, main_pid=5)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(document | {"records": {"lost": 0, "problem": ""}}))
    well = console.export_text()
    console.print(render(document | {"records": {"lost": 3, "problem": "/run/it cannot be written"}}))
    shown = console.export_text().splitlines()
    shown.remove("/run/it cannot be written")
    assert shown == well.splitlines()
