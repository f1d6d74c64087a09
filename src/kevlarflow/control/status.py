"""Asking a cluster how it is, and showing the answer to a person."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import zmq

from kevlarflow.config import run_folder_of
from kevlarflow.control.run_folder import owner_of, why_not_private
from kevlarflow.errors import ClusterUnreachable
from kevlarflow.types import PHASES
from kevlarflow.wire.channel import limit
from kevlarflow.wire.messages import AnyMessage, AskStatus, Status, decode, encode

if TYPE_CHECKING:
    from rich.console import RenderableType

A = TypeVar("A")

MIB = 2**20
RECOVERIES_SHOWN = 10
COLOURS = {
    "serving": "green", "ready": "green", "done": "green", "starting": "yellow", "recovering": "yellow",
    "running": "yellow", "suspect": "yellow", "silent": "yellow",
    "draining": "yellow", "waiting": "red", "dead": "red", "failed": "red",
}  # fmt: skip


def ask_status(where: int | os.PathLike[str], timeout_seconds: float = 1.0) -> dict[str, Any]:
    """The status document of the cluster on a port, or in a run folder.

    Raises `ClusterUnreachable` when nothing answers within `timeout_seconds`.
    """
    answer = ask(where, AskStatus(), Status, timeout_seconds)
    document: dict[str, Any] = msgspec.json.decode(answer.document)
    return document


def ask(where: int | os.PathLike[str], question: AnyMessage, kind: type[A], timeout_seconds: float) -> A:
    """One question to the controller of the cluster on a port, or in a run folder, and its answer.

    Raises `ClusterUnreachable` when no answer of that kind comes within `timeout_seconds`.
    """
    folder = run_folder_of(where) if isinstance(where, int) else Path(where)
    address = folder / "controller.sock"
    if not _is_there(address):
        raise _unreachable(folder)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    asking: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    try:
        limit(asking)
        asking.connect(f"ipc://{address}")
        asking.send(encode(question))
        if not asking.poll(round(timeout_seconds * 1_000)):
            raise _unreachable(folder)
        answer = decode(asking.recv())
    except (msgspec.DecodeError, zmq.ZMQError) as error:
        raise _unreachable(folder) from error
    finally:
        asking.close(linger=0)
        context.term()
    if not isinstance(answer, kind):
        raise _unreachable(folder)
    return answer


def _is_there(address: Path) -> bool:
    """Whether a controller has a socket, in a folder that nobody else can have filled."""
    folder = address.parent
    try:
        problem = why_not_private(folder.parent)
        is_there = address.exists()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ClusterUnreachable(
            f"{folder} cannot be entered ({error.strerror}): ask as the user who runs `kevlarflow serve`, "
            "with the same XDG_RUNTIME_DIR and TMPDIR"
        ) from error
    if problem:
        raise ClusterUnreachable(problem)
    return is_there


def _unreachable(folder: Path) -> ClusterUnreachable:
    """Why nobody has answered: a cluster has its port before it has a controller."""
    owner = owner_of(folder)
    if owner is None:
        return ClusterUnreachable(
            f"nothing answers on port {folder.name} (looked for in {folder.parent}): is `kevlarflow serve` running "
            "there, as the same user and with the same XDG_RUNTIME_DIR and TMPDIR?"
        )
    what = "does not answer" if (folder / "controller.sock").exists() else "is still starting"
    return ClusterUnreachable(f"kevlarflow (main process {owner}) {what} on port {folder.name}: try again in a moment")


def render(document: dict[str, Any]) -> RenderableType:
    """The document as tables; print it with a `rich` console."""
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble((document["model"], "bold"), f"  main process {document['main_pid']}")
    parts: list[RenderableType] = [title]
    records = document.get("records", {})
    if records.get("problem"):
        parts.append(Text(records["problem"], style="red"))
    parts += [_pipelines(document), _nodes(document)]
    if document["replication"]:
        parts.append(_replication(document))
    if document["recoveries"]:
        parts.append(_recoveries(document))
    return Group(*parts)


def _coloured(state: str) -> str:
    return f"[{COLOURS.get(state, 'white')}]{state}[/]"


def _pipelines(document: dict[str, Any]) -> RenderableType:
    """A row for each pipeline, a column for each stage; a borrowed node stands out."""
    from rich.table import Table

    table = Table(title="pipelines", title_justify="left")
    stages = max((len(each["nodes"]) for each in document["pipelines"]), default=0)
    headers = ["pipeline", "state", "epoch", *(f"stage {stage}" for stage in range(stages))]
    for header in [*headers, "running", "waiting", "KV blocks"]:
        table.add_column(header, no_wrap=True)
    engines = {each["pipeline"]: each for each in document["engines"]}
    for pipeline in document["pipelines"]:
        engine = engines.get(pipeline["id"], {})
        table.add_row(
            str(pipeline["id"]),
            _coloured(pipeline["state"]) + _how_long(pipeline),
            str(pipeline["epoch"]),
            *(_place(node, pipeline["id"]) for node in pipeline["nodes"]),
            *(str(engine.get(count, "")) for count in ("running", "waiting", "kv_blocks")),
        )
    return table


def _how_long(pipeline: dict[str, Any]) -> str:
    """How long the requests of a pipeline that waits for a node still wait for it too."""
    waiting_for = pipeline.get("waiting_for")
    return f", {waiting_for['seconds_left']:.0f} s left" if waiting_for and waiting_for["seconds_left"] else ""


def _place(node: str | None, pipeline: int) -> str:
    if node is None:
        return "[red]none[/]"
    return node if node.startswith(f"node-{pipeline}-") else f"[yellow]{node} (borrowed)[/]"


def _nodes(document: dict[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(title="nodes", title_justify="left")
    for header in ("node", "incarnation", "pid", "host", "stage", "state", "serves pipelines"):
        table.add_column(header, no_wrap=True)
    for node in document["nodes"]:
        table.add_row(
            node["id"],
            str(node["incarnation"]),
            ", ".join(map(str, node["pids"])),
            node["host"],
            str(node["stage"]),
            _coloured(node["state"]),
            ", ".join(map(str, node["lanes"])),
        )
    return table


def _replication(document: dict[str, Any]) -> RenderableType:
    """A row for each lane: how much of its live KV is on its standby."""
    from rich.table import Table

    table = Table(title="replication", title_justify="left")
    for header in ("pipeline", "stage", "standby", "coverage", "lag, tokens", "MiB", "of MiB", "dropped", "refused"):
        table.add_column(header, no_wrap=True)
    for lane in document["replication"]:
        table.add_row(
            str(lane["pipeline"]),
            str(lane["stage"]),
            lane["standby"] or "[yellow]none[/]",
            f"{lane['coverage']:.0%}",
            str(lane["lag_tokens"]),
            f"{lane['bytes'] / MIB:.1f}",
            f"{lane['limit_bytes'] / MIB:.1f}",
            str(lane["dropped"]),
            str(lane["refused"]),
        )
    return table


def _recoveries(document: dict[str, Any]) -> RenderableType:
    """The latest ones, with the milliseconds of each phase."""
    from rich.table import Table

    table = Table(title="recoveries (milliseconds)", title_justify="left")
    for header in ("time", "pipeline", "cause", "from", "to", "state", "requests", "lost", "tokens", *PHASES):
        table.add_column(header, no_wrap=True)
    for recovery in document["recoveries"][-RECOVERIES_SHOWN:]:
        when = datetime.datetime.fromtimestamp(recovery["time"]).astimezone()
        table.add_row(
            when.strftime("%H:%M:%S"),
            str(recovery["pipeline"]),
            recovery["cause"],
            recovery["from"],
            recovery["to"] or "",
            _coloured(recovery["state"]),
            str(recovery["requests"]),
            str(recovery["lost_requests"]),
            str(recovery["recomputed_tokens"]),
            *(f"{recovery['seconds'][phase] * 1_000:.1f}" for phase in PHASES),
        )
    return table
