"""The status as a person sees it."""

from __future__ import annotations

from rich.console import Console

from kevlarflow.control.status import render
from kevlarflow.recovery import events
from kevlarflow.recovery.status import status_document
from kevlarflow.types import PipelineId
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
