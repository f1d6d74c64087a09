"""``kevlarflow drain NODE``: has a node give its lanes away and leave, and tells how far it is."""

from __future__ import annotations

import time
from typing import Any

from kevlarflow import config as configuration
from kevlarflow.cli.status import ANSWER_SECONDS
from kevlarflow.command_line import Parser, add_port
from kevlarflow.errors import RequestRefused
from kevlarflow.types import NodeId, NodeState

LOOK_SECONDS = 0.1


def run(arguments: list[str]) -> int:
    """Ask for it, and wait until the node has gone."""
    parser = Parser(
        prog="kevlarflow drain",
        description="Move all work of a node to others without an error or a gap; then the node exits with status 0.",
    )
    parser.add_argument("node", help="its name, such as node-0-1: see `kevlarflow status`")
    add_port(parser)
    options = parser.parse_args(arguments)

    from kevlarflow.control.status import ask
    from kevlarflow.wire.messages import Answered, DrainNode

    folder = configuration.run_folder_of(options.port)
    answer = ask(folder, DrainNode(NodeId(options.node)), Answered, ANSWER_SECONDS)
    if answer.refusal:
        raise RequestRefused(answer.refusal)
    assert answer.member is not None, "who is drained is said when it is granted"
    _watch(folder, options.node, answer.member.incarnation)
    return 0


def _watch(folder: Any, name: str, incarnation: int) -> None:
    """Print what changes until the node has gone; raises `RequestRefused` when it stays after all."""
    from kevlarflow.control.status import ask_status

    told = ""
    began = time.monotonic()
    while True:
        document = ask_status(folder, timeout_seconds=ANSWER_SECONDS)
        node = next((each for each in document["nodes"] if each["id"] == name), None)
        seconds = time.monotonic() - began
        if node is None or node["incarnation"] != incarnation or node["state"] == NodeState.DEAD:
            print(f"{name} has left after {seconds:.1f} s; `kevlarflow node --join {name}` fills its place again")
            return
        if node["state"] == NodeState.READY:
            raise RequestRefused(f"{name} stays: its lanes could not be moved; see `kevlarflow status`")
        line = _progress(name, node["lanes"])
        if line != told:
            told = line
            print(f"[{seconds:5.1f} s] {line}", flush=True)
        time.sleep(LOOK_SECONDS)


def _progress(name: str, lanes: list[int]) -> str:
    if not lanes:
        return f"{name} serves nothing any more and leaves"
    pipelines = "pipeline" if len(lanes) == 1 else "pipelines"
    return f"{name} serves {pipelines} {', '.join(map(str, lanes))}; the KV is being copied to other nodes"
