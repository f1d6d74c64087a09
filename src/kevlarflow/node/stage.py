"""The two seams behind which everything that differs between devices and model runners stands.

`StageDevice` is device and stage set-up: bring up one stage alone, with no peer and no world communicator, load its
weights, size its KV memory. `LaneRunner` is runner state: run a step, rebuild request state, forget it. The CPU build
with vLLM's V1 model runner is `kevlarflow.node.cpu` and `kevlarflow.node.v1_runner`; a GPU build is another pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from kevlarflow.recovery.ledger import LedgerEntry
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.replication.blocks import KvBlocks

Activations = Mapping[str, torch.Tensor]
"""Output of a stage by name, each of shape (tokens, hidden size)."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageDescription:
    """What vLLM's engine asks of a worker; the node answers once, and the executor keeps it."""

    kv_cache_spec: Any
    """Layer name to vLLM `KVCacheSpec`."""
    kv_cache_layouts: list[str]
    available_memory: int
    """Bytes for KV of one lane."""
    num_blocks: int
    """KV blocks that each lane has memory for."""
    block_size: int
    """Tokens of a KV block."""
    supported_tasks: tuple[str, ...]
    compilation_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """What the last stage returns for a step."""

    output: Any
    """vLLM `ModelRunnerOutput`."""
    generators: dict[str, bytes]
    """State of the random generator of each seeded request that sampled."""


class LaneRunner(Protocol):
    """Request state of one lane, over the node's shared weights and KV memory."""

    def execute(
        self, step: Any, activations: Activations | None, grammar: Any, computed: Callable[[], None]
    ) -> Activations | Sampled | None:
        """Run a vLLM `SchedulerOutput`; None for a step without tokens. `grammar` counts at the last stage only.

        `computed` is called when the device is done with the layers, and nothing is sampled yet.
        """

    @property
    def batch(self) -> tuple[str, ...]:
        """The requests of the last step, in the order of their rows. It depends on the steps before as well."""

    def follow(self, step: Any, output: Activations, batch: Sequence[str]) -> Activations:
        """Take note of a vLLM `SchedulerOutput` that was run in an earlier epoch already, as `execute` would.

        Returns its output, which was of rows in the order of `batch`, as it is to be passed on now.
        """

    def recompute(self, chunk: Chunk, activations: Activations | None) -> Activations | None:
        """Write the KV of a chunk without sampling; the last stage gathers owed prompt log-probabilities."""

    def use_blocks(self, table: Sequence[int]) -> None:
        """Find block b of every step at physical block `table[b]`, from now on."""

    def reset(self) -> None:
        """Forget all requests; the KV memory stays as it is."""

    def restore(self, entries: Sequence[LedgerEntry]) -> None:
        """Rebuild the state of these requests, as of the ledger."""


class StageDevice(Protocol):
    """One stage on one device."""

    def load(self) -> None:
        """Load weights, compile if configured, allocate KV memory for all lanes. Needs no peer."""

    def description(self) -> StageDescription:
        """See `StageDescription`; after `load`."""

    def runners(self) -> list[LaneRunner]:
        """A runner for each lane that there can be, over the same weights and KV memory."""

    def kv_blocks(self) -> KvBlocks:
        """KV memory, which all lanes share: see `node.block_map`."""
