"""The thread of a simulated node that does all the work: how it spends its time, and that it may hang for ever.

What the node's heartbeats say of it is the real `kevlarflow.node.progress`; this is the twin of the kernel's account.
"""

from __future__ import annotations

from collections.abc import Container

from kevlarflow.node.progress import Progress, Step
from kevlarflow.node.thread_clock import Spent
from kevlarflow.sim.network import Timeline
from kevlarflow.types import PipelineId

ASLEEP, COMPUTING, IN_A_MESSAGE, BETWEEN_WORK = "asleep", "computing", "in a message", "between two pieces of work"
"""Ways to hang: in some piece of work, in an endless loop of a step, while it takes a message about a lane, or while it
looks for what has arrived and what can run."""
WAYS = (ASLEEP, COMPUTING, IN_A_MESSAGE, BETWEEN_WORK)


class Thread:
    """See the module's text. It computes whenever it is at work; nobody here waits for a CPU."""

    counts_waits = True

    def __init__(self, timeline: Timeline, floor_seconds: float) -> None:
        self._timeline = timeline
        self._computed = 0.0
        self._since: float | None = None
        """Since when it computes."""
        self._progress = Progress(floor_seconds, self)
        self.will_hang = ""
        """How, as soon as it can; "" when it will not."""
        self.hangs = False
        self._is_step = self._may_loop = False
        """Whether it has ended a step: before that, an endless one takes a minute to be told from a first one."""

    # ---- what the kernel says

    def spent(self) -> Spent:
        """See `Clock.spent`."""
        now = self._timeline.now
        computing = now - self._since if self._since is not None else 0.0
        return Spent(now, self._computed + computing, 0.0)

    def wants_to_run(self) -> bool:
        """See `Clock.wants_to_run`."""
        return self._since is not None

    # ---- what it does

    def wake(self) -> None:
        """Something has arrived, or has ended: it looks what there is to do."""
        self._since = self._timeline.now
        self._progress.wake()

    def rest(self) -> None:
        """There is nothing to do until something arrives."""
        self._progress.rest()
        self._stop()

    def begin(self, pipeline: PipelineId, tokens: int | None = None) -> None:
        """Something begins; `tokens` is the size of a step."""
        self._since = self._timeline.now
        self._is_step = tokens is not None
        self._progress.begin(pipeline)
        if tokens is not None:
            self._progress.measure(tokens)

    def end(self) -> None:
        """It has ended."""
        self._progress.end()
        self._stop()
        self._may_loop = self._may_loop or self._is_step

    def hangs_in(self, hows: Container[str]) -> bool:
        """Whether it never ends what has begun: something in which it can hang in these ways."""
        if self.will_hang in hows and (self._may_loop or self.will_hang != COMPUTING):
            self.hangs = True
            if self.will_hang != COMPUTING:
                self._stop()
        return self.hangs

    def look(self) -> Step:
        """What a heartbeat says of it."""
        return self._progress.look()

    def _stop(self) -> None:
        if self._since is not None:
            self._computed += self._timeline.now - self._since
            self._since = None
