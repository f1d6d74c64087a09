"""How long a plain copy takes on this machine: what restoring KV is compared with."""

from __future__ import annotations

import time

from kevlarflow.replication.memory import map_memory

ATTEMPTS = 5


def copy_seconds(block_bytes: int, blocks: int) -> float:
    """Copy `blocks` blocks, one by one, between memory that was used before; the fastest of some attempts."""
    size = block_bytes * blocks
    source, target = map_memory(size), map_memory(size)
    fill(source)
    fill(target)
    fastest = float("inf")
    for _ in range(ATTEMPTS):
        began = time.perf_counter()
        for start in range(0, size, block_bytes):
            target[start : start + block_bytes] = source[start : start + block_bytes]
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def fill(memory: memoryview) -> None:
    """Write all of it once."""
    piece = bytes(range(256)) * 4_096
    for start in range(0, len(memory), len(piece)):
        part = memory[start : start + len(piece)]
        part[:] = piece[: len(part)]
