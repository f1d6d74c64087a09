"""Requests that end since they cost nodes: whether they did, as only the simulated world knows."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from kevlarflow.recovery.suspicion import MAX_COST, MAX_POSSIBLE_COST, POSSIBLE_REASON, REASON
from kevlarflow.sim.errors import NoReason, Unblamed
from kevlarflow.types import Computing, Member, NodeInfo, PipelineId
from kevlarflow.wire.messages import Form, Suspend

DRAWN_ERROR = "a drawn error"
"""What a step that was made to fail says."""


class Blame:
    """What there is to blame requests for, over a whole run."""

    def __init__(self) -> None:
        self._caught: collections.Counter[tuple[str, bool]] = collections.Counter()
        """Nodes that died while they computed a request, by whether it was computed again."""
        self._raised: set[str] = set()
        """Requests of steps and chunks that raised."""
        self._losses: collections.Counter[PipelineId] = collections.Counter()
        """Orders to an engine that were about lost nodes, of which not all were killed or stopped by somebody."""
        self._unexplained: collections.Counter[PipelineId] = collections.Counter()
        """Those that did not say what each of the nodes had been computing."""
        self._hurt: set[Member] = set()
        """Nodes that somebody has killed or stopped."""
        self._before: dict[str, tuple[int, int]] = {}
        """How many of both there were before a request came to its engine: it is not to blame for these."""

    def note_death(self, computing: Computing, requests: Iterable[str]) -> None:
        """A node has died, and was computing these."""
        self._caught.update((request, computing.sequence < 0) for request in requests)

    def note_hurt(self, member: Member) -> None:
        """Somebody kills or stops a node."""
        self._hurt.add(member)

    def note_added(self, request: str, pipeline: PipelineId) -> None:
        """A request comes to an engine."""
        self._before[request] = (self._losses[pipeline], self._unexplained[pipeline])

    def note_raised(self, requests: Iterable[str]) -> None:
        """A step or a chunk of these was made to fail."""
        self._raised.update(requests)

    def may_end(self, request: str, reason: str) -> bool:
        """Whether a request may end with an error that a step has raised: its own one has."""
        return reason == DRAWN_ERROR and request in self._raised

    def note_order(self, order: Form | Suspend, serving: tuple[NodeInfo, ...]) -> None:
        """An engine takes an order that is about lost nodes; `serving` are those that it has."""
        if isinstance(order, Form):
            lost = {node.member for node in serving} - {node.member for node in order.nodes}
        else:
            lost = {serving[stage].member for stage in order.lost_stages} if serving else set[Member]()
        from_outside = {loss.member for loss in order.losses if loss.from_outside}
        if not from_outside <= self._hurt:
            raise Unblamed(f"nobody has hurt {sorted(from_outside - self._hurt)}: {order}")
        self._losses[order.pipeline] += not lost <= from_outside
        self._unexplained[order.pipeline] += not lost <= {loss.member for loss in order.losses}

    def check(self, request: str, reason: str, pipeline: PipelineId) -> None:
        """A request ends; the reason has to be true."""
        caught = max(self._caught[request, False], self._caught[request, True])
        losses, unexplained = self._before[request]
        losses, unexplained = self._losses[pipeline] - losses, self._unexplained[pipeline] - unexplained
        if reason == REASON and caught + unexplained < MAX_COST:
            raise NoReason(f"{request} has cost {caught} nodes: {reason}")
        if reason == POSSIBLE_REASON and losses < MAX_POSSIBLE_COST:
            raise NoReason(f"pipeline {pipeline} has lost nodes {losses} times since {request} came: {reason}")
