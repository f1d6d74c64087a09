"""Decoding of what a peer has sent, of which nothing is believed."""

from __future__ import annotations

from typing import TypeVar

import msgspec

Message = TypeVar("Message")


def decode_with(decoder: msgspec.msgpack.Decoder[Message], frame: bytes) -> Message:
    """What is in a frame. Raises `msgspec.DecodeError` for anything that the decoder does not take."""
    try:
        return decoder.decode(frame)
    except (UnicodeDecodeError, RecursionError) as error:
        # msgspec lets through what is wrong inside of a string, and lists within lists within lists.
        raise msgspec.DecodeError(str(error)) from error
