"""Which KV blocks requests hold, and what a step changes in that.

A block that no request holds any more keeps its content until it is given away: vLLM's prefix cache may hit it. So a
replica of it is worth less than one that a running request would resume from, and a standby that is full drops it
first. Requests share blocks of a common prefix, so their holders are counted, step by step; nothing is ever searched.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable
from typing import NamedTuple


class Use(NamedTuple):
    """What changed since the step before, by block."""

    taken: tuple[int, ...] = ()
    """Held by some request, and by none before."""
    released: tuple[int, ...] = ()
    """Held by no request any more."""


NO_CHANGE = Use()


class Holders:
    """How many requests hold each block."""

    def __init__(self) -> None:
        self._count: collections.Counter[int] = collections.Counter()
        self._held_before: dict[int, bool] = {}
        """Whether each block that was touched since the last `change` was held then."""

    def clear(self) -> None:
        """There are no requests, and nobody who has to hear of it."""
        self._count.clear()
        self._held_before.clear()

    def take(self, blocks: Iterable[int]) -> None:
        """One more request holds these."""
        for block in blocks:
            self._held_before.setdefault(block, block in self._count)
            self._count[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One of the requests that hold these does so no more."""
        for block in blocks:
            self._held_before.setdefault(block, block in self._count)
            self._count[block] -= 1
            if self._count[block] <= 0:
                del self._count[block]

    def change(self) -> Use:
        """What has changed since the last call."""
        before, self._held_before = self._held_before, {}
        return Use(
            taken=tuple(block for block, held in before.items() if not held and block in self._count),
            released=tuple(block for block, held in before.items() if held and block not in self._count),
        )
