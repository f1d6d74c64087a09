"""KV memory as replication sees it: blocks of bytes, by physical number. What kind of memory it is, is not said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class KvBlocks(Protocol):
    """The KV memory of a node, all lanes together."""

    block_bytes: int

    def read(self, block: int, into: memoryview) -> None:
        """Copy a block into host memory of `block_bytes` bytes, which may be copied from it again."""

    def write(self, copies: Sequence[tuple[int, memoryview]]) -> None:
        """Put copied blocks in place, each (block, its bytes)."""

    def populate(self, block: int) -> bool:
        """Make the first write to a block cheap, its content untouched; False where that cannot be done."""
