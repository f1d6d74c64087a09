"""What the core of a pipeline has for its nodes, as messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from kevlarflow.recovery import pipeline_events as core
from kevlarflow.types import Epoch, NodeInfo, PipelineId, Stage
from kevlarflow.wire import steps

NOTHING = object()
"""The content of a message that is all in its header."""


class Letter(NamedTuple):
    """A message to some nodes. How its content travels is for those who send it: pickled, or as it is."""

    to: tuple[NodeInfo, ...]
    header: steps.AnyStepMessage
    content: Any = NOTHING


def letters(
    command: core.FormingCommand, pipeline: PipelineId, epoch: Epoch, nodes: Sequence[NodeInfo]
) -> list[Letter]:
    """The messages of a command of the core that works on `nodes` in `epoch`, in the order in which they are to go."""
    match command:
        case core.Join(stage, usable, orphans):
            return [_join(pipeline, epoch, nodes, stage, orphans, usable)]
        case core.Prepare(stage, order, replicas):
            # The nodes are those of the order, and so is the epoch.
            join = _join(pipeline, order.epoch, order.nodes, stage, order.orphans, None)
            return [join, Letter(join.to, steps.Place(pipeline, order.epoch, ahead=True), (replicas, ()))]
        case core.Flush(stage):
            return [Letter((nodes[stage],), steps.Flush(pipeline, epoch))]
        case core.Leave(node):
            return [Letter((node,), steps.Leave(pipeline, epoch))]
        case core.Recompute(sequence, chunk, oldest):
            header = steps.Recompute(pipeline, epoch, -sequence, chunk.through, oldest)
            return [Letter(tuple(nodes[: chunk.through + 1]), header, chunk)]
        case core.Restore(entries, held):
            return [Letter(tuple(nodes), steps.Restore(pipeline, epoch), (entries, held))]
        case core.AssignStandby(stage, standby, anew):
            return [Letter((nodes[stage],), steps.AssignStandby(pipeline, epoch, standby, anew))]
        case core.Place(stage, now, later):
            return [Letter((nodes[stage],), steps.Place(pipeline, epoch), (now, later))]
        case core.PlaceRest(stage):
            return [Letter((nodes[stage],), steps.PlaceRest(pipeline, epoch))]


def _join(
    pipeline: PipelineId,
    epoch: Epoch,
    nodes: Sequence[NodeInfo],
    stage: Stage,
    orphans: tuple[tuple[PipelineId, Epoch], ...],
    usable: frozenset[int] | None,
) -> Letter:
    following = nodes[stage + 1].activation_address if stage + 1 < len(nodes) else ""
    return Letter((nodes[stage],), steps.Join(pipeline, epoch, stage, following, orphans), usable)


def execute_header(command: core.Execute, pipeline: PipelineId, epoch: Epoch) -> steps.Execute:
    """The header of a step; what the step is knows only who has it from the scheduler."""
    writes = tuple((each.block, each.generation, each.filled, each.depth) for each in command.writes)
    return steps.Execute(pipeline, epoch, command.sequence, command.has_tokens, writes, command.use)
