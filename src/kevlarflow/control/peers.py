"""Who is behind which address: nodes and engines say so when they introduce themselves, and strangers are asked to.

The controller that a peer has spoken to before may be gone, so whoever speaks may be a stranger.
"""

from __future__ import annotations

from kevlarflow.types import Member, PipelineId

INTRODUCTION_PAUSE_SECONDS = 0.5
MAX_STRANGERS = 4_096


class Peers:
    """Who is behind which address of the hub."""

    def __init__(self) -> None:
        self.members: dict[Member, bytes] = {}
        self.engines: dict[PipelineId, bytes] = {}
        self._introduced: set[bytes] = set()
        self._asked_at: dict[bytes, float] = {}

    def knows(self, peer: bytes) -> bool:
        """Whether the peer has said who it is."""
        return peer in self._introduced

    def add_member(self, member: Member, peer: bytes) -> None:
        """A node has said who it is."""
        self._forget(self.members.get(member), peer)
        self.members[member] = peer
        self._introduced.add(peer)

    def add_engine(self, pipeline: PipelineId, peer: bytes) -> None:
        """An engine has said which it is."""
        self._forget(self.engines.get(pipeline), peer)
        self.engines[pipeline] = peer
        self._introduced.add(peer)

    def remove_member(self, member: Member) -> None:
        """A node is gone."""
        self._forget(self.members.pop(member, None), None)

    def may_ask(self, peer: bytes, now: float) -> bool:
        """Whether it is time to ask a peer for an introduction again."""
        if now - self._asked_at.get(peer, -INTRODUCTION_PAUSE_SECONDS) < INTRODUCTION_PAUSE_SECONDS:
            return False
        if len(self._asked_at) >= MAX_STRANGERS:
            self._asked_at.clear()
        self._asked_at[peer] = now
        return True

    def _forget(self, old: bytes | None, new: bytes | None) -> None:
        if old is not None and old != new:
            self._introduced.discard(old)
