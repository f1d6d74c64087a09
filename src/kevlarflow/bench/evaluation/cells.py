"""What is measured: settings, systems, request rates, fault scripts; and the suites, each cell with its reason.

A full matrix would take days. `FULL` holds the cells that the claims need, and no more than 40.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import msgspec

from kevlarflow.bench.evaluation.workload import Planned, Workload
from kevlarflow.bench.machine import Machine
from kevlarflow.bench.recipes import Recipe
from kevlarflow.emulation.profile import GIGABIT, Profile

STOCK, STOCK_DP, REPLAY, KEVLARFLOW = "stock", "stock-dp", "replay", "kevlarflow"
SYSTEMS = {
    STOCK: "R servers of vLLM -pp S behind vllm-router (health checks, retries), each restarted when it exits",
    STOCK_DP: "one vLLM server -pp S -dp R, restarted when it exits",
    REPLAY: "KevlarFlow without replication: what was lost is computed again",
    KEVLARFLOW: "KevlarFlow, everything on",
}
LIGHT, NEAR, ABOVE = "light", "near", "above"
RATES = {
    LIGHT: "a quarter of what the system carries",
    ABOVE: "with two pipelines, more than the nodes that are left after a loss carry",
    NEAR: "near what the whole system carries (emulated: at 1 Gbps)",
}


class Strike(msgspec.Struct, frozen=True):
    """SIGKILL of the node (or worker) that serves a stage of a pipeline."""

    pipeline: int
    stage: int
    after_seconds: float = 0.0
    """After the fault script begins."""


class Setting(msgspec.Struct, frozen=True):
    """A cluster and its load."""

    name: str
    recipe: Recipe
    rates: dict[str, float]
    """Requests per second."""
    before_seconds: float
    """Load before the fault."""
    after_seconds: float
    """Load after it: the failure window, the same for every system."""
    profile: Profile | None = None
    """None: the model is computed."""
    replication_bytes_per_second: int | None = None
    """None: KevlarFlow's own."""
    length_scale: float = 1 / 8

    def stages_by_name(self) -> dict[str, int]:
        """First, middle and last stage."""
        return {"first": 0, "middle": self.recipe.stages // 2, "last": self.recipe.stages - 1}


class Cell(msgspec.Struct, frozen=True):
    """One life of one system under one load and one fault script."""

    setting: str
    system: str
    rate: str
    fault: str
    """``none``; ``one-first``, ``one-middle``, ``one-last``; ``two``: in two pipelines, at different stages."""
    seed: int = 0
    why: str = ""

    @property
    def name(self) -> str:
        """Names its file, too."""
        return f"{self.setting}.{self.system}.{self.rate}.{self.fault}.{self.seed}"


# Eager and float32 on both sides: stock starts faster so than with compilation, and outputs can be compared.
REAL = Setting(
    name="real-2x2",
    recipe=Recipe(stages=2, pipelines=2, eager=True, dtype="float32", extra=("--no-enable-prefix-caching",)),
    rates={LIGHT: 0.4, ABOVE: 0.8, NEAR: 1.1},
    before_seconds=30.0,
    after_seconds=120.0,
)


CARRIED_BY_A_PIPELINE = 10.5
"""Requests/s of this load at the A10's own speed and 1 Gbps, as measured: the goodput of an overloaded cluster.

Faster links get the same rates, so that what they change shows at the same load.
"""


def _emulated(name: str, pipelines: int, gigabits: int, slowdown: float) -> Setting:
    """The paper's cluster. Copies get half of a link; what activations take is in each stage's time."""
    profile = Profile(stages=4, link_bits_per_second=gigabits * GIGABIT, slowdown=slowdown)
    recipe = Recipe(
        model="emulated",
        stages=4,
        pipelines=pipelines,
        eager=True,
        dtype="float32",
        kv_cache_memory_bytes=256 * 2**20,
        extra=("--no-enable-prefix-caching", "--block-size", "32", "--max-num-seqs", "32",
               "--max-num-batched-tokens", "512"),
    )  # fmt: skip
    carries = CARRIED_BY_A_PIPELINE * pipelines / slowdown
    return Setting(
        name=name,
        recipe=recipe,
        rates={LIGHT: round(carries / 4, 2), ABOVE: round(carries * 0.65, 2), NEAR: round(carries * 0.85, 2)},
        before_seconds=50.0,
        after_seconds=150.0,
        profile=profile,
        replication_bytes_per_second=int(gigabits * GIGABIT / 8 / 2 / slowdown),
    )


SETTINGS = {
    setting.name: setting
    for setting in (
        REAL,
        # As little as lets two cores run the host side of so many workers, with a restart beside them.
        _emulated("a10-2x4-1g", 2, 1, 6.0),
        _emulated("a10-2x4-100g", 2, 100, 6.0),
        _emulated("a10-4x4-1g", 4, 1, 12.0),
    )
}

ASKED_RATE = "rps"
NO_FAULT = "none"
FAULTS = (NO_FAULT, "one-first", "one-middle", "one-last", "two")
TWO_APART_SECONDS = 5.0


def strikes(cell: Cell) -> list[Strike]:
    """The fault script of a cell."""
    stages = SETTINGS[cell.setting].stages_by_name()
    if cell.fault == NO_FAULT:
        return []
    if cell.fault == "two":
        return [Strike(0, stages["middle"]), Strike(1, stages["first"], TWO_APART_SECONDS)]
    return [Strike(0, stages[cell.fault.removeprefix("one-")])]


def rate_of(cell: Cell) -> float:
    """Requests per second; a rate that is no word of `RATES` was asked for as a number, such as 2.5rps."""
    known = SETTINGS[cell.setting].rates
    return known[cell.rate] if cell.rate in known else float(cell.rate.removesuffix(ASKED_RATE))


def workload(cell: Cell, trace: str | None = None, arrivals: str | None = None) -> Workload:
    """The load of a cell; the same for every system and fault, so that outputs can be compared."""
    setting = SETTINGS[cell.setting]
    seconds = setting.before_seconds + setting.after_seconds
    load = Workload(
        rate_of(cell), seconds, setting.length_scale, seed=cell.seed,
        longest_prompt=setting.recipe.max_model_len // 2,
    )  # fmt: skip
    changes = {name: value for name, value in (("trace", trace), ("arrivals", arrivals)) if value is not None}
    return msgspec.structs.replace(load, **changes)


def conditions(cell: Cell, requests: Sequence[Planned], here: Machine) -> str:
    """Names the setting, the load and the machine of a cell; whoever changes one of them makes another name."""
    return f"{_digest(SETTINGS[cell.setting])}-{_digest(list(requests))}-{_digest(here.lasting())}"


def is_of_today(cell: Cell, measured_under: str) -> bool:
    """Whether a cell's `conditions` were those of its setting as it is now; its load may have been another."""
    setting = SETTINGS.get(cell.setting)
    return setting is not None and measured_under.startswith(f"{_digest(setting)}-")


def _digest(thing: msgspec.Struct | list[Planned]) -> str:
    return f"{zlib.crc32(msgspec.json.encode(thing)):08x}"


def _rows(setting: str, rate: str, fault: str, systems: str, why: str, seed: int = 0) -> Iterator[Cell]:
    return (Cell(setting, system, rate, fault, seed, why) for system in systems.split())


def _quick() -> Iterator[Cell]:
    yield from _rows("real-2x2", LIGHT, "one-last", "kevlarflow stock", "MTTR and lost requests, on a real model")


def _full() -> Iterator[Cell]:
    """Most telling first: who stops it half way has the answers that matter most."""
    real, paper, fast, large = "real-2x2", "a10-2x4-1g", "a10-2x4-100g", "a10-4x4-1g"
    everyone = "kevlarflow stock replay stock-dp"
    yield from _quick()
    yield from _rows(paper, NEAR, "one-middle", everyone, "the paper's case: all ratios; what each idea brings")
    yield from _rows(paper, NEAR, NO_FAULT, "kevlarflow stock-dp", "overhead; reference output; latency against rate")
    yield from _rows(real, NEAR, NO_FAULT, "kevlarflow stock-dp", "overhead; reference output")
    yield from _rows(paper, NEAR, "two", "kevlarflow stock", "two losses, as in the paper")
    yield from _rows(paper, ABOVE, "one-middle", "kevlarflow stock", "goodput left after a loss; queueing")
    yield from _rows(paper, LIGHT, "one-middle", "kevlarflow stock", "ratios without queueing")
    yield from _rows(real, NEAR, "one-last", "kevlarflow stock stock-dp", "MTTR, losses, wrong tokens; near capacity")
    yield from _rows(real, NEAR, NO_FAULT, "kevlarflow stock-dp", "overhead, again: spread", seed=1)
    yield from _rows(paper, NEAR, "one-middle", "kevlarflow stock", "spread between runs", seed=1)
    yield from _rows(paper, NEAR, "one-first", "kevlarflow", "does the stage matter: first")
    yield from _rows(paper, NEAR, "one-last", "kevlarflow", "does the stage matter: last")
    yield from _rows(fast, NEAR, "one-middle", "kevlarflow stock", "does the link matter")
    yield from _rows(large, NEAR, "one-middle", "kevlarflow stock", "16 nodes, as in the paper")
    yield from _rows(large, NEAR, "two", "kevlarflow stock", "16 nodes, two losses")


SUITES = {"quick": list(_quick()), "full": list(_full())}
