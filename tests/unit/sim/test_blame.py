"""What requests may be blamed for: only what has happened since they came."""

from __future__ import annotations

import pytest

from kevlarflow.recovery.suspicion import MAX_COST, MAX_POSSIBLE_COST, POSSIBLE_REASON, REASON
from kevlarflow.sim.blame import DRAWN_ERROR, Blame
from kevlarflow.sim.errors import NoReason
from kevlarflow.types import Cause, Computing, Epoch, Member, NodeId, NodeInfo, PipelineId, Stage
from kevlarflow.wire.messages import Form

P = PipelineId(0)


def node(incarnation: int) -> NodeInfo:
    return NodeInfo(Member(NodeId("node-0-0"), incarnation), Stage(0), "sim", 1, (1,), "s", "a", 1, 9)


def lose(blame: Blame, times: int) -> None:
    """So many nodes are lost, and nobody knows what they were computing."""
    for incarnation in range(times):
        order = Form(P, Epoch(incarnation + 2), (node(incarnation + 1),), (), Cause.CRASH, (Stage(0),))
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
