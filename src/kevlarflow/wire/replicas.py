"""What a node and its standby say to one another: copies of KV blocks, and what became of them.

A copy carries its tag (lane, block, generation, tokens filled), and the message that it comes in what is needed to
doubt it: the epoch of the lane that sends it, the stage, the length and a checksum of header and payload. A standby
takes a message only if all of that is right, and closes the channel to whoever sends one that is not. A copy may hold
the last tokens of its block only; then the standby must have those before them, under the same generation, and says so
if it has not.
"""

from __future__ import annotations

import zlib

import msgspec

from kevlarflow.recovery.coverage import Worth
from kevlarflow.types import Epoch, Member, PipelineId, Stage
from kevlarflow.wire.decoding import decode_with

Tag = tuple[int, int, int]
"""(block, generation, tokens filled)."""
Revalued = tuple[int, int, Worth]
"""(block, generation, what its replica is worth now)."""


class ReplicaMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of every header; the tag on the wire is the class name."""


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Tokens `start` to `filled` of a block."""

    block: int
    generation: int
    start: int
    filled: int
    depth: int
    worth: Worth = Worth.REQUEST


class Store(ReplicaMessage, frozen=True):
    """Keep these copies, of a block each; payload: their bytes, one after another."""

    number: int
    """Of the message in its channel: 1, 2, ..."""
    pipeline: PipelineId
    epoch: Epoch
    stage: Stage
    copies: tuple[Copy, ...]
    length: int
    checksum: int = 0
    """CRC-32 of the header, in which it is 0 for that, and of the payload."""
    revalued: tuple[Revalued, ...] = ()
    """Replicas sent before that are worth something else since: a request has let go of them, or hit them again."""


class Outcome(ReplicaMessage, frozen=True):
    """What the standby has stored of a lane, and what it has dropped to make room."""

    number: int
    """Of the message that this answers; 0: it answers none, but others needed the room."""
    pipeline: PipelineId
    standby: Member
    stored: tuple[Tag, ...]
    dropped: tuple[Tag, ...]
    lacking: tuple[Tag, ...]
    """Not stored, because what they go on from is not here."""
    used_bytes: int
    """Of the lane's replicas."""
    limit_bytes: int
    """Of the whole store."""


class Closed(ReplicaMessage, frozen=True):
    """The standby has refused a copy and hears nothing more in this channel."""

    reason: str


AnyReplicaMessage = Store | Outcome | Closed

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyReplicaMessage] = msgspec.msgpack.Decoder(AnyReplicaMessage)


def encode(message: AnyReplicaMessage) -> bytes:
    """The header frame."""
    return _encoder.encode(message)


def seal(message: Store, payload: memoryview) -> bytes:
    """The header frame of a message that goes with `payload`, under its checksum."""
    return encode(msgspec.structs.replace(message, checksum=_checksum(message, payload)))


def is_intact(message: Store, payload: memoryview) -> bool:
    """Whether header and payload are what was sealed."""
    return message.checksum == _checksum(message, payload)


def _checksum(message: Store, payload: memoryview) -> int:
    return zlib.crc32(payload, zlib.crc32(encode(msgspec.structs.replace(message, checksum=0))))


def decode(frame: bytes) -> AnyReplicaMessage:
    """The header in a frame. Raises `msgspec.DecodeError` for anything else."""
    return decode_with(_decoder, frame)
