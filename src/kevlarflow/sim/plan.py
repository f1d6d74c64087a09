"""What is drawn for one run: a fleet, what its clients want, and what befalls it.

A plan follows from its seed alone. Each request and each fault has a name and a source of chance of its own, so one of
them can be left out (`without`) and the others stay what they were: that is how a failing run is made smaller.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from kevlarflow.node.kept import MAX_BYTES
from kevlarflow.sim.stage import VOCABULARY, next_token
from kevlarflow.sim.thread import WAYS

LOAD_SECONDS = 0.8
"""Requests arrive, and faults begin, within this time."""
STEADY_SHARE = 0.006
"""Of the seeds: fleets that are busy for longer."""
STEADY_KINDS = ("slow", "slow place", "well", "slow and more")
SLOW_NODE, SLOW_PLACE = "the node, which has to be noticed", "the place, whatever node is in it"
STEADY_SECONDS, STEADY_REQUESTS = 5.0, 40
"""How long faults last in them, and how many requests each pipeline has to serve."""
SLOW_PLACE_SECONDS, SLOW_PLACE_REQUESTS = 9.0, 80
"""The same where a place is slow: a second judgement on it has to be possible."""
LONGEST_AFTERWARDS = 16
"""Tokens of a prompt that comes when everything is over."""
FOR_GOOD, AS_IT_LOADS = "for good", "the next that loads, for good"
PHASES = ("join", "place", "recompute", "restore", "reissue", "prepare", "flush", "flushed")
"""Of a recovery; the last three are of a change of nodes that is planned."""
POISONOUS = 0.04
"""How many of the requests are deadly for the nodes that compute them."""
KINDS = {
    "crash": 10,
    "crash in a phase": 8,
    "cut in a phase": 2,
    "freeze": 4,
    "slow": 2,
    "partition": 4,
    "cut": 5,
    "link": 1,
    "delay": 1,
    "echo": 1,
    "raise": 1,
    "stuck": 2,
    "deaf": 1,
    "drain": 2,
    "engine": 1,
    "engine freeze": 2,
    "controller": 3,
    "forgetful controller": 1,
    "controller freeze": 1,
}
"""Kinds of faults, with how often each is drawn."""


@dataclass(frozen=True)
class Shape:
    """The fleet, and how fast it is. Times are seconds."""

    stages: int
    pipelines: int
    lanes: int
    """How many pipelines a node can serve at once."""
    blocks: int
    block_size: int
    budget: int
    """Tokens of a step."""
    max_running: int
    replicates: bool
    standby_blocks: int
    """What a standby has memory for."""
    interval: int
    """Tokens between copies of a partly filled block; 0: full ones only."""
    latency: float
    step: float
    start: float
    """What a node takes to load."""
    wait: float
    """How long requests wait for a node when a stage has none."""


@dataclass(frozen=True)
class Demand:
    """What one client wants."""

    name: str
    at: float
    pipeline: int
    prompt: tuple[int, ...]
    expected: tuple[int, ...]
    """Prompt and output of a run without failure."""
    cancelled_after: float | None
    poisons: tuple[int, int] | None = None
    """(stage, position): a node of that stage dies of computing that position, or a later one."""


@dataclass(frozen=True)
class Fault:
    """What befalls whom: of a stage, the pipeline's own node, the one that serves it, or the one that stands by."""

    name: str
    at: float
    kind: str
    pipeline: int
    stage: int
    whose: str
    seconds: float
    """How long it lasts, or how long until the process is started again."""
    detail: str = ""
    """The phase of a crash or a cut; the peers of a partition; what a cut breaks; with whom a link stays broken;
    whether a controller dies among its own deeds; how a node hangs; whether one that is stopped can be killed, and goes
    on some time."""
    strength: float = 0.0

    def __str__(self) -> str:
        what = f" ({self.detail})" if self.detail else ""
        return f"{self.name}: {self.kind}{what} of {self.whose} {self.pipeline}-{self.stage} for {self.seconds:.3f} s"


@dataclass(frozen=True)
class Plan:
    """See the module's text."""

    seed: int
    shape: Shape
    demands: tuple[Demand, ...]
    faults: tuple[Fault, ...]
    trouble_seconds: float = LOAD_SECONDS + 1.0
    """How long faults may last."""
    afterwards: tuple[Demand, ...] = ()
    """What clients want once everything is over and well: prompts that were seen before, whole or in part."""

    @property
    def reads_records(self) -> bool:
        """Whether the controller sees all nodes die and forgets none: then it reads what each was computing."""
        unseen = any("controller" in each.detail or each.detail == "hard to kill" for each in self.faults)
        return not unseen and all(each.kind != "forgetful controller" for each in self.faults)

    @property
    def reads_endings(self) -> bool:
        """Whether the controller can tell a node that was killed from one that has died of what it computed."""
        return self.seed % 4 != 0

    @property
    def output_bytes(self) -> int:
        """The size of what stages compute: in some runs they can keep little of it, and in others nothing."""
        return {0: MAX_BYTES // 3, 1: MAX_BYTES + 1}.get(self.seed % 16, 1)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all that can be left out, the most telling first."""
        nodes = [f"p{index}" for index in range(self.shape.pipelines - 1, 0, -1)]
        nodes += [f"s{index}" for index in range(self.shape.stages - 1, 0, -1)]
        return (*(each.name for each in self.faults), *(each.name for each in self.demands), *nodes)


def draw(seed: int, without: frozenset[str] = frozenset()) -> Plan:
    """The plan of a seed, without the named requests, faults, pipelines and stages."""
    if random.Random(f"{seed} steady").random() < STEADY_SHARE:
        return _draw_steady(seed, without)
    shape = _shape(random.Random(f"{seed} shape"), without)
    common, demands = _demands(seed, shape)
    faults = _faults(seed, shape, demands)
    kept = tuple(each for each in demands if each.name not in without)
    afterwards = _afterwards(seed, shape, common, demands)
    return Plan(seed, shape, kept, tuple(each for each in faults if each.name not in without), afterwards=afterwards)


def _draw_steady(seed: int, without: frozenset[str]) -> Plan:
    """A fleet that is busy for seconds, so that slowness shows: in one node, in none, or in one amid other faults."""
    rng = random.Random(f"{seed} steady load")
    kind = rng.choice(STEADY_KINDS)
    seconds, requests = STEADY_SECONDS, STEADY_REQUESTS
    if kind == "slow place":
        seconds, requests = SLOW_PLACE_SECONDS, SLOW_PLACE_REQUESTS
    pipelines = rng.choice([2, 3])
    drawn = _shape(random.Random(f"{seed} shape"), without)
    if kind == "slow place":
        # Without copies a lane moves late, and what is slow in the end has no time to be judged again.
        drawn = replace(drawn, replicates=True, standby_blocks=100)
    shape = replace(
        drawn, pipelines=pipelines - sum(f"p{index}" in without for index in range(1, pipelines)),
        lanes=pipelines, blocks=24, block_size=4, budget=16, max_running=2, latency=0.002, step=0.005, start=0.3,
    )  # fmt: skip
    longest = (shape.blocks - 1) * shape.block_size - 1
    common = [rng.randrange(VOCABULARY) for _ in range(longest)]
    demands = []
    for index in range(requests * pipelines):
        name = f"r{index}"
        each = random.Random(f"{seed} {name}")
        demand = _demand(each, name, shape, common, burst=True)
        demands.append(replace(demand, pipeline=index % shape.pipelines, cancelled_after=None, poisons=None))
    faults = _steady_faults(seed, kind, rng, shape, tuple(demands))
    kept = tuple(each for each in demands if each.name not in without)
    afterwards = _afterwards(seed, shape, common, tuple(demands))
    return Plan(seed, shape, kept, tuple(each for each in faults if each.name not in without), seconds, afterwards)


def _steady_faults(
    seed: int, kind: str, rng: random.Random, shape: Shape, demands: tuple[Demand, ...]
) -> tuple[Fault, ...]:
    others = _faults(seed, shape, demands)[:2] if kind == "slow and more" else ()
    others = tuple(replace(each, at=each.at + 3 * rng.random()) for each in others if each.kind != "slow")
    slow = Fault(
        name="slow",
        at=0.3 * rng.random(),
        kind="slow",
        pipeline=rng.randrange(shape.pipelines),
        stage=rng.randrange(shape.stages),
        whose="own",
        seconds=SLOW_PLACE_SECONDS,
        detail={"slow": SLOW_NODE, "slow place": SLOW_PLACE}.get(kind, ""),
        strength=0.15 + 0.15 * rng.random(),
    )
    return () if kind == "well" else (slow, *others)


def _shape(rng: random.Random, without: frozenset[str]) -> Shape:
    stages = rng.choice([1, 2, 2, 2, 3])
    pipelines = rng.choice([1, 2, 2, 2, 3, 3, 3, 4])
    block_size = rng.choice([2, 4])
    return Shape(
        stages=stages - sum(f"s{index}" in without for index in range(1, stages)),
        pipelines=pipelines - sum(f"p{index}" in without for index in range(1, pipelines)),
        lanes=rng.choice([1, 2, 2, 2, 3, 3, 4, 4]),
        blocks=rng.choice([9, 9, 11, 14, 24]),
        block_size=block_size,
        budget=rng.choice([4, 6, 16]),
        max_running=rng.choice([2, 4, 6]),
        replicates=rng.random() < 0.75,
        standby_blocks=rng.choice([8, 24, 100]),
        interval=rng.choice([0, 1, 2]),
        latency=rng.choice([0.0005, 0.002, 0.01]),
        step=rng.choice([0.002, 0.005, 0.01]),
        start=rng.choice([0.1, 0.3, 1.0]),
        wait=rng.choice([0.0, 0.1, 0.5, 3.0]),
    )


def _demands(seed: int, shape: Shape) -> tuple[list[int], tuple[Demand, ...]]:
    """The tokens with which all prompts may begin, and what clients want."""
    rng = random.Random(f"{seed} demands")
    longest = (shape.blocks - 1) * shape.block_size - 1
    common = [rng.randrange(VOCABULARY) for _ in range(longest)]
    names = [f"r{index}" for index in range(rng.choice([1, 2, 4, 8]) + shape.pipelines)]
    burst = rng.random() < 0.5
    return common, tuple(_demand(random.Random(f"{seed} {name}"), name, shape, common, burst) for name in names)


def _afterwards(seed: int, shape: Shape, common: list[int], demands: tuple[Demand, ...]) -> tuple[Demand, ...]:
    """For each pipeline the beginning that prompts have in common, or what became of a request, to go on from."""
    wave = []
    for pipeline in range(shape.pipelines):
        rng = random.Random(f"{seed} afterwards {pipeline}")
        known = [each.expected for each in demands if each.pipeline == pipeline]
        tokens = rng.choice(known) if known and rng.random() < 0.7 else tuple(common)
        prompt = tokens[: rng.randint(1, min(len(tokens), len(common) - 1, LONGEST_AFTERWARDS))]
        wave.append(Demand(f"w{pipeline}", 0.0, pipeline, prompt, (*prompt, next_token(prompt)), None))
    return tuple(wave)


def _demand(rng: random.Random, name: str, shape: Shape, common: list[int], burst: bool) -> Demand:
    longest = len(common)
    length = rng.randint(1, max(1, min(20, longest // 2)))
    shared = rng.randint(0, length)
    tokens = common[:shared] + [rng.randrange(VOCABULARY) for _ in range(length - shared)]
    prompt = tuple(tokens)
    for _ in range(rng.randint(1, max(1, min(30, longest - length)))):
        tokens.append(next_token(tokens))
    return Demand(
        name=name,
        at=rng.random() * (0.02 if burst else LOAD_SECONDS),
        pipeline=rng.randrange(shape.pipelines),
        prompt=prompt,
        expected=tuple(tokens),
        cancelled_after=rng.random() * 0.2 if rng.random() < 0.1 else None,
        poisons=(rng.randrange(shape.stages), rng.randrange(len(tokens))) if rng.random() < POISONOUS else None,
    )


def _faults(seed: int, shape: Shape, demands: tuple[Demand, ...]) -> tuple[Fault, ...]:
    """Most faults begin while some request is under way; often several at once."""
    rng = random.Random(f"{seed} faults")
    count = rng.choice([1, 2, 3, 3, 4, 6])
    moments = [_moment(rng, shape, demands) for _ in range(1 if rng.random() < 0.3 else count)]
    spread = rng.choice([0.0, 0.002, 0.05])
    names = (f"f{index}" for index in range(count))
    return tuple(_fault(random.Random(f"{seed} {name}"), name, shape, moments, spread) for name in names)


def _moment(rng: random.Random, shape: Shape, demands: tuple[Demand, ...]) -> tuple[float, int]:
    """A time at which some request may be under way, and its pipeline."""
    demand = rng.choice(demands)
    return demand.at + 6 * shape.stages * shape.step * rng.random(), demand.pipeline


def _fault(rng: random.Random, name: str, shape: Shape, moments: list[tuple[float, int]], spread: float) -> Fault:
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    details = {
        "crash in a phase": PHASES,
        "cut in a phase": PHASES,
        "partition": ("controller", "engine", "node", "controller engine node"),
        "cut": ("controller", "engine", "activations", "copies", "engine controller", "all", "all"),
        "link": ("engine", "next"),
        "freeze": ("", "", "hard to kill", FOR_GOOD, AS_IT_LOADS),
        "controller": ("", "as it acts"),
        "engine freeze": ("", "", FOR_GOOD),
        "stuck": WAYS,
    }
    at, busy = rng.choice(moments)
    return Fault(
        name=name,
        at=at + rng.random() * spread,
        kind=kind,
        pipeline=busy if rng.random() < 0.7 else rng.randrange(shape.pipelines),
        stage=rng.randrange(shape.stages),
        whose=rng.choice(["own", "serving", "serving", "standby"]),
        seconds=rng.choice([0.01, 0.1, 0.4, 1.0]) * (0.5 + rng.random()),
        detail=rng.choice(details.get(kind, ("",))),
        strength=rng.random(),
    )
