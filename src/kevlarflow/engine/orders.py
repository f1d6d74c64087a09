"""What the pipeline's core has for vLLM's scheduler to do, gathered until the scheduler asks."""

from __future__ import annotations

import dataclasses

from kevlarflow.recovery.pipeline_events import Aside, EvictPrefixCache, SetAside, UseBlocks


@dataclasses.dataclass
class SchedulerOrders:
    """To be carried out in the order of these fields."""

    pause: bool = False
    """Whether nobody may be scheduled: the pipeline waits for a node."""
    end_all: str = ""
    """Why all requests have to end."""
    aside: list[Aside] = dataclasses.field(default_factory=list)
    """Requests to be preempted or ended."""
    spoilt: set[int] = dataclasses.field(default_factory=set)
    """Cached blocks that nobody fills."""
    usable: list[frozenset[int] | None] = dataclasses.field(default_factory=list)
    """Blocks that may be given out, None: all. One after another: what was not in each of them holds nothing now."""
    keep: frozenset[int] | None = None
    """Blocks that may stay cached though nobody holds them; None: all."""

    def add(self, command: SetAside | UseBlocks | EvictPrefixCache) -> None:
        """Take a command of the core."""
        match command:
            case SetAside(requests, spoilt):
                self.aside += requests
                self.spoilt |= spoilt
            case UseBlocks(usable):
                self._use(usable)
            case EvictPrefixCache(keep):
                self.keep = keep if self.keep is None else keep & self.keep

    def _use(self, usable: frozenset[int] | None) -> None:
        """Of all but the last only what is in all of them counts: an idle engine may be formed anew for ever."""
        former = [each for each in self.usable if each is not None]
        self.usable = [frozenset.intersection(*former), usable] if former else [usable]
