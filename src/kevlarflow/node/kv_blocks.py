"""KV blocks as bytes: the one place that knows that KV memory is host memory.

A block is copied whole. On the CPU each layer is a tensor whose first dimension is the block, with K and V packed
inside, so a slice of tokens would be meaningless. An accelerator build copies through a pinned buffer here.

A block is a run of bytes in each layer, moved as such: `memmove` works without Python's lock and adds a microsecond to
each run, a third of what tensor operations do.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Sequence

import numpy
import torch

POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14: back pages with memory, as a write would, and leave their content alone."""

_libc = ctypes.CDLL(None)


class HostKvBlocks:
    """Reads and writes blocks of all lanes, by their physical number."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        if not all(layer.is_contiguous() for layer in layers):
            raise ValueError("the layers' first dimension has to be the block, in one piece each")
        self._layers = list(layers)
        self._sizes = [layer[0].numel() * layer.element_size() for layer in self._layers]
        offsets = [0, *itertools.accumulate(self._sizes)]
        self._runs = [(t.data_ptr(), o, n) for t, o, n in zip(self._layers, offsets, self._sizes, strict=False)]
        self._count = min(layer.shape[0] for layer in self._layers)
        self.block_bytes = sum(self._sizes)

    def read(self, block: int, into: memoryview) -> None:
        """Copy a block into `into`: its layers one after another."""
        target = self._checked(block, into)
        for address, offset, size in self._runs:
            ctypes.memmove(target + offset, address + block * size, size)

    def write(self, copies: Sequence[tuple[int, memoryview]]) -> None:
        """Put copied blocks in place. All are looked at first: in between, the copying would lose its pace."""
        sources = sorted((block, self._checked(block, data)) for block, data in copies)
        move = ctypes.memmove
        for block, source in sources:
            for address, offset, size in self._runs:
                move(address + block * size, source + offset, size)

    def _checked(self, block: int, data: memoryview) -> int:
        """The address of `data`, once it is sure that nothing beyond it or beyond the layers is touched."""
        if not 0 <= block < self._count or data.nbytes != self.block_bytes:
            raise ValueError(f"block {block} of {self._count}, {data.nbytes} bytes of {self.block_bytes}")
        return int(numpy.frombuffer(data, numpy.uint8).ctypes.data)

    def populate(self, block: int) -> bool:
        """Back a block's memory, so that the first write to it costs nothing extra; False when the kernel cannot.

        Content stays as it is, whoever writes it meanwhile.
        """
        return all(_populate(address + block * size, size) for address, _, size in self._runs)


def _populate(address: int, size: int) -> bool:
    first = address - address % mmap.PAGESIZE
    length = address + size - first
    return bool(_libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), POPULATE_WRITE) == 0)
