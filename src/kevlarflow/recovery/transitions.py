"""The two state machines of a cluster, as tables: what a node and a pipeline may do next.

A row is (state, step) -> state. A step without a row is a mistake in the code that takes it, never an event of
the world: events that come too late are recognised by their incarnation or epoch and dropped before they get
here. So a missing row raises, and carries the story of its subject.
"""

from __future__ import annotations

import enum

from kevlarflow.errors import IllegalTransition
from kevlarflow.types import NodeState, PipelineState


class NodeStep(enum.StrEnum):
    """What can happen to a node."""

    START = "start"
    READY = "ready"
    SUSPECT = "suspect"
    CLEAR = "clear"
    LOSE = "lose"
    DRAIN = "drain"
    KEEP = "keep"


class PipelineStep(enum.StrEnum):
    """What can happen to a pipeline."""

    FORM = "form"
    SERVE = "serve"
    SUSPEND = "suspend"
    DETACH = "detach"


NODE: dict[tuple[NodeState, NodeStep], NodeState] = {
    (NodeState.DEAD, NodeStep.START): NodeState.STARTING,
    (NodeState.STARTING, NodeStep.READY): NodeState.READY,
    (NodeState.READY, NodeStep.SUSPECT): NodeState.SUSPECT,
    (NodeState.SUSPECT, NodeStep.CLEAR): NodeState.READY,
    (NodeState.STARTING, NodeStep.LOSE): NodeState.DEAD,
    (NodeState.READY, NodeStep.LOSE): NodeState.DEAD,
    (NodeState.SUSPECT, NodeStep.LOSE): NodeState.DEAD,
    (NodeState.READY, NodeStep.DRAIN): NodeState.DRAINING,
    (NodeState.SUSPECT, NodeStep.DRAIN): NodeState.DRAINING,
    (NodeState.DRAINING, NodeStep.KEEP): NodeState.READY,
    (NodeState.DRAINING, NodeStep.LOSE): NodeState.DEAD,
}

PIPELINE: dict[tuple[PipelineState, PipelineStep], PipelineState] = {
    (PipelineState.STARTING, PipelineStep.FORM): PipelineState.STARTING,
    (PipelineState.STARTING, PipelineStep.SERVE): PipelineState.SERVING,
    (PipelineState.SERVING, PipelineStep.FORM): PipelineState.RECOVERING,
    (PipelineState.SERVING, PipelineStep.SUSPEND): PipelineState.WAITING,
    (PipelineState.RECOVERING, PipelineStep.FORM): PipelineState.RECOVERING,
    (PipelineState.RECOVERING, PipelineStep.SERVE): PipelineState.SERVING,
    (PipelineState.RECOVERING, PipelineStep.SUSPEND): PipelineState.WAITING,
    (PipelineState.WAITING, PipelineStep.FORM): PipelineState.RECOVERING,
    # Its requests have waited for long enough.
    (PipelineState.WAITING, PipelineStep.SUSPEND): PipelineState.WAITING,
    # An engine may go, or be replaced, at any time; its requests go with it.
    (PipelineState.STARTING, PipelineStep.DETACH): PipelineState.STARTING,
    (PipelineState.SERVING, PipelineStep.DETACH): PipelineState.STARTING,
    (PipelineState.RECOVERING, PipelineStep.DETACH): PipelineState.STARTING,
    (PipelineState.WAITING, PipelineStep.DETACH): PipelineState.STARTING,
}


def next_node_state(subject: str, state: NodeState, step: NodeStep, story: str) -> NodeState:
    """The state after `step`. Raises `IllegalTransition` when there is no row."""
    if (state, step) not in NODE:
        raise IllegalTransition(subject, state, step, story)
    return NODE[state, step]


def next_pipeline_state(subject: str, state: PipelineState, step: PipelineStep, story: str) -> PipelineState:
    """The state after `step`. Raises `IllegalTransition` when there is no row."""
    if (state, step) not in PIPELINE:
        raise IllegalTransition(subject, state, step, story)
    return PIPELINE[state, step]
