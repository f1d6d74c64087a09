"""How fast the node computes: the time of its decode steps, by size, for `kevlarflow.recovery.pace` to compare.

Steps that also hold parts of prompts are left out, because their work varies most. What remains takes a time that is
linear in the requests and in the tokens whose KV they read; both count in powers of two. The clock runs while the
layers are computed, and stands while the thread waits for a CPU: who shares the machine is not to be blamed for that.
It stands while tokens are sampled, too, which costs what the requests ask for.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

from kevlarflow.node.thread_clock import Spent, ThreadClock
from kevlarflow.types import Pace

MOST_STEPS = 4_096
"""Between two reports; the oldest go first."""
MOST_SIZES = 8
"""In a report: those with the most steps."""

Size = tuple[int, int]


def size_of(step: Any) -> Size | None:
    """Logarithms of the requests of a vLLM `SchedulerOutput` and of their context; None if it is no decode step."""
    requests = len(step.num_scheduled_tokens)
    if requests == 0 or step.total_num_scheduled_tokens != requests:
        return None
    context = sum(new.num_computed_tokens for new in step.scheduled_new_reqs)
    context += sum(step.scheduled_cached_reqs.num_computed_tokens)
    return requests.bit_length(), context.bit_length()


class PaceMeter:
    """Measured by the thread that runs the steps, on which it is made; reported by another."""

    def __init__(self) -> None:
        self._clock = ThreadClock()
        self._size: Size | None = None
        self._began: Spent | None = None
        self._steps: deque[tuple[Size, float]] = deque(maxlen=MOST_STEPS)

    # ---- the main thread

    def begin(self, step: Any) -> None:
        """The layers are about to be computed."""
        self._size = size_of(step) if self._clock.counts_waits else None
        self._began = self._clock.spent() if self._size is not None else None

    def end(self) -> None:
        """They are computed; nothing is sampled yet."""
        if self._size is None or self._began is None:
            return
        now = self._clock.spent()
        self._steps.append((self._size, max(0.0, now.at - self._began.at - (now.waiting - self._began.waiting))))
        self._size = None

    # ---- the heartbeat thread

    def report(self) -> tuple[Pace, ...]:
        """The steps since the last report."""
        steps: dict[Size, list[float]] = defaultdict(list)
        while self._steps:
            size, seconds = self._steps.popleft()
            steps[size].append(seconds)
        rows = [Pace(*size, len(each), sum(each)) for size, each in steps.items()]
        return tuple(sorted(rows, key=lambda row: -row.steps)[:MOST_SIZES])
