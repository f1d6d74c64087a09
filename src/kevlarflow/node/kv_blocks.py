"""KV blocks as bytes: the one place that knows that KV memory is host memory.

A block is copied whole. On the CPU each layer is a tensor whose first dimension is the block, with K and V packed
inside, so a slice of tokens would be meaningless. An accelerator build copies through a pinned buffer here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

# A copy that came over a channel is read-only, and only read.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


class HostKvBlocks:
    """Reads and writes blocks of all lanes, by their physical number."""

    def __init__(self, layers: Sequence[torch.Tensor]) -> None:
        self._layers = list(layers)
        self._sizes = [layer[0].numel() * layer.element_size() for layer in self._layers]
        self.block_bytes = sum(self._sizes)

    def read(self, block: int) -> memoryview:
        """A copy of a block: its layers one after another."""
        copy = torch.empty(self.block_bytes, dtype=torch.uint8)
        for layer, part in zip(self._layers, copy.split(self._sizes), strict=True):
            part.view(layer.dtype).view(layer.shape[1:]).copy_(layer[block])
        return memoryview(copy.numpy())

    def write(self, block: int, data: bytes | memoryview) -> None:
        """Put a copied block in place."""
        copy = torch.frombuffer(data, dtype=torch.uint8)
        for layer, part in zip(self._layers, copy.split(self._sizes), strict=True):
            layer[block].copy_(part.view(layer.dtype).view(layer.shape[1:]))
