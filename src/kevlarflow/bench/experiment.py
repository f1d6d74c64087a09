"""What experiments have in common: the systems take turns, and one that fails does not end the others' runs."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from kevlarflow.bench.recipes import NAMES
from kevlarflow.bench.streams import Stream
from kevlarflow.bench.systems import System, SystemFailed

POLL_SECONDS = 0.02
Answer = TypeVar("Answer")

Say = Callable[[str], None]
"""Tells the person who waits what is going on."""


class Void(Exception):
    """What was just measured counts for nothing; the message says why."""


def turns(rounds: int, names: Sequence[str] = NAMES) -> Iterator[tuple[int, str]]:
    """Number of the round and name of the system, A B B A A B: neither profits from being first."""
    for number in range(rounds):
        order = names if number % 2 == 0 else tuple(reversed(names))
        yield from zip(itertools.repeat(number + 1), order, strict=False)


def whole_rounds(measured: Iterable[tuple[int, Hashable, bool]], wanted: Collection[Hashable]) -> set[int]:
    """Numbers of the rounds that an earlier run has measured wholly; each piece is (round, what, whether it is good).

    A ratio is taken within a round, so one that lacks anything is measured again as a whole.
    """
    good: dict[int, set[Hashable]] = {}
    for number, what, is_good in measured:
        if is_good:
            good.setdefault(number, set()).add(what)
    return {number for number, found in good.items() if found.issuperset(wanted)}


def require_whole(streams: Sequence[Stream], tokens: int) -> None:
    """Raise `Void` unless each stream has all of its tokens."""
    defects = [defect for stream in streams if (defect := stream.defect(tokens)) is not None]
    if defects:
        raise Void(f"{len(defects)} of {len(streams)} streams failed: {defects[0]}")


@contextmanager
def running(system: System, leftovers: list[str]) -> Iterator[float]:
    """A system for the length of a block; gives the seconds until it was ready. Fills `leftovers` at the end."""
    try:
        system.start()
        yield system.wait_ready()
    finally:
        leftovers += system.stop()


async def until(what: str, ask: Callable[[], Answer | None], timeout_seconds: float) -> Answer:
    """Ask until the answer is true, and return it. Raises `SystemFailed` when that takes too long."""
    deadline = time.monotonic() + timeout_seconds
    while not (answer := ask()):
        if time.monotonic() > deadline:
            raise SystemFailed(f"after {timeout_seconds:.0f} s still not: {what}")
        await asyncio.sleep(POLL_SECONDS)
    return answer
