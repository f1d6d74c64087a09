"""What the main loop is doing, and whether that takes longer than it can.

The main thread says when a step begins and ends, and when it rests, which may last; the heartbeat thread looks. The
kernel tells how a thread's time is spent: computing, waiting for a CPU, or asleep. A step is overdue in two cases.
Either its thread *sleeps* for long, as after a deadlock: a crowded machine makes no thread sleep. Or it *computes* far
longer than any step of its size ever has: CPU time, too, does not depend on who else computes. What is long is learnt
from the steps before, and never less than a floor.

Sizes count in powers of two of the scheduled tokens, and each keeps the longest that was seen; of a step that was
overdue and ended after all, only what it was allowed, so that after a pause of all processes a hang does not take ten
times that pause to be seen. All else has no size: other work, and what the loop does in between until it rests or the
next work begins. It has far more time.
"""

from __future__ import annotations

from typing import NamedTuple

from kevlarflow.node.thread_clock import Clock, Spent, ThreadClock
from kevlarflow.types import PipelineId

OVERRUN_FACTOR = 10
"""A step may compute, or sleep, for so many times the longest that was seen of its size."""
UNSEEN_FACTOR = 10
"""The floor is so many times higher for a step of a size that was never seen: libraries load what they need late."""

UNKNOWN_FACTOR = 150
"""What has no size, and the first step of all, may compute for so many times the floor: nothing tells how long that
takes, but it is to end some time."""
UNKNOWN_SIZE = 8
"""Up to this size, less than 256 tokens, the first step of all may compute for so long, and for longer in proportion if
it is larger: a machine without instructions for the model's type takes a minute for a long prompt's chunk."""


class Step(NamedTuple):
    """What `Progress.look` sees."""

    running_seconds: float = 0.0
    pipeline: PipelineId | None = None
    """Whose step it is; None: the loop rests, or is between two steps."""
    is_overdue: bool = False


class _Running(NamedTuple):
    pipeline: PipelineId | None
    size: int | None
    began: Spent


class Longest(NamedTuple):
    """The longest that steps of one size have computed and slept."""

    computing: float
    sleeping: float


class Progress:
    """See the module's text. It is made on the thread that runs the steps, or is given the clock of that."""

    def __init__(self, floor_seconds: float, clock: Clock | None = None) -> None:
        self.done: dict[PipelineId, int] = {}
        """Pieces of work that are done, by pipeline."""
        self._floor = floor_seconds
        self._running: _Running | None = None
        self._longest: dict[int, Longest] = {}
        self._clock: Clock = clock or ThreadClock()

    # ---- the main thread

    def wake(self) -> None:
        """The loop looks for what has arrived; should it never rest or begin something again, nobody else would."""
        self._running = _Running(None, None, self._clock.spent())

    def rest(self) -> None:
        """There is nothing to do until something arrives."""
        self._running = None

    def begin(self, pipeline: PipelineId) -> None:
        """A step goes onto the device."""
        self._running = _Running(pipeline, None, self._clock.spent())

    def measure(self, tokens: int) -> None:
        """The step that runs computes so many tokens."""
        running = self._running
        if running is not None:
            self._running = _Running(running.pipeline, tokens.bit_length(), running.began)

    def end(self) -> None:
        """The step is done, and the loop goes on."""
        running, now = self._running, self._clock.spent()
        self._running = _Running(None, None, now)
        if running is None or running.pipeline is None:
            return
        self.done[running.pipeline] = self.done.get(running.pipeline, 0) + 1
        if running.size is None:
            return
        computing, sleeping = map(min, _since(running.began, now), self._limits(running.size))
        longest = self._longest.get(running.size, Longest(0.0, 0.0))
        self._longest[running.size] = Longest(max(longest.computing, computing), max(longest.sleeping, sleeping))

    # ---- the heartbeat thread

    def look(self) -> Step:
        """The step that runs now, or what the loop does between two."""
        running = self._running
        if running is None:
            return Step()
        now = self._clock.spent()
        computing, sleeping = _since(running.began, now)
        longest_computing, longest_sleeping = self._limits(running.size)
        overdue = computing > longest_computing or (sleeping > longest_sleeping and not self._clock.wants_to_run())
        return Step(now.at - running.began.at, running.pipeline, overdue and self._clock.counts_waits)

    def _limits(self, size: int | None) -> tuple[float, float]:
        """(seconds that a step of this size may compute, seconds that it may sleep)."""
        if size is None:
            return UNKNOWN_FACTOR * self._floor, UNSEEN_FACTOR * self._floor
        if not self._longest:
            scale = 2.0 ** max(0, size - UNKNOWN_SIZE)
            return scale * UNKNOWN_FACTOR * self._floor, UNSEEN_FACTOR * self._floor
        if size in self._longest:
            longest = self._longest[size]
            return (
                max(self._floor, OVERRUN_FACTOR * longest.computing),
                self._floor + OVERRUN_FACTOR * longest.sleeping,
            )
        # The largest that was seen, scaled up; a smaller step takes no longer.
        largest = max(self._longest)
        scale = 2.0 ** max(0, size - largest)
        expected = scale * self._longest[largest].computing
        return max(UNSEEN_FACTOR * self._floor, OVERRUN_FACTOR * expected), UNSEEN_FACTOR * self._floor


def _since(before: Spent, now: Spent) -> tuple[float, float]:
    """(seconds computing, seconds asleep) between two looks."""
    computing = now.computing - before.computing
    sleeping = (now.at - before.at) - computing - (now.waiting - before.waiting)
    return computing, max(0.0, sleeping)
