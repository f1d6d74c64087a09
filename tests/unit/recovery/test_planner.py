"""Who takes over."""

from __future__ import annotations

from kevlarflow.recovery.planner import Candidate, choose
from kevlarflow.types import PipelineId
from toy_world import make_info


def candidate(pipeline: int, foreign_lanes: int = 0, lanes: int = 2) -> Candidate:
    return Candidate(make_info(f"node-{pipeline}-0", lanes=lanes), PipelineId(pipeline), foreign_lanes)


def chosen(pipeline: int, *candidates: Candidate) -> str | None:
    info = choose(candidates, PipelineId(pipeline), 4)
    return info.member.node if info is not None else None


def test_the_next_in_the_ring_comes_first():
    assert chosen(1, candidate(0), candidate(2), candidate(3)) == "node-2-0"
    assert chosen(3, candidate(1), candidate(2), candidate(0)) == "node-0-0"


def test_its_own_node_comes_before_all_others():
    assert chosen(1, candidate(2), candidate(1, foreign_lanes=1)) == "node-1-0"
    assert chosen(1, candidate(1, foreign_lanes=0, lanes=1)) == "node-1-0"


def test_the_least_loaded_comes_before_the_nearest():
    assert chosen(0, candidate(1, 1, lanes=3), candidate(2, 0, lanes=3)) == "node-2-0"


def test_a_node_without_a_free_lane_cannot_help():
    assert chosen(0, candidate(1, foreign_lanes=1), candidate(2, foreign_lanes=1)) is None
    assert chosen(0, candidate(1, foreign_lanes=1), candidate(3)) == "node-3-0"
    assert chosen(0, candidate(1, lanes=1)) is None
    assert chosen(0) is None
