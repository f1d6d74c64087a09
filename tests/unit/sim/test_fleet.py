"""The fleet under drawn faults: fixed seeds hold every invariant, and what is told of a failing one can be repeated."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from kevlarflow.config import ServeConfig
from kevlarflow.node.progress import Step
from kevlarflow.recovery.grid import Grid
from kevlarflow.recovery.invariants import Violated
from kevlarflow.sim import fleet, plan
from kevlarflow.sim.errors import FalseAlarm, NoReason, Overlooked, Restless, Stuck, WrongKv
from kevlarflow.sim.many import run_batch, run_many
from kevlarflow.sim.scheduler import Blocks
from kevlarflow.sim.shrink import failure_of, shrink, story_of
from kevlarflow.types import PipelineId, PipelineState

FIXED_SEEDS = 2_000


def simulate(*arguments: str, hash_seed: str = "0") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-m", "kevlarflow.sim", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_fixed_schedules_hold_every_invariant() -> None:
    done = simulate("--seeds", str(FIXED_SEEDS), "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{FIXED_SEEDS:,} schedules" in done.stdout


def test_what_is_drawn_happens() -> None:
    counts = run_many(range(60), processes=1, quiet=True).counts
    for what in (
        "recoveries",
        "crashes in a phase",
        "cuts in a phase",
        "faults while lanes are prepared",
        "controller crashes",
        "controllers that were stopped",
        "deaths of a engine",
        "preemptions",
        "blocks restored",
        "tokens recomputed",
        "requests cancelled",
        "requests carried over",
        "times a node was stuck in a step",
        "times a node did not hear us",
    ):
        assert counts[what], f"no {what}"


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("drain", "nodes told to leave"),
        ("link", "links that stay broken"),
        ("echo", "messages that came twice"),
        ("partition", "messages held up by a partition"),
        ("engine freeze", "engines that were stopped"),
        ("raise", "pieces of work that raised"),
        ("slow", "pieces of work that were slow"),
    ],
)
def test_each_fault_has_an_effect(kind: str, what: str) -> None:
    with_it = (drawn for drawn in map(plan.draw, itertools.count()) if any(each.kind == kind for each in drawn.faults))
    assert any(fleet.run(each).counts[what] for each in itertools.islice(with_it, 30)), f"no {what}"


def test_a_run_leaves_logging_as_it_was() -> None:
    before = logging.root.manager.disable
    assert run_batch(range(1)).failed is None
    assert logging.root.manager.disable == before


def test_a_seed_is_the_same_run_every_time() -> None:
    here = run_many(range(6), processes=1, quiet=True).counts
    there = simulate("--seeds", "6", "--jobs", "1", hash_seed="1").stdout
    for what, count in here.items():
        assert re.search(rf"(?<![\d,]){count:,} {what}", there), f"not {count:,} {what}: {there}"


def test_a_failing_seed_shrinks_and_tells_its_story(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Blocks, "evict_unheld", lambda *_: None)
    failing = (seed for seed in range(300) if isinstance(failure_of(seed), WrongKv))
    # Of some runs every part is needed.
    seed, without = next((seed, without) for seed in failing if (without := shrink(seed)))
    assert isinstance(failure_of(seed, without), WrongKv)
    whole, small = plan.draw(seed), plan.draw(seed, without)
    assert len(small.faults) + len(small.demands) < len(whole.faults) + len(whole.demands)
    story = story_of(seed, without, lines=30)
    assert "WrongKv: " in story
    assert len(story.splitlines()) <= 33


def test_leaving_a_part_out_leaves_the_others_as_they_were() -> None:
    whole = plan.draw(3)
    less = plan.draw(3, frozenset({whole.faults[0].name, whole.demands[0].name}))
    assert less.faults == whole.faults[1:]
    assert less.demands == whole.demands[1:]


def test_the_end_is_only_well_when_every_request_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "HEAL_SECONDS", 1.0)
    monkeypatch.setattr("kevlarflow.sim.engine.Engine.poke", lambda _: None)
    with pytest.raises(fleet.Stuck, match="has not ended"):
        fleet.run(plan.draw(0))


def afterwards(what: Callable[[fleet.Fleet], None], monkeypatch: pytest.MonkeyPatch) -> fleet.Fleet:
    """A run in which something happens when everything is over and well, and requests have just come again."""
    run = fleet.Fleet(plan.draw(0))

    def tell(who: object, said: object, more: object = ()) -> None:
        if said == "is well":
            run.timeline.after(run.plan.shape.latency / 100, lambda: what(run))

    monkeypatch.setattr(run, "tell", tell)
    return run


def test_what_has_to_be_mended_after_the_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run = afterwards(lambda run: run.end_process(run.living_nodes()[0]), monkeypatch)
    with pytest.raises(Restless, match="all was well, and epochs went from"):
        run.run()


def test_a_request_that_comes_after_the_end_has_to_end_well(monkeypatch: pytest.MonkeyPatch) -> None:
    run = afterwards(lambda run: run.end_process(run.engines[0]), monkeypatch)
    with pytest.raises(NoReason, match="all was well, and w0: the engine died"):
        run.run()


def test_a_fleet_that_is_not_well_any_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def it_is_deaf(run: fleet.Fleet) -> None:
        run.nodes[run.engines[0].core.members[0]].deaf = True

    run = afterwards(it_is_deaf, monkeypatch)
    monkeypatch.setattr("kevlarflow.recovery.detector.Detector._deaf", lambda *_: None)
    with pytest.raises(Stuck, match=r"2 s after all was well: node-0-0#\d is deaf"):
        run.run()


def test_what_goes_wrong_as_time_passes_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    went_wrong: list[float] = []

    def tick(grid: Grid, _: object) -> None:
        for pipeline in grid.pipelines:
            if pipeline.state is PipelineState.SERVING:
                pipeline.wait_until = grid.now
                went_wrong.append(grid.now)

    monkeypatch.setattr("kevlarflow.recovery.nodes.on_tick", tick)
    run = fleet.Fleet(plan.draw(0))
    with pytest.raises(Violated, match="serves, and its bound runs on"):
        run.run()
    assert run.timeline.now == went_wrong[0]


@pytest.mark.parametrize(
    ("kind", "what", "evidence"),
    [("stuck", "times a node was stuck in a step", "_stuck"), ("deaf", "times a node did not hear us", "_deaf")],
)
def test_a_node_that_only_seems_to_live_has_to_be_found(
    kind: str, what: str, evidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = (drawn for drawn in map(plan.draw, itertools.count()) if {each.kind for each in drawn.faults} == {kind})
    drawn = next(each for each in plans if fleet.run(each).counts[what])
    monkeypatch.setattr(f"kevlarflow.recovery.detector.Detector.{evidence}", lambda *_: None)
    with pytest.raises(Overlooked, match="after all other faults were over"):
        fleet.run(drawn)


def test_a_node_that_is_declared_dead_for_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kevlarflow.sim.thread.Thread.look", lambda _: Step(1.0, PipelineId(0), is_overdue=True))
    with pytest.raises(FalseAlarm, match="is declared dead: it was stuck in a step"):
        fleet.run(plan.draw(0))


@functools.cache
def busy_seed(number: int, detail: str) -> int:
    """The seed of a fleet that is busy for long, and whose only fault is a slowness of this kind; none if it is ""."""
    for seed in itertools.count():
        drawn = plan.draw(seed)
        details = [each.detail for each in drawn.faults]
        if drawn.trouble_seconds >= plan.STEADY_SECONDS and details == [detail] * bool(detail):
            number -= 1
            if number < 0:
                return seed
    raise AssertionError("there is no end of seeds")


def test_a_slow_node_gives_its_lane_away() -> None:
    counts = fleet.run(plan.draw(busy_seed(1, plan.SLOW_NODE))).counts
    assert counts["lanes moved from slow nodes"] == 1


def test_a_slow_node_that_is_left_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kevlarflow.recovery.pace.FEWEST_STEPS", 10_000)
    with pytest.raises(Overlooked, match="times slower than it should be"):
        fleet.run(plan.draw(busy_seed(0, plan.SLOW_NODE)))


def test_a_node_that_is_blamed_for_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kevlarflow.sim.fleet.ServeConfig", functools.partial(ServeConfig, slow_ratio=0.5))
    with pytest.raises(FalseAlarm, match="as fast as its peers"):
        fleet.run(plan.draw(busy_seed(0, "")))


def test_a_place_that_is_slow_whoever_is_in_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = plan.draw(busy_seed(1, plan.SLOW_PLACE))
    assert fleet.run(drawn).counts["lanes moved from slow nodes"] == 1
    monkeypatch.setattr("kevlarflow.recovery.slowness.REST_SECONDS", 0.0)
    with pytest.raises(FalseAlarm, match=r"lanes moved \d times"):
        fleet.run(drawn)
