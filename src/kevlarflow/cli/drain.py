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
_REMEDY = "`kevlarflow node --join {}` fills its place again"


def run(arguments: list[str]) -> int:
    """Ask for it, and wait until the node has gone."""
    parser = Parser(
        prog="kevlarflow drain",
        description="Move all work of a node to others of its stage, without an error; then it exits with status 0.",
    )
    parser.add_argument("node", help="its name, such as node-0-1: see `kevlarflow status`")
    add_port(parser)
    options = parser.parse_args(arguments)

    from kevlarflow.control.status import ask
    from kevlarflow.wire.messages import Answered, DrainNode

    folder = configuration.run_folder_of(options.port)
    since = time.time()
    answer = ask(folder, DrainNode(NodeId(options.node)), Answered, ANSWER_SECONDS)
    if answer.refusal:
        raise RequestRefused(answer.refusal)
    assert answer.member is not None, "who is drained is said when it is granted"
    _watch(folder, options.node, answer.member.incarnation, since)
    return 0


def _watch(folder: Any, name: str, incarnation: int, since: float) -> None:
    """Print what changes until the node has gone; raises `RequestRefused` when it stays after all, or dies.

    `since` is the Unix time at which it was asked to leave.
    """
    from kevlarflow.control.status import ask_status

    told = ""
    began = time.monotonic()
    while True:
        document = ask_status(folder, timeout_seconds=ANSWER_SECONDS)
        node = next((each for each in document["nodes"] if each["id"] == name), None)
        seconds = time.monotonic() - began
        if node is None or node["incarnation"] != incarnation or node["state"] == NodeState.DEAD:
            if _was_lost(document, name, since):
                raise RequestRefused(f"{name} was lost before it had given its lanes away: {_REMEDY.format(name)}")
            print(f"{name} has left after {seconds:.1f} s; {_REMEDY.format(name)}")
            return
        if node["state"] == NodeState.READY:
            raise RequestRefused(f"{name} stays: its lanes could not be moved; see `kevlarflow status`")
        line = _progress(name, node["lanes"])
        if line != told:
            told = line
            print(f"[{seconds:5.1f} s] {line}", flush=True)
        time.sleep(LOOK_SECONDS)


def _was_lost(document: dict[str, Any], name: str, since: float) -> bool:
    """Whether lanes had to be taken over from a node that died, from a Unix time on."""
    from kevlarflow.bench.watch import CLOCK_SLACK_SECONDS, LOST

    return any(
        record["from"] == name and record["cause"] in LOST and record["time"] >= since - CLOCK_SLACK_SECONDS
        for record in document["recoveries"]
    )


def _progress(name: str, lanes: list[int]) -> str:
    if not lanes:
        return f"{name} serves nothing any more and leaves"
    pipelines = "pipeline" if len(lanes) == 1 else "pipelines"
    return f"{name} serves {pipelines} {', '.join(map(str, lanes))}; the KV is being copied to other nodes"
