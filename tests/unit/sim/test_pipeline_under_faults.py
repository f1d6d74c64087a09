"""The real pipeline core over toy stages: no fault may change a token, and planted bugs must be found."""

import dataclasses
from collections.abc import Callable

import pytest

from kevlarflow.recovery import pipeline, pipeline_events, recompute, restoring
from kevlarflow.recovery.ledger import Ledger
from kevlarflow.sim.errors import Violation
from kevlarflow.sim.shapes import REPLICATED, TIGHT, Shape
from kevlarflow.sim.world import World

SEEDS = range(200)
PLANTED_SEEDS = range(1_500)
LONG = dataclasses.replace(TIGHT, stages=6, blocks=9, losses=8, loss_rate=0.15, wait_rate=0.0)
"""Stages in the middle run ahead of the last one: what that one has sampled is over, whoever was lost."""


@pytest.mark.parametrize("first", range(0, len(SEEDS), 100))
def test_every_request_ends_with_the_tokens_of_a_run_without_failure(first: int) -> None:
    recoveries = 0
    for seed in SEEDS[first : first + 100]:
        world = World(seed)
        world.run()
        recoveries += world.recoveries
    assert recoveries > 50, "the runs have to contain faults"


def test_the_toy_scheduler_preempts_and_hits_its_prefix_cache() -> None:
    preemptions = 0
    for seed in range(60):
        world = World(seed, TIGHT)
        world.run()
        preemptions += world.scheduler.preemptions
    assert preemptions > 20


def no_eviction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kevlarflow.sim.scheduler.Blocks.evict_unheld", lambda *_: None)


def no_recomputed_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_hits", lambda *_: [])


def no_late_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "plan_hits", lambda *_: [])


def damage_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_taken", lambda *_: set())


def computed_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Ledger._continue

    def shrink(self: Ledger, continuation: object) -> None:
        original(self, continuation)  # type: ignore[arg-type]
        self[continuation.request].computed -= 1  # type: ignore[attr-defined]

    monkeypatch.setattr(Ledger, "_continue", shrink)


def steps_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pipeline.Pipeline._form

    def shuffled(self: pipeline.Pipeline, order: object, now: float) -> list[pipeline_events.Command]:
        commands = original(self, order, now)  # type: ignore[arg-type]
        steps = [c for c in commands if isinstance(c, pipeline_events.Execute)]
        return [c for c in commands if not isinstance(c, pipeline_events.Execute)] + steps[::-1]

    monkeypatch.setattr(pipeline.Pipeline, "_form", shuffled)


def preemption_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_uses_its_blocks", lambda *_: True)
    monkeypatch.setattr(
        Ledger, "_drop", lambda self, step: [self._entries.pop(request, None) for request in step.finished]
    )


def short_by_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    original = recompute._need

    def short(entry: object, through: object) -> object:
        need = original(entry, through)  # type: ignore[arg-type]
        return need.__class__(need.part(need.span.start, max(0, need.span.end - 4)), need.through)

    monkeypatch.setattr(recompute, "_need", short)


def watermark_off_by_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    original = restoring.filled_everywhere

    def too_much(placed: object) -> dict[int, int]:
        held = original(placed)  # type: ignore[arg-type]
        return held | {block + 1: 2 for block in held}

    monkeypatch.setattr(restoring, "filled_everywhere", too_much)


def missing_replicas_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    original = pipeline.Pipeline._replicas_placed

    def believe(
        self: pipeline.Pipeline, event: pipeline_events.ReplicasPlaced, now: float
    ) -> list[pipeline_events.Command]:
        return original(self, dataclasses.replace(event, missing=()), now)

    monkeypatch.setattr(pipeline.Pipeline, "_replicas_placed", believe)


@pytest.mark.parametrize(
    ("plant", "shape"),
    [
        (no_eviction, TIGHT),
        (no_recomputed_hits, TIGHT),
        (no_late_hits, TIGHT),
        (damage_ignored, LONG),
        (computed_off_by_one, TIGHT),
        (steps_out_of_order, TIGHT),
        (preemption_ignored, TIGHT),
        (short_by_a_block, TIGHT),
        (watermark_off_by_a_block, REPLICATED),
        (missing_replicas_ignored, REPLICATED),
        (no_eviction, REPLICATED),
    ],
)
def test_a_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    for seed in PLANTED_SEEDS:
        try:
            World(seed, shape).run()
        except (Violation, KeyError, IndexError):
            return
    pytest.fail(f"{plant.__name__} was not found in {len(PLANTED_SEEDS)} runs")
