"""Large pieces of host memory, mapped rather than allocated."""

from __future__ import annotations

import mmap

HUGE_PAGE_BYTES = 2 << 20


def map_memory(size: int) -> memoryview:
    """Memory of `size` bytes that costs nothing until it is written, in huge pages where the kernel has them.

    A first write to a huge page is several times cheaper for each byte than to a small one.
    """
    mapped = mmap.mmap(-1, max(size, 1))
    if size >= HUGE_PAGE_BYTES:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)[:size]
