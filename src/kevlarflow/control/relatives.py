"""Who there is, as the kernel tells: for a controller that was started without memory.

Nodes and engines that live introduce themselves. One that is stopped, or that hears nothing, does not, and nobody would
ever end it; but its environment says to which run a process belongs, and its title which one it is.
"""

from __future__ import annotations

import re

from kevlarflow.control.guardian import processes_of, read
from kevlarflow.kinship import TITLE
from kevlarflow.recovery.events import KnownNode, Snapshot
from kevlarflow.types import Member, NodeId, PipelineId

_NODE = re.compile(rf"{TITLE}(node-\d+-\d+)-(\d+)")
_ENGINE = re.compile(rf"{TITLE}engine-(\d+)")


def find_relatives(run_folder: str, run_id: str) -> Snapshot:
    """A memory of the living nodes and engines of a run, and of nothing else. Nodes count as ready."""
    nodes: list[KnownNode] = []
    engines: dict[PipelineId, int] = {}
    for pid in processes_of(run_folder, run_id):
        # Behind the title is what the command line was longer.
        title = read(f"/proc/{pid}/cmdline").decode(errors="replace").rstrip(" \0")
        if node := _NODE.fullmatch(title):
            nodes.append(
                KnownNode(Member(NodeId(node[1]), int(node[2])), (pid,), ready=True, failed_starts=0, fenced=True)
            )
        elif engine := _ENGINE.fullmatch(title):
            engines[PipelineId(int(engine[1]))] = pid
    return Snapshot(nodes=tuple(nodes), epochs={}, served=True, engines=engines)
