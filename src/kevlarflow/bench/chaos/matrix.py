"""Every fault, on every stage, in every phase: the deck that a soak deals from.

A case is one cell of the matrix. Those that strike in a phase of a recovery begin with a crash that brings it about.
The deck is shuffled and dealt to its end before any case comes again, so that so many rounds show each case equally
often, and no order of faults is the only one that was tried.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Literal, assert_never

import msgspec

from kevlarflow.bench.chaos.scenario import Aim, AnyFault, Crash, Cut, Load, Moment, Phase, Role, Stop

FREEZE_SECONDS = 0.2
"""Shorter than `stopped_after_ms`: nothing may come of it."""
CUT_SECONDS = 1.0
EARLY_TOKENS = 16
"""A recovery that is to be struck begins by then, so that the load outlasts it."""

Kind = Literal["crash", "hang", "freeze", "cut"]
When = Literal["prefill", "decode", "recovering", "borrowed", "loading", "moving"]

KINDS: tuple[Kind, ...] = ("crash", "hang", "freeze", "cut")
FATAL_KINDS: tuple[Kind, ...] = ("crash", "hang")
BEFORE: tuple[When, ...] = ("prefill", "decode")
HELPERS: tuple[tuple[Role, When], ...] = (
    (Role.DONOR, "recovering"),
    (Role.DONOR, "borrowed"),
    (Role.REPLACEMENT, "loading"),
    (Role.REPLACEMENT, "moving"),
)
"""Who helps a pipeline out, and when that one is hurt."""


class Case(msgspec.Struct, frozen=True):
    """A cell of the matrix."""

    kind: Kind
    role: Role
    stage: int
    when: When

    @property
    def phase(self) -> Phase | None:
        """The phase of a recovery that it strikes in; None: nothing has happened before."""
        return None if self.when in {"prefill", "decode"} else Phase(self.when)

    @property
    def name(self) -> str:
        """For a row of a table."""
        return f"{self.kind} of the {self.whose}, {self.when}"

    @property
    def whose(self) -> str:
        """Who is struck, as seen from the stage that is, or was, hit."""
        if self.role is Role.NODE and self.phase is not None:
            return f"neighbour of stage {self.stage}"
        return str(self.role) if self.role is Role.CONTROLLER else f"{self.role} of stage {self.stage}"


def cases(stages: int) -> list[Case]:
    """The whole matrix: first and last stage."""
    found = []
    for stage in sorted({0, stages - 1}):
        found += [Case(kind, Role.NODE, stage, when) for kind in KINDS for when in BEFORE]
        found += [Case(kind, Role.STANDBY, stage, "decode") for kind in FATAL_KINDS]
        found += [Case(kind, role, stage, when) for kind in FATAL_KINDS for role, when in HELPERS]
        if stages > 1:
            found += [Case(kind, Role.NODE, stage, "recovering") for kind in FATAL_KINDS]
    return found + [Case("crash", Role.CONTROLLER, 0, when) for when in ("decode", "recovering", "loading")]


def deal(seed: int, stages: int) -> Iterator[Case]:
    """All cases in an order drawn from the seed, and again in another, without end."""
    for turn in itertools.count():
        deck = cases(stages)
        random.Random(f"{seed}/{turn}").shuffle(deck)
        yield from deck


def faults_of(case: Case, load: Load, pipeline: int, stages: int, chance: random.Random) -> tuple[AnyFault, ...]:
    """The faults of a case on a pipeline, at a drawn moment of the load: the last one is the case's own."""
    # Some requests end before their last token, so the last third may never come.
    most = load.streams * load.requests * load.tokens // 3
    hit = Aim(pipeline=pipeline, stage=case.stage)
    if case.phase is None:
        # All streams begin at once: with the first token most of them are still computing their prompts.
        tokens = 1 if case.when == "prefill" else chance.randint(load.streams, max(load.streams, most))
        return (_fault(case, Aim(role=case.role, pipeline=pipeline, stage=case.stage), Moment(tokens=tokens)),)
    first = Crash(target=hit, at=Moment(tokens=chance.randint(1, min(EARLY_TOKENS, most))))
    stage = case.stage if case.role is not Role.NODE else (case.stage + 1) % stages
    struck = Aim(role=case.role, pipeline=pipeline, stage=stage)
    return first, _fault(case, struck, Moment(phase=case.phase))


def _fault(case: Case, target: Aim, at: Moment) -> AnyFault:
    match case.kind:
        case "crash":
            return Crash(target=target, at=at)
        case "hang":
            return Stop(target=target, at=at)
        case "freeze":
            return Stop(target=target, at=at, thaw_after_seconds=FREEZE_SECONDS)
        case "cut":
            return Cut(target=target, at=at, seconds=CUT_SECONDS)
        case _:
            assert_never(case.kind)
