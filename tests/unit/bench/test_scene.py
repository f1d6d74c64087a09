"""The demo's scene and its picture, from a stream and a status made by hand."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
from rich.console import Console

from kevlarflow.bench.demo import STORIES, Demo, DemoFailed, Outcome, opening_scene
from kevlarflow.bench.scene import Line, Scene, Tone
from kevlarflow.bench.screen import Picture, announce, showing, summary
from kevlarflow.bench.streams import Stream
from kevlarflow.bench.watch import is_settled, recovery_after


def stream(*times: float, text: str = "abcdef") -> Stream:
    pieces = list(text[: len(times)])
    return Stream("s", 0.0, 0, list(times), [1] * len(times), pieces, len(times), "stop", done=True)


def status(lost: bool = False, running: int = 0) -> dict[str, Any]:
    """Two pipelines of two stages; `lost`: node-0-1 is being replaced and node-1-1 helps out."""
    nodes = [
        {"id": f"node-{pipeline}-{stage}", "state": "ready", "incarnation": 1, "pids": [1]}
        for pipeline in range(2)
        for stage in range(2)
    ]
    pipelines = [
        {"id": number, "state": "serving", "nodes": [f"node-{number}-{s}" for s in range(2)]} for number in range(2)
    ]
    recoveries = []
    if lost:
        nodes[1] |= {"state": "dead"}
        pipelines[0]["nodes"] = ["node-0-0", "node-1-1"]
        recoveries = [{"time": 100.0, "cause": "crash", "pipeline": 0, "stage": 1, "state": "done"}]
    engines = [{"state": "ready", "running": running, "waiting": 0} for _ in range(2)]
    return {"nodes": nodes, "pipelines": pipelines, "engines": engines, "recoveries": recoveries}


def told_scene() -> Scene:
    scene = opening_scene()
    for story in scene.stories:
        story.stream, story.reference = stream(1.0, 2.0, 2.1, 9.0, 9.1, 9.2), stream(1.0, 2.0, 2.5, 3.0, 3.5, 4.0)
    scene.status, scene.fault_at, scene.fault_pipeline = status(lost=True), 2.05, 0
    return scene


def test_the_text_is_split_where_the_stream_stood_still():
    assert told_scene().stories[0].split(2.05) == ("abc", "def")


def test_without_a_fault_there_is_nothing_to_split():
    assert told_scene().stories[0].split(None) == ("abcdef", "")


def test_a_stream_waits_from_the_fault_to_its_next_token():
    story = opening_scene().stories[0]
    story.stream = stream(1.0, 2.0)
    story.stream.done = False
    assert story.waits_since_fault(2.5)
    assert not story.waits_since_fault(1.5)
    assert not story.waits_since_fault(None)
    story.stream.done = True
    assert not story.waits_since_fault(2.5)


def test_identical_means_letter_by_letter():
    story = told_scene().stories[0]
    assert story.is_identical
    assert story.stream is not None
    story.stream.pieces[-1] = "F"
    assert not story.is_identical
    story.stream = None
    assert not story.is_identical


def test_only_the_streams_of_the_killed_pipeline_are_affected():
    assert [story.pipeline for story in told_scene().affected] == [0, 0]


def test_seats_show_who_helps_out():
    scene = opening_scene()
    assert scene.seats() == []
    scene.status = status(lost=True)
    seat = scene.seats()[0][1]
    assert (seat.own, seat.own_state, seat.serving, seat.is_borrowed) == ("node-0-1", "dead", "node-1-1", True)
    assert not scene.seats()[0][0].is_borrowed
    assert (scene.helps("node-1-1"), scene.helps("node-1-0")) == ([0], [])
    scene.status["nodes"][1] |= {"state": "starting", "incarnation": 2}
    assert scene.seats()[0][1].is_lost
    scene.status["nodes"].pop(1)
    assert scene.seats()[0][1].own_state == "dead"
    scene.status["pipelines"][0]["nodes"][1] = None
    assert not scene.seats()[0][1].is_borrowed


@pytest.mark.parametrize("width", [40, 80, 100, 200])
@pytest.mark.parametrize("scene", [opening_scene(), told_scene()], ids=["before", "after"])
def test_the_picture_can_be_drawn_at_any_width(width: int, scene: Scene):
    console = Console(width=width, height=40, file=io.StringIO(), force_terminal=True)
    console.print(Picture(scene))
    console.print(summary(scene))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "node" in drawn


def test_the_picture_shows_the_loss():
    console = Console(width=160, height=40, file=io.StringIO())
    scene = told_scene()
    scene.lines.append(Line("+5 ms", "node-0-1 died", Tone.BAD))
    console.print(Picture(scene))
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in ("x node-0-1", "-> node-1-1", "+ pipeline 0", "6,900 ms", "node-0-1 died", "identical"):
        assert expected in drawn


def test_where_nothing_moves_lines_are_printed():
    console = Console(width=80, file=io.StringIO())
    scene = opening_scene()
    with showing(console, scene):
        announce(console, scene, Line("1.0 s", "something [happens]", Tone.PLAIN))
    assert console.file.getvalue() == "    1.0 s  something [happens]\n"  # type: ignore[attr-defined]


def test_the_stories_are_spread_over_the_pipelines():
    assert [story.pipeline for story in opening_scene().stories] == [0, 1, 0, 1]
    assert len({prompt for _, prompt in STORIES}) == 4


def test_the_last_line():
    good = Outcome(0.2137, 4, 4, True)
    assert str(good) == "RECOVERED in 214 ms, 4 of 4 streams complete, text identical: yes"
    assert good.is_success
    assert not Outcome(0.2, 3, 4, True).is_success
    assert not Outcome(0.2, 4, 4, False).is_success


def test_a_demo_that_cannot_kill_says_how_far_its_streams_came():
    demo = Demo(Console(file=io.StringIO()), opening_scene(), None, None)  # type: ignore[arg-type]

    async def tell() -> list[Stream]:
        return [Stream("The lighthouse", 0.0, failure="no token for 60 s: 31 of 160 tokens came")]

    async def perform() -> None:
        telling = asyncio.create_task(tell())
        await telling
        await demo._kill(telling)

    with pytest.raises(DemoFailed, match=r"before a node could be killed: The lighthouse: .* 31 of 160 tokens came$"):
        asyncio.run(perform())


# ---- what the status says


def test_settled_is_everybody_at_home_and_no_request():
    assert is_settled(status())
    assert not is_settled(status(lost=True))
    assert not is_settled(status(running=1))


def test_a_recovery_is_found_by_place_time_and_cause():
    document = status(lost=True)
    assert recovery_after(document, 99.0, 0, 1) is not None
    assert recovery_after(document, 100.04, 0, 1) is not None, "the cluster tells the time by another clock"
    assert recovery_after(document, 101.0, 0, 1) is None
    assert recovery_after(document, 99.0, 1, 1) is None
    document["recoveries"][0]["state"] = "running"
    assert recovery_after(document, 99.0, 0, 1) is None
    document["recoveries"][0] |= {"state": "done", "cause": "rejoin"}
    assert recovery_after(document, 99.0, 0, 1) is None


def test_what_others_say_is_shown_as_they_said_it() -> None:
    scene = told_scene()
    scene.stories[0].title, said = "a [tale]", "no [/such] tag [red]"
    stream = scene.stories[0].stream
    assert stream is not None
    stream.name, stream.failure = "s", said
    console = Console(file=io.StringIO(), width=200)
    console.print(summary(scene))
    console.print(Picture(scene))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert said in shown
    assert shown.count("a [tale]") == 2
