"""Large pieces of host memory, mapped rather than allocated."""

from __future__ import annotations

import contextlib
import mmap

HUGE_PAGE_BYTES = 2 << 20


def map_memory(size: int) -> memoryview:
    """Memory of `size` bytes that costs nothing until it is written, in huge pages where the kernel has them.

    A first write to a huge page is several times cheaper for each byte than to a small one, and a copy a tenth.
    """
    # Private, which is not Python's default: what is shared, even with nobody, gets no huge pages on most machines.
    mapped = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= HUGE_PAGE_BYTES:
        # It is advice: a kernel that is built without huge pages (EINVAL) gives small ones, which only take longer.
        with contextlib.suppress(OSError):
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapped)[:size]
