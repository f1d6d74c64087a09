"""What a person sees: a moving table on a terminal, plain lines elsewhere, and the checks at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kevlarflow.bench.chaos.judge import Verdict
from kevlarflow.bench.chaos.perform import Performance

FRAMES_PER_SECOND = 8
LINES_SHOWN = 12
STYLES = {"serving": "green", "ready": "green", "recovering": "yellow", "waiting": "red", "starting": "yellow"}


class Screen:
    """Tells one scenario. `performance` may be set once there is a cluster."""

    def __init__(self, console: Console, title: str) -> None:
        self.performance: Performance | None = None
        self._console = console
        self._title = title
        self._begun_at = time.monotonic()
        self._lines: list[str] = []

    def say(self, text: str) -> None:
        """Add a line; it is printed at once where nothing moves."""
        line = f"{time.monotonic() - self._begun_at:7.1f} s  {text}"
        self._lines.append(line)
        if not self._console.is_terminal:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Show it for the length of a block."""
        if not self._console.is_terminal:
            self._console.print(self._title, markup=False, highlight=False, soft_wrap=True)
            yield
            return
        with Live(self, console=self._console, refresh_per_second=FRAMES_PER_SECOND):
            yield

    def __rich__(self) -> RenderableType:
        """Draw one frame."""
        parts: list[RenderableType] = [Text(self._title, style="bold")]
        if self.performance is not None and self.performance.status is not None:
            parts.append(_table(self.performance))
        return Group(*parts, *(Text(line) for line in self._lines[-LINES_SHOWN:]))


def _table(performance: Performance) -> Table:
    status = performance.status or {"pipelines": [], "engines": []}
    caption = Text(f"{performance.act}; {sum(performance.tokens.values()):,} tokens")
    table = Table(caption=caption, caption_justify="left")
    for header in ("pipeline", "state", "epoch", "nodes", "running"):
        table.add_column(header, no_wrap=True)
    running = {engine["pipeline"]: engine["running"] for engine in status["engines"]}
    for each in status["pipelines"]:
        state = Text(each["state"], style=STYLES.get(each["state"], ""))
        nodes = Text("  ".join(node or "none" for node in each["nodes"]))
        table.add_row(str(each["id"]), state, str(each["epoch"]), nodes, str(running.get(each["id"], "")))
    return table


def verdicts(found: Sequence[Verdict]) -> Table:
    """The checks as a table."""
    table = Table()
    for header in ("check", "wanted", "found", ""):
        table.add_column(header)
    for each in found:
        style = ("green" if each.is_judged else "yellow") if each.holds else "bold red"
        # Whatever others have said is no markup.
        said = map(Text, (each.check, each.wanted, each.found))
        table.add_row(*said, Text(each.mark, style=style))
    return table


def last_line(name: str, found: Sequence[Verdict]) -> str:
    """The outcome in one line."""
    broken = [each for each in found if not each.holds]
    if broken:
        return f"FAILED {name}: " + "; ".join(f"{each.check}: {each.found}, wanted {each.wanted}" for each in broken)
    return f"PASSED {name}: " + ", ".join(f"{each.check}: {each.found}" for each in found)
