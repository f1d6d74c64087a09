"""``kevlarflow demo``: kills a node in mid-stream, live, and compares every text with a run without a failure."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from kevlarflow.cli.interrupts import treated_as_interrupt
from kevlarflow.cli.log_folder import log_folder
from kevlarflow.command_line import Parser

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Start two pipelines of two stages on the default model, stream four stories, kill a node in mid-sentence, and watch the
streams go on. Exit status 0 only if every stream is whole and every text is that of a run without a failure."""


def run(arguments: list[str]) -> int:
    """Perform the demo; return its exit status."""
    parser = Parser(prog="kevlarflow demo", description=DESCRIPTION)
    parser.add_argument("--plain", action="store_true", help="print plain lines even on a terminal")
    options = parser.parse_args(arguments)
    from rich.console import Console

    from kevlarflow.default_model import ensure_default_model

    console = Console(highlight=False, force_terminal=False if options.plain else None)
    with treated_as_interrupt():
        ensure_default_model()
        with log_folder("demo", functools.partial(console.print, markup=False)) as logs:
            return _perform(console, logs.folder)


def _perform(console: Console, folder: Path) -> int:
    from kevlarflow.bench import demo, screen
    from kevlarflow.bench.recipes import KEVLARFLOW, make
    from kevlarflow.bench.watch import Watcher
    from kevlarflow.config import run_folder_of

    scene = demo.opening_scene()
    server = make(KEVLARFLOW, demo.RECIPE, folder)
    leftovers: list[str] = []
    try:
        server.start()
        watcher = Watcher(run_folder_of(server.address.port))
        with contextlib.closing(watcher), screen.showing(console, scene):
            watcher.start()
            outcome = asyncio.run(demo.Demo(console, scene, server, watcher).perform())
    finally:
        leftovers += server.stop()
    console.print(screen.summary(scene))
    if leftovers:
        raise demo.DemoFailed(f"the cluster left processes behind, which were killed: {', '.join(leftovers)}")
    if not outcome.is_success:
        raise demo.DemoFailed(str(outcome).replace("RECOVERED", "NOT RECOVERED"))
    print(outcome, flush=True)
    return 0
