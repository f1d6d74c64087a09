"""KV memory as replication sees it: blocks of bytes, by physical number. What kind of memory it is, is not said."""

from __future__ import annotations

from typing import Protocol


class KvBlocks(Protocol):
    """The KV memory of a node, all lanes together."""

    block_bytes: int

    def read(self, block: int, into: memoryview) -> None:
        """Copy a block into host memory of `block_bytes` bytes, which may be copied from it again."""

    def write(self, block: int, data: memoryview) -> None:
        """Put a copied block in place."""

    def populate(self, block: int) -> bool:
        """Make the first write to a block cheap, its content untouched; False where that cannot be done."""
