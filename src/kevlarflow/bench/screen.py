"""Shows a scene: live on a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kevlarflow.bench.scene import Line, Scene, Seat, Story, Tone

FRAMES_PER_SECOND = 8
LOWEST, HIGHEST = 20, 38
"""Lines of the picture: the terminal's height, within these."""
GRID_LINES = 4
TONES = {Tone.PLAIN: "", Tone.GOOD: "green", Tone.BAD: "bold red", Tone.CLUSTER: "cyan"}
STATES = {"ready": "green", "serving": "green", "dead": "bold red", "suspect": "yellow"}


@contextmanager
def showing(console: Console, scene: Scene) -> Iterator[None]:
    """Show the scene for the length of a block. On a terminal it moves; elsewhere only `announce` prints."""
    if not console.is_terminal:
        yield
        return
    with Live(Picture(scene), console=console, refresh_per_second=FRAMES_PER_SECOND, vertical_overflow="crop"):
        yield


def announce(console: Console, scene: Scene, line: Line) -> None:
    """Add a line to the scene's log, and print it where nothing moves."""
    scene.lines.append(line)
    if not console.is_terminal:
        console.print(f"{line.mark:>9}  {line.text}", markup=False, highlight=False, soft_wrap=True)


class Picture:
    """The whole scene; draws whatever it is when it is asked to."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw one frame."""
        height = min(HIGHEST, max(LOWEST, console.height - 2))
        yield from console.render(_layout(self._scene), options.update(height=height))


def _layout(scene: Scene) -> Layout:
    whole, stories, side = Layout(), Layout(ratio=8), Layout(ratio=5)
    rows = [scene.stories[start : start + 2] for start in range(0, len(scene.stories), 2)]
    pairs = []
    for row in rows:
        pair = Layout()
        pair.split_row(*(Layout(_story(scene, story)) for story in row))
        pairs.append(pair)
    stories.split_column(*pairs)
    grid_lines = GRID_LINES * max(1, len(scene.seats())) + 3
    side.split_column(Layout(_grid(scene), size=grid_lines), Layout(_log(scene)))
    head, body = Layout(Text(f" {scene.act}", style="bold reverse"), size=1), Layout()
    body.split_row(stories, side)
    whole.split_column(head, body)
    return whole


# ---- stories


class _Tail:
    """The last lines of a text that fit."""

    def __init__(self, text: Text) -> None:
        self._text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = self._text.wrap(console, options.max_width)
        yield from lines[-(options.height or len(lines)) :]


def _story(scene: Scene, story: Story) -> RenderableType:
    is_hit = story.pipeline == scene.fault_pipeline
    waits = is_hit and story.waits_since_fault(scene.fault_at)
    before, after = story.split(scene.fault_at if is_hit else None)
    text = Text(before)
    if after:
        text.append(" ")
        text.append(f" {_pause_words(scene, story)} ", style="black on yellow")
        text.append(" ")
        text.append(after, style="green")
    elif waits and scene.fault_at is not None:
        text.append(" ")
        text.append(f" waiting {(time.monotonic() - scene.fault_at) * 1e3:,.0f} ms ", style="white on red")
    colour = "red" if waits else "yellow" if after else "green" if story.stream and story.stream.done else "white"
    return Panel(
        _Tail(text),
        title=Text(story.title, style="bold"),
        subtitle=_subtitle(story),
        title_align="left",
        subtitle_align="right",
        border_style=colour,
    )


def _pause_words(scene: Scene, story: Story) -> str:
    pause = story.pause(scene.fault_at)
    return "" if pause is None else f"{pause.gap_seconds * 1e3:,.0f} ms"


def _subtitle(story: Story) -> Text:
    tokens = story.stream.tokens if story.stream else 0
    text = Text(f"pipeline {story.pipeline} · {tokens} tokens")
    if story.stream is not None and story.stream.done and story.reference is not None:
        text.append(" · ")
        text.append(*(("identical", "") if story.is_identical else ("DIFFERENT", "red")))
    return text


# ---- nodes and log


def _grid(scene: Scene) -> RenderableType:
    table = Table.grid(padding=(0, 2), expand=True)
    rows = scene.seats()
    for pipeline, seats in enumerate(rows):
        state = scene.pipeline_state(pipeline)
        name = Text.assemble(f"pipeline {pipeline}\n", (state, STATES.get(state, "yellow")))
        table.add_row(name, *(_seat(seat, scene.helps(seat.own)) for seat in seats))
        table.add_row()
    return Panel(table if rows else Text("starting ...", style="dim"), title="nodes", title_align="left")


def _seat(seat: Seat, helps: list[int]) -> Text:
    text = Text()
    if seat.is_lost:
        text.append(f"x {seat.own}", style="bold red strike")
        if seat.own_state == "starting":
            text.append("\nreplacement starts", style="yellow")
    else:
        again = f", life {seat.own_incarnation}" if seat.own_incarnation > 1 else ""
        text.append(f"o {seat.own}{again}", style=STATES.get(seat.own_state, "yellow"))
    if seat.is_borrowed:
        text.append(f"\n-> {seat.serving}", style="bold yellow")
    for pipeline in helps:
        text.append(f"\n+ pipeline {pipeline}", style="bold yellow")
    return text


def _log(scene: Scene) -> RenderableType:
    text = Text()
    for line in scene.lines:
        text.append(f"{line.mark:>8} ", style="dim")
        text.append(f"{line.text}\n", style=TONES[line.tone])
    text.rstrip()
    return Panel(_Tail(text), title="what happens", title_align="left")


def summary(scene: Scene) -> RenderableType:
    """What each stream has seen of the failure."""
    table = Table(title="what the clients saw", title_justify="left", title_style="bold")
    for header in ("stream", "pipeline", "tokens before", "gap", "tokens after", "text"):
        is_word = header in {"stream", "text"}
        table.add_column(header, justify="left" if is_word else "right", no_wrap=header == "stream")
    for story in scene.stories:
        stream, pause = story.stream, story.pause(scene.fault_at)
        if stream is None or pause is None:
            table.add_row(Text(story.title), str(story.pipeline), "", "none", "", _verdict(story))
            continue
        gap = f"{pause.gap_seconds * 1e3:,.0f} ms"
        after = str(stream.tokens - pause.tokens_before)
        table.add_row(Text(story.title), str(story.pipeline), str(pause.tokens_before), gap, after, _verdict(story))
    note = "The gap is the longest wait for a token around the kill; the other pipeline's streams lost no node."
    return Group(table, Text(note, style="dim"))


def _verdict(story: Story) -> Text:
    defect = story.stream.defect() if story.stream else "not sent"
    return Text(defect or ("identical" if story.is_identical else "DIFFERENT"))
