"""Whom the controller kills, and without whom it suspends a pipeline, has to be right as the world is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kevlarflow.recovery.events import Suspend
from kevlarflow.sim import fleet, plan
from kevlarflow.sim.errors import FalseAlarm, NoReason
from kevlarflow.sim.fleet import Fleet
from kevlarflow.sim.network import Cut
from kevlarflow.sim.node import Node
from kevlarflow.types import Epoch, PipelineId, Stage

SEED = 8


@pytest.fixture
def run() -> Fleet:
    """A fleet that is well, of more than one pipeline."""
    run = fleet.run(plan.draw(SEED))
    assert run.plan.shape.pipelines > 1
    assert run.plan.shape.lanes > 1
    return run


def node(run: Fleet) -> Node:
    return run.nodes[run.engines[0].core.members[0]]


def pause(seconds: float) -> Callable[[Fleet], None]:
    def stop_and_go_on(run: Fleet) -> None:
        node(run).freeze()
        run.timeline.now += seconds
        node(run).thaw()

    return stop_and_go_on


def begin(run: Fleet, seconds: float) -> None:
    """It has been loading for so long."""
    node(run).ready, node(run).born_at = False, run.timeline.now - seconds


@pytest.mark.parametrize(
    ("reason", "is_one"),
    [
        (lambda _: None, False),
        (lambda run: setattr(node(run), "deaf", True), True),
        (lambda run: setattr(node(run).thread, "hangs", True), True),
        (lambda run: node(run).freeze(), False),
        (pause(0.2), False),
        (pause(0.3), True),
        (lambda run: run.network.cuts.append(Cut(node(run), frozenset(), True, True)), True),
        (lambda run: setattr(node(run), "parted_at", run.timeline.now - 0.9), True),
        (lambda run: setattr(node(run), "parted_at", run.timeline.now - 1.1), False),
        (lambda run: node(run).failed_at.append(run.timeline.now), False),
        (lambda run: node(run).failed_at.extend([0.0, 0.0]), True),
        (lambda run: setattr(node(run), "told_to_leave_at", run.timeline.now - 1.0), False),
        (lambda run: setattr(node(run), "told_to_leave_at", run.timeline.now - 5.0), True),
        (lambda run: begin(run, 3.9), False),
        (lambda run: begin(run, 4.1), True),
        (lambda run: run.controller.cluster.slots["node-0-0"].renew(1_000), True),
    ],
)
def test_a_node_is_killed_for_few_reasons(run: Fleet, reason: Callable[[Fleet], None], is_one: bool) -> None:
    node(run).failed_at.clear()
    reason(run)
    if is_one:
        run.verdicts.kill(node(run))
    else:
        with pytest.raises(FalseAlarm, match="is killed, and nothing is wrong with it"):
            run.verdicts.kill(node(run))


def suspended(run: Fleet) -> bool:
    """Whether pipeline 1 may be suspended for want of a node of stage 0."""
    try:
        run.verdicts.suspension(Suspend(PipelineId(1), Epoch(1), Stage(0), "no node", True, (Stage(0),)))
    except NoReason:
        return False
    return True


def test_a_pipeline_is_suspended_only_if_nobody_could_serve_it(run: Fleet) -> None:
    others = [each for each in run.living_nodes() if each.stage == 0 and each is not node(run)]
    for each in others:
        run.end_process(each)
    assert not suspended(run), "a node of another pipeline has room"
    node(run).deaf = True
    assert suspended(run)
    node(run).deaf = False
    node(run).ready_at = run.timeline.now - 0.1
    assert suspended(run), "nobody knows of it yet"
    node(run).ready_at = 0.0
    assert not suspended(run)
    run.end_process(node(run))
    assert suspended(run)
