"""What a node and its standby say to one another: copies of KV blocks, and what became of them.

A copy carries its tag (lane, block, generation, tokens filled) and what is needed to doubt it: the epoch of the lane
that sends it, the stage, the length and a checksum. A standby takes a copy only if all of that is right.
"""

from __future__ import annotations

import msgspec

from kevlarflow.types import Epoch, Member, PipelineId, Stage


class ReplicaMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of every header; the tag on the wire is the class name."""


class Store(ReplicaMessage, frozen=True):
    """Keep this copy; payload: the block's bytes."""

    pipeline: PipelineId
    epoch: Epoch
    stage: Stage
    block: int
    generation: int
    filled: int
    depth: int
    length: int
    checksum: int
    """CRC-32 of the payload."""


class Outcome(ReplicaMessage, frozen=True):
    """What the standby did: stored the copy, or did not; and what it dropped to make room."""

    pipeline: PipelineId
    standby: Member
    stored: tuple[tuple[int, int, int], ...]
    """(block, generation, filled)."""
    dropped: tuple[tuple[int, int, int], ...]
    used_bytes: int
    limit_bytes: int


AnyReplicaMessage = Store | Outcome

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyReplicaMessage] = msgspec.msgpack.Decoder(AnyReplicaMessage)


def encode(message: AnyReplicaMessage) -> bytes:
    """The header frame."""
    return _encoder.encode(message)


def decode(frame: bytes) -> AnyReplicaMessage:
    """The header in a frame. Raises `msgspec.DecodeError` for anything else."""
    return _decoder.decode(frame)
