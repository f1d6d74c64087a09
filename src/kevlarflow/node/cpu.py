"""One stage on the CPU: vLLM's CPU worker, brought up with no peer.

vLLM's worker expects a process group of S ranks before it builds anything. Here the process makes a world of one,
which opens no port, and then puts `LoneStageGroup` where vLLM keeps its pipeline group: it says "rank s of S" and
refuses to communicate. That is all that model code asks of it; activations travel outside of torch
(`kevlarflow.node.lanes`).

Every lane has a model runner of its own (about 13 MB) over the same module and the same KV tensors, which have room for
one lane; `node.block_map` says which of their blocks are whose.

Non-public names of vLLM, all used in this module only: `parallel_state._PP`, the attributes of `GroupCoordinator`,
`gpu_worker.init_worker_distributed_environment`, `CPUModelRunner.initialize_kv_cache_tensors`,
`sampler.batched_count_greater_than`, `topk_topp_sampler.compiled_random_sample`,
`CompilationConfig.static_forward_context`, `CPUAttentionBackendImpl.do_kv_cache_update`.
"""

from __future__ import annotations

import collections
import functools
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.testing._internal.distributed.fake_pg  # It registers the "fake" backend.
import vllm.distributed.parallel_state as parallel_state
import vllm.v1.worker.cpu_worker as cpu_worker
from vllm.config import CompilationMode, VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import GroupCoordinator
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.core.kv_cache_utils import get_kv_cache_configs, resolve_kv_cache_block_sizes
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from kevlarflow.errors import StartupFailed
from kevlarflow.node.compiled import load_or_compile
from kevlarflow.node.kv_blocks import HostKvBlocks, find_token_slots
from kevlarflow.node.stage import LaneRunner, StageDescription
from kevlarflow.node.thinking_budget import follow_thinking
from kevlarflow.node.v1_runner import V1LaneRunner
from kevlarflow.replication.memory import map_memory

log = logging.getLogger("kevlarflow.node")

WARM_UP_TOKENS = 32
"""How many tokens go through a stage whose compiled code is loaded, to see that it runs."""


@functools.cache
def register_kernels() -> None:
    """Put vLLM's CPU kernels in place of Triton's. Takes 0.75 s, and holds for every process that is forked later."""
    if current_platform.is_cpu():
        current_platform.register_triton_kernel_overrides()
        _sample_without_compiling()


def _sample_without_compiling() -> None:
    """Have vLLM's sampler run two small functions as they are written.

    It compiles them at their first use: the first request for logprobs, or the first sampled one, would hold its step
    up for seconds on every new last node, which looks like a node that is stuck.
    """
    sampler.batched_count_greater_than = inspect.unwrap(sampler.batched_count_greater_than)
    topk_topp_sampler.compiled_random_sample = inspect.unwrap(topk_topp_sampler.compiled_random_sample)


class LoneStageGroup(GroupCoordinator):
    """What `get_pp_group()` returns on a node: rank `stage` of `stages`, with no process group behind it.

    Plain attributes only: the compiler traces through it.
    """

    def __init__(self, stage: int, stages: int) -> None:
        self.rank = self.rank_in_group = stage
        self.ranks = list(range(stages))
        self.world_size = stages
        self.local_rank = self.device_index = 0
        self.group_ranks = [self.ranks]
        self.unique_name = "kevlarflow_stage"
        self.cpu_group = self.device_group = None
        self.device_communicator = None
        self.mq_broadcaster = None
        self.use_device_communicator = False
        self.use_custom_op_call = False
        self.use_cpu_custom_send_recv = False
        self.device = torch.device("cpu")
        self._pending_isends: collections.deque[Any] = collections.deque()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("a stage has no process group: vLLM tried to communicate with another stage")

    broadcast = all_reduce = all_gather = gather = reduce_scatter = _refuse
    send_tensor_dict = recv_tensor_dict = isend_tensor_dict = irecv_tensor_dict = broadcast_tensor_dict = _refuse
    broadcast_object = barrier = send = recv = _refuse

    def destroy(self) -> None:
        """Nothing to destroy."""


class _FirstModelRunner(CPUModelRunner):
    """The runner that owns the KV tensors, in memory that the kernel backs page by page as it is written.

    vLLM allocates them with `torch.zeros`, which writes every page: seconds for each GiB, before the node is ready.
    Mapped memory reads as zero and costs nothing until it is used.
    """

    compile_lock: Path
    """Set before it warms up; see `kevlarflow.node.compiled`."""

    def warming_up_model(self) -> None:
        """As vLLM does, unless what it is for can be loaded."""
        if self.vllm_config.compilation_config.mode == CompilationMode.NONE:
            return
        few = min(WARM_UP_TOKENS, self.max_num_tokens)
        load_or_compile(lambda: self._dummy_run(few, is_profile=True), super().warming_up_model, self.compile_lock)

    def initialize_kv_cache_tensors(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """As vLLM does, over lazily backed memory."""
        zeros = torch.zeros

        def lazy_zeros(size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            return torch.frombuffer(map_memory(size), dtype=dtype)

        torch.zeros = lazy_zeros
        try:
            caches: dict[str, torch.Tensor] = super().initialize_kv_cache_tensors(*args, **kwargs)
        finally:
            torch.zeros = zeros
        return caches


class _LaneModelRunner(CPUModelRunner):
    """A further runner over the weights and KV tensors of the first one."""

    def __init__(self, vllm_config: VllmConfig, first: CPUModelRunner) -> None:
        super().__init__(vllm_config, torch.device("cpu"))
        self._first = first
        self.model = first.model

    def initialize_kv_cache_tensors(self, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        """Share the tensors of the first runner; the attention layers are bound to them already."""
        self.kv_caches.extend(self._first.kv_caches)
        return {}


class _StageWorker(CPUWorker):
    """vLLM's CPU worker in a world of one, under the identity of a stage."""

    def __init__(self, vllm_config: VllmConfig, stage: int) -> None:
        self.stage = stage
        super().__init__(vllm_config, local_rank=0, rank=stage, distributed_init_method="env://", is_driver_worker=True)

    def init_device(self) -> None:
        """Make the world of one, then let vLLM build its model runner in it."""
        original = cpu_worker.init_worker_distributed_environment
        runner = cpu_worker.CPUModelRunner
        cpu_worker.init_worker_distributed_environment = self._init_alone
        cpu_worker.CPUModelRunner = _FirstModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.init_worker_distributed_environment = original
            cpu_worker.CPUModelRunner = runner

    def _init_alone(self, vllm_config: VllmConfig, *_: Any, **__: Any) -> None:
        parallel_state.set_custom_all_reduce(False)
        torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=0, world_size=1)
        with _no_listening():
            parallel_state.init_distributed_environment(1, 0, "env://", 0, "fake")
            parallel_state.initialize_model_parallel(1, 1)
        parallel_state._PP = LoneStageGroup(self.stage, vllm_config.parallel_config.pipeline_parallel_size)


@contextmanager
def _no_listening() -> Iterator[None]:
    """Have vLLM's groups of one made by torch's "fake" backend, which communicates with nobody.

    vLLM asks for Gloo, which opens a port and two threads for each group. With one rank vLLM communicates over none.
    """
    new_group = torch.distributed.new_group
    torch.distributed.new_group = lambda *args, **kwargs: new_group(*args, **(kwargs | {"backend": "fake"}))
    try:
        yield
    finally:
        torch.distributed.new_group = new_group


class CpuStage:
    """`StageDevice` for vLLM's CPU build.

    `lanes` is how many lanes can share the KV memory; `compile_lock` is a file that nodes of the same stage share,
    so that one of them compiles and the others load that.
    """

    def __init__(self, vllm_config: VllmConfig, stage: int, lanes: int, compile_lock: Path) -> None:
        self._config = vllm_config
        self._stage = stage
        self._stages = vllm_config.parallel_config.pipeline_parallel_size
        self._lanes = lanes
        self._compile_lock = compile_lock
        self._runners: list[V1LaneRunner] = []
        self._description: StageDescription | None = None
        self._kv_blocks: HostKvBlocks | None = None

    def load(self) -> None:
        """See `StageDevice.load`. Raises `StartupFailed` when the KV memory holds not even one request."""
        register_kernels()
        with set_current_vllm_config(self._config):
            worker = _StageWorker(self._config, self._stage)
            worker.init_device()
            worker.load_model()
            worker.model_runner.compile_lock = self._compile_lock
            self._prepare_activations(worker.model_runner)
            self._allocate(worker)

    def description(self) -> StageDescription:
        """See `StageDevice.description`."""
        assert self._description is not None, "load() comes first"
        return self._description

    def runners(self) -> list[LaneRunner]:
        """See `StageDevice.runners`."""
        return list(self._runners)

    def kv_blocks(self) -> HostKvBlocks:
        """See `StageDevice.kv_blocks`."""
        assert self._kv_blocks is not None, "load() comes first"
        return self._kv_blocks

    def _prepare_activations(self, runner: CPUModelRunner) -> None:
        """Stages behind the first read their input from this buffer; vLLM makes it only while it profiles."""
        if self._stage > 0:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )

    def _allocate(self, worker: _StageWorker) -> None:
        """Size the KV memory as vLLM's engine would, for this stage alone, and make a runner for each lane."""
        register_all_kvcache_specs(self._config)
        spec = worker.get_kv_cache_spec()
        layouts = worker.get_supported_kv_cache_layouts()
        layout = resolve_kv_cache_layout(self._config, [layouts], list(spec.values()))
        worker.set_kv_cache_layout(layout.name)
        available = worker.determine_available_memory()
        try:
            kv_cache = get_kv_cache_configs(self._config, [spec], [available])[0]
        except ValueError as error:
            raise StartupFailed(str(error).splitlines()[0]) from error
        kv_cache.kv_cache_layout = layout.name
        kv_cache.hash_block_size = resolve_kv_cache_block_sizes(kv_cache, self._config)[1]
        worker.initialize_from_config(kv_cache)
        times = worker.compile_or_warm_up_model()
        self._make_runners(worker.model_runner, kv_cache)
        self._description = StageDescription(
            kv_cache_spec=spec,
            kv_cache_layouts=layouts,
            available_memory=available,
            num_blocks=kv_cache.num_blocks,
            block_size=next(iter(spec.values())).block_size,
            supported_tasks=tuple(worker.get_supported_tasks()),
            compilation_seconds=times.language_model,
        )

    def _token_slots(self, kv_cache: torch.Tensor) -> numpy.ndarray | None:
        """Where attention puts the tokens of a block, which depends on the machine and on the type of the KV."""
        layer = next(iter(self._config.compilation_config.static_forward_context.values()))
        block_size = kv_cache.shape[2]

        def write(block: torch.Tensor, values: torch.Tensor, first: int) -> None:
            shape = (len(values), layer.num_kv_heads, layer.head_size)
            kv = values.to(self._config.model_config.dtype).view(-1, 1, 1).expand(shape).contiguous()
            layer.impl.do_kv_cache_update(layer, kv, kv, block, torch.arange(first, first + len(values)))

        try:
            return find_token_slots(kv_cache, block_size, write)
        except (AttributeError, TypeError, RuntimeError) as error:
            log.warning("where the tokens of a KV block lie is not known, so blocks are copied whole: %s", error)
            return None

    def _make_runners(self, first: CPUModelRunner, kv_cache: KVCacheConfig) -> None:
        self._kv_blocks = HostKvBlocks(first.kv_caches, self._token_slots(first.kv_caches[0]))
        runners = [first]
        for _ in range(1, self._lanes):
            runner = _LaneModelRunner(self._config, first)
            runner.initialize_kv_cache(kv_cache)
            self._prepare_activations(runner)
            runners.append(runner)
        if self._stage == self._stages - 1:
            for runner in runners:
                follow_thinking(runner)
        self._runners = [V1LaneRunner(runner) for runner in runners]
