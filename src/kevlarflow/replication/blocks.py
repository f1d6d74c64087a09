"""KV memory as replication sees it: blocks of bytes, by physical number. What kind of memory it is, is not said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class KvBlocks(Protocol):
    """The KV memory of a node, all lanes together."""

    block_bytes: int
    token_bytes: int
    """Of a block's bytes, those of each token; 0 where a block cannot be taken apart."""

    def read(self, block: int, into: memoryview) -> None:
        """Copy a block into host memory of `block_bytes` bytes, which may be copied from it again."""

    def read_tokens(self, block: int, start: int, end: int, into: memoryview) -> None:
        """Copy tokens `start` to `end` of a block into host memory of as many times `token_bytes`."""

    def merge_tokens(self, data: memoryview, start: int, end: int, into: memoryview) -> None:
        """Put what `read_tokens` has copied where it belongs in a block that `read` could have copied."""

    def write(self, copies: Sequence[tuple[int, memoryview]]) -> None:
        """Put copied blocks in place, each (block, its bytes)."""

    def populate(self, block: int) -> bool:
        """Make the first write to a block cheap, its content untouched; False where that cannot be done."""
