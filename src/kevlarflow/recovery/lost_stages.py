"""Which stages have lost KV: those whose node is another than the one that is known to hold all KV of the lane.

That is remembered by member, not by message, and a member holds it only when its part of a forming is done. So a second
loss in the middle of a recovery needs no special case: what was missing is missing still.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kevlarflow.types import Member, NodeInfo, Stage

MOST_LOSSES = 16
"""That are remembered apart."""


class LostStages:
    """See the module's text. `count` is the count of formations, of which a step bears that of its scheduling."""

    def __init__(self) -> None:
        self._whole_on: dict[Stage, Member] = {}
        self._resting: set[Stage] = set()
        """New stages that have yet to put kept prefixes in place: until they have, they are not whole."""
        self._hits: dict[int, frozenset[Stage]] = {}
        """Chunks under way, with the stages that lack what is computed in them: nor are those."""
        self._lost_at: dict[int, frozenset[Stage]] = {}

    def find(self, nodes: Sequence[NodeInfo], count: int) -> frozenset[Stage]:
        """The stages that are not whole on the nodes that are to serve from now on; noted as lost at `count`."""
        lost = frozenset(
            Stage(index) for index, node in enumerate(nodes) if self._whole_on.get(Stage(index)) != node.member
        )
        for stage in lost:
            self._whole_on.pop(stage, None)
        self._resting.clear()
        self._hits.clear()
        self.note(lost, count)
        return lost

    def note(self, lost: frozenset[Stage], count: int) -> None:
        """A step that is scheduled under a smaller count may count on KV that these stages do not have."""
        self._lost_at[count] = lost
        if len(self._lost_at) > MOST_LOSSES:
            # An idle engine may be formed for ever. Who is told of the first as if it were the second computes more.
            first, second, *_ = self._lost_at
            self._lost_at[second] |= self._lost_at.pop(first)

    def since(self, count: int) -> frozenset[Stage]:
        """Stages lost by formations that a step scheduled under `count` did not know of; forgets older ones."""
        self._lost_at = {number: lost for number, lost in self._lost_at.items() if number > count}
        return frozenset().union(*self._lost_at.values())

    def await_rest(self, stages: Iterable[Stage]) -> None:
        """The new nodes of these were told to put kept prefixes in place as well."""
        self._resting = set(stages)

    @property
    def awaits_rest(self) -> bool:
        """Whether some new node has yet to put kept prefixes in place."""
        return bool(self._resting)

    def rest_placed(self, stage: Stage) -> bool:
        """The new node of a stage has done so; returns whether that was awaited."""
        awaited = stage in self._resting
        self._resting.discard(stage)
        return awaited

    def await_chunks(self, numbers: Iterable[int], stages: frozenset[Stage]) -> None:
        """A step came that counts on KV which these stages have to compute first, in chunks of these numbers."""
        for number in numbers:
            self._hits[number] = stages
            self.lack(stages)

    def lack(self, stages: frozenset[Stage]) -> None:
        """These are not whole: the next forming, should there be one, counts them among the lost."""
        self._whole_on = {stage: member for stage, member in self._whole_on.items() if stage not in stages}

    def recomputed(self, number: int) -> bool:
        """A chunk is done; returns whether that was awaited."""
        return self._hits.pop(number, None) is not None

    def make_whole(self, nodes: Sequence[NodeInfo]) -> None:
        """All is in place on these nodes, but for what some have yet to put there or to compute."""
        stages = ((Stage(index), node) for index, node in enumerate(nodes))
        lacking = self._resting.union(*self._hits.values())
        self._whole_on = {stage: node.member for stage, node in stages if stage not in lacking}

    def clear(self) -> None:
        """No node holds anything of the lane any more."""
        self._whole_on, self._resting, self._hits = {}, set(), {}
