"""Who takes over: a pure function of the candidates for one stage.

Any node of the same stage holds the same weights, so any may serve a lane of any pipeline, as long as it has
KV memory for one more. The lane of a node's own pipeline is always kept free for it; so its own node, when it
is there, is never refused, and it is never better to borrow.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kevlarflow.types import NodeInfo, PipelineId


class Candidate(NamedTuple):
    """A ready node of the stage that needs one."""

    info: NodeInfo
    home: PipelineId
    """The pipeline that it was started for."""
    foreign_lanes: int
    """Lanes of other pipelines that it serves already, or has not given up yet."""


def choose(candidates: Iterable[Candidate], pipeline: PipelineId, pipelines: int) -> NodeInfo | None:
    """The node that is to serve a stage of `pipeline`, or None when no candidate can.

    In this order: the pipeline's own node; among the others, only those with a free lane; of these the one with
    the fewest foreign lanes, so that load spreads; of these the nearest in the ring after `pipeline`, because it
    is the standby that keeps the replicated KV.
    """
    best: NodeInfo | None = None
    best_rank = (0, 0)
    for each in candidates:
        if each.home == pipeline:
            return each.info
        if each.foreign_lanes < each.info.lanes - 1:
            rank = (each.foreign_lanes, (each.home - pipeline) % pipelines)
            if best is None or rank < best_rank:
                best, best_rank = each.info, rank
    return best
