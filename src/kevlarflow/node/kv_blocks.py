"""KV blocks as bytes: the one place that knows that KV memory is host memory.

On the CPU each layer is a tensor whose first dimension is the block, so a block is a run of bytes in each layer, moved
as such: `memmove` works without Python's lock and adds half a microsecond to each run, a fifth of what tensor
operations do. Where many copies have to be put into blocks that follow each other, as in a recovery, one tensor
operation moves a layer of them all, at the speed of memory, and a second thread helps, since one core does not get all
that memory can do. An accelerator build copies through a pinned buffer here.

Inside a block K and V are packed as the machine's attention kernel likes them, and no slice of the block is a token.
`find_token_slots` finds out where each token's values lie, by letting the kernel write them; then the tokens of a block
can be copied apart from the others.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy
import torch

POPULATE_WRITE = 23
"""``MADV_POPULATE_WRITE`` of Linux 5.14: back pages with memory, as a write would, and leave their content alone."""

_libc = ctypes.CDLL(None)

LEAST_ROW = 8
"""Blocks that follow each other: fewer are moved one by one."""
LONGEST_ROW = 64
"""What a thread moves at a time."""

_Row = Sequence[tuple[int, int]]
"""Physical blocks, each with the address of the copy that is to be put there."""

TOKENS_AT_A_TIME = 16
"""As many small numbers as every type of KV can tell apart."""


def find_token_slots(
    layer: torch.Tensor, block_size: int, write: Callable[[torch.Tensor, torch.Tensor, int], None]
) -> numpy.ndarray | None:
    """Where the tokens of a block lie: (block size, values of a token), counted in values of `layer`'s part of a block.

    None when the tokens do not share the block evenly.

    `write(block, values, first)` has to write tokens into a tensor like one block of `layer`, from token `first` on, so
    that K and V of token i consist of `values[i]`.
    """
    slots = []
    scratch = torch.empty_like(layer[:1])
    for first in range(0, block_size, TOKENS_AT_A_TIME):
        count = min(TOKENS_AT_A_TIME, block_size - first)
        scratch.zero_()
        write(scratch, torch.arange(1.0, count + 1), first)
        held = scratch.flatten().float().numpy()
        slots += [numpy.flatnonzero(held == value) for value in range(1, count + 1)]
    size = layer[0].numel() // block_size
    if any(len(each) != size for each in slots) or len(numpy.unique(numpy.concatenate(slots))) != layer[0].numel():
        return None
    return numpy.stack(slots).astype(numpy.intp)


class HostKvBlocks:
    """Reads and writes blocks of all lanes, by their physical number.

    `slots` says where the tokens of a block lie, the same in all layers; without it blocks are copied whole.
    """

    def __init__(self, layers: Sequence[torch.Tensor], slots: numpy.ndarray | None = None) -> None:
        if not all(layer.is_contiguous() for layer in layers):
            raise ValueError("the layers' first dimension has to be the block, in one piece each")
        self._layers = list(layers)
        self._sizes = [layer[0].numel() * layer.element_size() for layer in self._layers]
        offsets = [0, *itertools.accumulate(self._sizes)]
        self._runs = [(t.data_ptr(), o, n) for t, o, n in zip(self._layers, offsets, self._sizes, strict=False)]
        self._count = min(layer.shape[0] for layer in self._layers)
        self.block_bytes = sum(self._sizes)
        self._alike = len({(layer[0].numel(), layer.element_size()) for layer in self._layers}) == 1
        self._slots = slots if self._alike else None
        self._words = [_words_of(layer) for layer in self._layers] if self._alike else []
        self.token_bytes = 0
        if self._slots is not None:
            self._unit = numpy.dtype(f"u{self._layers[0].element_size()}")
            self.token_bytes = len(self._layers) * self._slots.shape[1] * self._unit.itemsize
            self._values = [_values_of(layer, self._unit) for layer in self._layers]

    def read(self, block: int, into: memoryview) -> None:
        """Copy a block into `into`: its layers one after another."""
        target = self._checked(block, into)
        for address, offset, size in self._runs:
            ctypes.memmove(target + offset, address + block * size, size)

    def read_tokens(self, block: int, start: int, end: int, into: memoryview) -> None:
        """Copy tokens `start` to `end` of a block into `into`: their values in one layer after another."""
        if not 0 <= block < self._count:
            raise ValueError(f"block {block} of {self._count}")
        slots = self._slots_of(start, end, into)
        target = numpy.frombuffer(into, self._unit).reshape(len(self._values), len(slots))
        for values, row in zip(self._values, target, strict=True):
            # "clip" writes to `row` directly. No slot is beyond its block.
            numpy.take(values[block], slots, out=row, mode="clip")

    def merge_tokens(self, data: memoryview, start: int, end: int, into: memoryview) -> None:
        """Put what `read_tokens` has copied where it belongs in the bytes of a block."""
        slots = self._slots_of(start, end, data)
        source = numpy.frombuffer(data, self._unit).reshape(len(self._layers), len(slots))
        numpy.frombuffer(into, self._unit).reshape(len(self._layers), -1)[:, slots] = source

    def _slots_of(self, start: int, end: int, data: memoryview) -> numpy.ndarray:
        if self._slots is None:
            raise ValueError("where the tokens of a block lie is not known: it can only be copied whole")
        if not 0 <= start < end <= len(self._slots) or data.nbytes != (end - start) * self.token_bytes:
            raise ValueError(f"tokens {start} to {end} of {len(self._slots)}, {data.nbytes} bytes")
        return self._slots[start:end].reshape(-1)

    def write(self, copies: Sequence[tuple[int, memoryview]]) -> None:
        """Put copied blocks in place. All are looked at first: in between, the copying would lose its pace."""
        sources = sorted((block, self._checked(block, data)) for block, data in copies)
        rows = list(self._rows(sources)) if self._lie_evenly(sources) else []
        in_rows = set[int]().union(*(range(row[0][0], row[-1][0] + 1) for row in rows))
        if rows:
            self._write_rows(rows)
        for block, source in sources:
            if block not in in_rows:
                for address, offset, size in self._runs:
                    ctypes.memmove(address + block * size, source + offset, size)

    def _lie_evenly(self, sources: _Row) -> bool:
        """Whether the copies are like rows of one matrix, as those of a standby store are."""
        first = sources[0][1] if sources else 0
        return self._alike and all((source - first) % self.block_bytes == 0 for _, source in sources)

    @staticmethod
    def _rows(sources: _Row) -> Iterator[_Row]:
        """Parts of `sources`, which is sorted, whose blocks follow each other."""
        start = 0
        for end in range(1, len(sources) + 1):
            goes_on = end < len(sources) and sources[end][0] == sources[end - 1][0] + 1
            if goes_on and end - start < LONGEST_ROW:
                continue
            if end - start >= LEAST_ROW:
                yield sources[start:end]
            start = end

    def _write_rows(self, rows: Sequence[_Row]) -> None:
        sources = [source for row in rows for _, source in row]
        base = min(sources)
        arena = self._arena(base, max(sources))
        # Each of the threads takes the next one.
        left = iter(rows)

        def write() -> None:
            for row in left:
                self._write_row(arena, base, row)

        help_comes = _helper().submit(write)
        try:
            write()
        finally:
            # Whatever happens here: once this is over nobody may write, the blocks may be given to another lane.
            help_comes.result()

    def _arena(self, first: int, last: int) -> torch.Tensor:
        """The memory between two copies, both included, as (copies, layers, words)."""
        size = last - first + self.block_bytes
        words = torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=self._words[0].dtype)
        return words.view(size // self.block_bytes, len(self._words), -1)

    def _write_row(self, arena: torch.Tensor, base: int, row: _Row) -> None:
        places = torch.tensor([(source - base) // self.block_bytes for _, source in row])
        first, last = row[0][0], row[-1][0]
        for layer, words in enumerate(self._words):
            torch.index_select(arena[:, layer], 0, places, out=words[first : last + 1])

    def _checked(self, block: int, data: memoryview) -> int:
        """The address of `data`, once it is sure that nothing beyond it or beyond the layers is touched."""
        if not 0 <= block < self._count or data.nbytes != self.block_bytes:
            raise ValueError(f"block {block} of {self._count}, {data.nbytes} bytes of {self.block_bytes}")
        if data.readonly:
            return int(numpy.frombuffer(data, numpy.uint8).ctypes.data)
        # Many are asked for at once, and this takes a fifth of the time.
        return ctypes.addressof(ctypes.c_char.from_buffer(data))

    def populate(self, block: int) -> bool:
        """Back a block's memory, so that the first write to it costs nothing extra; False when the kernel cannot.

        Content stays as it is, whoever writes it meanwhile.
        """
        return all(_populate(address + block * size, size) for address, _, size in self._runs)


@functools.cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "kv-blocks")


def _words_of(layer: torch.Tensor) -> torch.Tensor:
    """A layer's memory as (blocks, words of a block), in the largest words there are."""
    raw = layer.view(layer.shape[0], -1).view(torch.uint8)
    return raw.view(torch.int64) if raw.shape[1] % 8 == 0 and raw.data_ptr() % 8 == 0 else raw


def _values_of(layer: torch.Tensor, unit: numpy.dtype) -> numpy.ndarray:
    """A layer's memory as (blocks, values of a block), whatever type of number a value is."""
    size = layer.numel() * layer.element_size()
    raw = (ctypes.c_char * size).from_address(layer.data_ptr())
    return numpy.frombuffer(raw, unit).reshape(layer.shape[0], -1)


def _populate(address: int, size: int) -> bool:
    first = address - address % mmap.PAGESIZE
    length = address + size - first
    return bool(_libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), POPULATE_WRITE) == 0)
