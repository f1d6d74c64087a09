"""What a person sees of a scenario."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from kevlarflow.bench.chaos import show
from kevlarflow.bench.chaos.judge import Verdict

MARKUP = "no [/such] tag [red]"


def shown(what: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_others_say_is_shown_as_they_said_it() -> None:
    """Answers of servers and command lines may hold brackets, which rich would take for its own."""
    verdict = Verdict(f"check {MARKUP}", f"wanted {MARKUP}", f"found {MARKUP}", holds=False)
    assert shown(show.verdicts([verdict])).count(MARKUP) == 3
    status = {
        "engines": [],
        "pipelines": [{"id": 0, "state": f"state {MARKUP}", "epoch": 1, "nodes": [f"node {MARKUP}", None]}],
    }
    screen = show.Screen(Console(file=io.StringIO()), f"title {MARKUP}")
    screen.say(f"line {MARKUP}")
    screen.performance = SimpleNamespace(status=status, act=f"act {MARKUP}", tokens={})  # type: ignore[assignment]
    assert shown(screen).count(MARKUP) == 5
