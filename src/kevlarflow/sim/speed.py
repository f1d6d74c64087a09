"""How fast a simulated node computes, and what it says of that: the twin of `kevlarflow.node.pace`."""

from __future__ import annotations

from kevlarflow.types import Pace

Size = tuple[int, int]

AFTERWARDS_SECONDS = 2.0
"""For so long what a node says of its steps may be about a time when it was slow."""


class Speed:
    """Of one node. Times are seconds."""

    def __init__(self) -> None:
        self.factor = 1.0
        """Times as long as it should take for everything."""
        self.slow_until = float("-inf")
        """When it was last slower than it should be; in the future while it is."""
        self._began: float | None = None
        self._steps: dict[Size, list[float]] = {}

    def slow_down(self, factor: float) -> None:
        """From now on."""
        self.factor, self.slow_until = factor, float("inf")

    def speed_up(self, now: float) -> None:
        """Be as fast as the others again."""
        if self.factor != 1.0:
            self.factor, self.slow_until = 1.0, now

    def begin(self, now: float) -> None:
        """A piece of work begins."""
        self._began = now

    def cut_short(self) -> None:
        """It ends before its time, which says nothing of this node."""
        self._began = None

    def end(self, size: Size | None, now: float) -> None:
        """It has ended; None is the size of all that is no decode step."""
        if size is not None and self._began is not None:
            self._steps.setdefault(size, []).append(now - self._began)

    def report(self) -> tuple[Pace, ...]:
        """The decode steps since the last report."""
        steps, self._steps = self._steps, {}
        return tuple(Pace(*size, len(each), sum(each)) for size, each in steps.items())
