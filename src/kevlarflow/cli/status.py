"""``kevlarflow status``: asks the controller of the cluster on a port, and shows its answer."""

from __future__ import annotations

import json
import sys

from kevlarflow import config as configuration
from kevlarflow.command_line import Parser, add_port

PIPE_WIDTH = 200
ANSWER_SECONDS = 5.0
"""The controller answers in milliseconds; a crowded machine may be slow to let it."""


def run(arguments: list[str]) -> int:
    """Print the status; raises `ClusterUnreachable` when nothing answers."""
    parser = Parser(prog="kevlarflow status", description="Show what the cluster on a port is doing.")
    add_port(parser)
    parser.add_argument("--json", action="store_true", help="print the status document as JSON")
    options = parser.parse_args(arguments)

    from kevlarflow.control.status import ask_status, render

    document = ask_status(configuration.run_folder_of(options.port), timeout_seconds=ANSWER_SECONDS)
    if options.json:
        print(json.dumps(document, indent=2))
        return 0
    from rich.console import Console

    # A pipe has no width: whoever reads it wants whole rows.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(render(document))
    return 0
