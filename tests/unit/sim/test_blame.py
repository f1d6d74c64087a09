"""What requests may be blamed for: only what has happened since they came."""

from __future__ import annotations

import pytest

from kevlarflow.recovery.suspicion import MAX_COST, MAX_POSSIBLE_COST, POSSIBLE_REASON, REASON
from kevlarflow.sim.blame import DRAWN_ERROR, Blame
from kevlarflow.sim.errors import NoReason, Unblamed
from kevlarflow.types import Cause, Computing, Epoch, Loss, Member, NodeId, NodeInfo, PipelineId, Stage
from kevlarflow.wire.messages import Form

P = PipelineId(0)


def node(incarnation: int) -> NodeInfo:
    return NodeInfo(Member(NodeId("node-0-0"), incarnation), Stage(0), "sim", 1, (1,), "s", "a", 1, 9)


def lose(blame: Blame, times: int, *, from_outside: bool = False) -> None:
    """So many nodes are lost: nobody knows what they were computing, or somebody has killed them."""
    for incarnation in range(times):
        losses = (Loss(node(incarnation).member, Computing(), from_outside=True),) if from_outside else ()
        nodes = (node(incarnation + 1),)
        order = Form(P, Epoch(incarnation + 2), nodes, (), Cause.CRASH, (Stage(0),), losses=losses)
        blame.note_order(order, (node(incarnation),))


@pytest.mark.parametrize(("reason", "bound"), [(REASON, MAX_COST), (POSSIBLE_REASON, MAX_POSSIBLE_COST)])
def test_losses_before_a_request_came_are_no_reason(reason: str, bound: int) -> None:
    blame = Blame()
    lose(blame, bound)
    blame.note_added("r", P)
    with pytest.raises(NoReason):
        blame.check("r", reason, P)
    lose(blame, bound)
    blame.check("r", reason, P)


@pytest.mark.parametrize("reason", [REASON, POSSIBLE_REASON])
def test_nodes_that_somebody_killed_are_no_reason(reason: str) -> None:
    blame = Blame()
    blame.note_added("r", P)
    for incarnation in range(2 * MAX_POSSIBLE_COST):
        blame.note_hurt(node(incarnation).member)
    lose(blame, 2 * MAX_POSSIBLE_COST, from_outside=True)
    with pytest.raises(NoReason):
        blame.check("r", reason, P)


def test_only_a_node_that_somebody_killed_or_stopped_was_lost_from_outside() -> None:
    with pytest.raises(Unblamed):
        lose(Blame(), 1, from_outside=True)


def test_nodes_that_died_of_a_request_are_a_reason() -> None:
    blame = Blame()
    blame.note_added("r", P)
    for _ in range(MAX_COST):
        with pytest.raises(NoReason):
            blame.check("r", REASON, P)
        blame.note_death(Computing(P, Epoch(1), 1), ["r"])
    blame.check("r", REASON, P)


def test_an_error_ends_only_who_was_in_the_step_that_raised_it() -> None:
    blame = Blame()
    blame.note_raised(["r"])
    assert blame.may_end("r", DRAWN_ERROR)
    assert not blame.may_end("s", DRAWN_ERROR)
    assert not blame.may_end("r", "another error")
