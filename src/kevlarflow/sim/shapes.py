"""What is drawn for one run of a pipeline core alone (`sim.world`)."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What is drawn for one run."""

    stages: int
    blocks: int
    block_size: int
    budget: int
    requests: int
    losses: int
    loss_rate: float
    """How likely a loss is between two actions, while losses are left: early, or spread over the run."""
    replicates: bool
    reshares: int = 0
    """How often the number of lanes that share a node changes, about as often as nodes are lost."""
    raise_rate: float = 0.0
    """How likely a step raises on a stage."""
    blames: bool = False
    """Whether nobody knows what lost nodes were computing, so that losses are held against the steps in flight."""
    wait_rate: float = 0.0
    """How likely a lost node has no successor for a while."""
    copies: int = 1
    """Blocks that are copied to a standby at a time."""


def draw(rng: random.Random) -> Shape:
    """A shape in which a request always fits into the KV memory alone."""
    return Shape(
        stages=rng.randint(1, 4),
        blocks=rng.randint(9, 24),
        block_size=rng.choice([2, 4]),
        budget=rng.choice([4, 6, 16]),
        requests=rng.randint(2, 8),
        losses=rng.randint(0, 8),
        loss_rate=rng.choice([0.1, 0.02, 0.005]),
        replicates=rng.random() < 0.7,
        reshares=rng.choice([0, 2, 8]),
        raise_rate=rng.choice([0.0, 0.0, 0.02]),
        blames=rng.random() < 0.2,
        wait_rate=rng.choice([0.0, 0.3, 1.0]),
        copies=rng.choice([1, 8]),
    )


TIGHT = Shape(
    stages=3, blocks=10, block_size=2, budget=6, requests=8, losses=4, loss_rate=0.02, replicates=False, wait_rate=0.2
)
"""Hardly any memory: requests are preempted all the time, and their blocks given away at once."""
REPLICATED = Shape(
    stages=2, blocks=14, block_size=2, budget=6, requests=8, losses=4, loss_rate=0.05, replicates=True, wait_rate=0.2
)
PROMPTS = Shape(
    stages=3, blocks=24, block_size=2, budget=4, requests=3, losses=8, loss_rate=0.05, replicates=True, copies=24
)
"""Prompts in many chunks, which are copied as soon as they are computed."""


def shape_of(seed: int) -> Shape | None:
    """One run in four is tight, one replicates, one has long prompts, and the shape of the fourth is drawn."""
    return (TIGHT, REPLICATED, PROMPTS, None)[seed % 4]
