"""The hook that makes a vLLM worker take the time, and keep the KV, of a device that is not there.

It is an entry point of `vllm.general_plugins`, which vLLM calls in each of its processes, and does nothing unless the
environment names a profile (`kevlarflow.emulation.profile`). Stock vLLM and KevlarFlow's nodes are hooked alike, at
vLLM's model runner, which both of them use:

* a step ends when the emulated time has passed since its activations arrived: the process sleeps what is left;
* the KV memory has the emulated model's bytes for each token. Attention computes one head of it, so the tokens depend
  on what is there; the other heads hold that head's keys and values again, so that a block is written in full;
* who waits sleeps, where vLLM spins: readers of its shared-memory queues for a second, writers until there is room, and
  on the CPU each stage until the activations are there. There are more processes here than cores, and a device would
  not take one to wait;
* once they have work, workers and engines go before the machine's other work, where that is allowed: a device does
  not wait for a core, and a server that starts beside it is, in the cluster that is emulated, on another machine.
  Linux compares niceness within a session, and sessions by one of their own; each server is a session.

Non-public names of vLLM, all used in this module only: `GPUModelRunner.execute_model` and `sample_tokens`,
`Attention.get_kv_cache_spec`, `CPUAttentionBackendImpl.forward` and `do_kv_cache_update`,
`CPUAttentionMetadataBuilder.num_kv_heads`, `SpinCondition.busy_loop_s`, `shm_broadcast.sched_yield`,
`CpuCommunicator._all_group_ranks_share_shm_group_name`, `EngineCore.add_request`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from kevlarflow.emulation.profile import REPORTS_VARIABLE, Profile, StepCounts, from_environment
from kevlarflow.errors import UsageError

REPORT_INTERVAL_SECONDS = 0.5
NICENESS = -20
AUTOGROUP = Path("/proc/self/autogroup")
QUEUE_POLL_SECONDS = 0.0005
MARK = "kevlarflow_emulation"
"""Attribute of a class that has been hooked."""


def install() -> None:
    """Hook vLLM's classes, once, if the environment names a profile."""
    profile = from_environment()
    if profile is None:
        return
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if hasattr(GPUModelRunner, MARK):
        return
    setattr(GPUModelRunner, MARK, profile)
    _hook_runner(GPUModelRunner, profile)
    _hook_kv(profile)
    _hook_waiting()
    _hook_engine()


def go_first() -> None:
    """Let this process's session go before others, and this process first in it, where that is allowed.

    No real-time policy: gloo spins until its own thread, behind which the spinner would have to stand, lets go.
    """
    with contextlib.suppress(OSError):
        AUTOGROUP.write_text(str(NICENESS))
    for thread in map(int, os.listdir("/proc/self/task")):
        # A thread may have ended meanwhile.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, thread, NICENESS)


class StepClock:
    """Lets each step of this process take its emulated time, and counts those that took longer."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._counts: StepCounts | None = None
        self._reported_at = 0.0
        self._begun = self._emulated = self._slept = 0.0

    def begin(self, scheduled: Any, stage: int) -> None:
        """The activations of a step are there."""
        self._begun = time.monotonic()
        self._slept = 0.0
        tokens, context, pairs = work_of(scheduled)
        self._emulated = self._profile.stage_seconds(tokens, context, pairs)
        if stage:
            self._emulated += self._profile.transfer_seconds(tokens)
        if self._counts is None or self._counts.pid != os.getpid():
            self._counts = StepCounts(os.getpid(), stage)
            go_first()

    def add_sampling(self, requests: int) -> None:
        """The step is not over: it samples."""
        self._emulated += self._profile.sampling_seconds(requests)

    def end(self) -> None:
        """Sleep what is left of the step, and count it."""
        self.sleep()
        assert self._counts is not None, "begin() comes first"
        now = time.monotonic()
        took = now - self._begun
        self._counts.add(self._emulated, took - self._slept, took, now)
        self._report(self._counts)

    def sleep(self) -> None:
        """Sleep until the emulated time has passed."""
        now = time.monotonic()
        left = self._begun + self._emulated - now
        if left > 0:
            time.sleep(left)
            self._slept += time.monotonic() - now

    def _report(self, counts: StepCounts) -> None:
        folder = os.environ.get(REPORTS_VARIABLE)
        now = time.monotonic()
        if not folder or now - self._reported_at < REPORT_INTERVAL_SECONDS:
            return
        self._reported_at = now
        path = Path(folder, f"{counts.pid}.json")
        unfinished = path.with_suffix(".new")
        unfinished.write_bytes(msgspec.json.encode(counts))
        unfinished.replace(path)


def work_of(scheduled: Any) -> tuple[int, int, float]:
    """Of a `SchedulerOutput`: its tokens, the sum of their requests' contexts, and the sum of tokens times context."""
    counts = scheduled.num_scheduled_tokens
    computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
    cached = scheduled.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    context = sum(computed[request] + tokens for request, tokens in counts.items())
    pairs = sum(tokens * (computed[request] + tokens / 2) for request, tokens in counts.items())
    return scheduled.total_num_scheduled_tokens, context, pairs


def _hook_runner(runner_class: Any, profile: Profile) -> None:
    from vllm.distributed.parallel_state import get_pp_group

    clock = StepClock(profile)
    execute, sample = runner_class.execute_model, runner_class.sample_tokens

    def execute_model(self: Any, scheduled: Any, intermediate_tensors: Any = None) -> Any:
        if not scheduled.total_num_scheduled_tokens:
            return execute(self, scheduled, intermediate_tensors)
        if hasattr(intermediate_tensors, "wait_for_comm"):
            intermediate_tensors.wait_for_comm()
        group = get_pp_group()
        clock.begin(scheduled, group.rank_in_group)
        output = execute(self, scheduled, intermediate_tensors)
        if group.is_last_rank:
            # The step goes on in `sample_tokens`, unless it recomputes KV and samples nothing.
            clock.sleep()
        else:
            clock.end()
        return output

    def sample_tokens(self: Any, grammar: Any) -> Any:
        samples = self.execute_model_state is not None
        requests = self.input_batch.num_reqs
        output = sample(self, grammar)
        if samples:
            clock.add_sampling(requests)
            clock.end()
        return output

    runner_class.execute_model = execute_model
    runner_class.sample_tokens = sample_tokens


def _hook_kv(profile: Profile) -> None:
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

    spec_of, forward = Attention.get_kv_cache_spec, CPUAttentionBackendImpl.forward
    write = CPUAttentionBackendImpl.do_kv_cache_update
    make_builder = CPUAttentionMetadataBuilder.__init__

    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = spec_of(self, vllm_config)
        # All stages have one layer: the hook's model is made so.
        return spec if spec is None else dataclasses.replace(spec, num_kv_heads=heads_of(spec, profile))

    def builder(self: Any, *args: Any, **kwargs: Any) -> None:
        make_builder(self, *args, **kwargs)
        self.num_kv_heads = 1

    def attend(self: Any, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, attn_metadata: Any,
               *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        computed = kv_cache if attn_metadata is None else kv_cache[:, :1]
        return forward(self, layer, query, key, value, computed, attn_metadata, *args, **kwargs)

    def update(self: Any, layer: Any, key: Any, value: Any, kv_cache: Any, slots: Any) -> None:
        write(self, layer, key, value, kv_cache[:, :1], slots)
        fill(kv_cache, key, value, slots)

    Attention.get_kv_cache_spec = get_kv_cache_spec
    CPUAttentionMetadataBuilder.__init__ = builder
    CPUAttentionBackendImpl.forward = attend
    CPUAttentionBackendImpl.do_kv_cache_update = update


def heads_of(spec: Any, profile: Profile) -> int:
    """KV heads of a layer that holds all KV of its stage."""
    per_head = 2 * spec.head_size * spec.dtype.itemsize
    heads, rest = divmod(profile.kv_bytes_per_token, per_head)
    if rest or heads < 2:
        raise UsageError(f"{profile.kv_bytes_per_token} bytes of KV are no multiple of the {per_head} of a head")
    return int(heads)


def fill(kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Write a layer's one computed head, (tokens, 1, head size), into the others of `kv_cache`.

    `kv_cache` has the shape (blocks, heads, block size, 2 * head size); a slot below 0 is padding. The order of the
    values in the other heads is ours: those of a token lie together, so that it is one copy.
    """
    blocks, heads, block_size, width = kv_cache.shape
    rest = kv_cache[:, 1:].view(blocks, block_size, heads - 1, width)
    row = torch.cat((key[: len(slots), 0], value[: len(slots), 0]), dim=1)[slots >= 0]
    slots = slots[slots >= 0]
    rest[slots // block_size, slots % block_size] = row.unsqueeze(1).expand(-1, heads - 1, -1)


def _hook_waiting() -> None:
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    make = shm_broadcast.SpinCondition.__init__

    def sleeping(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        self.busy_loop_s = 0

    shm_broadcast.SpinCondition.__init__ = sleeping
    shm_broadcast.sched_yield = lambda: time.sleep(QUEUE_POLL_SECONDS)
    # vLLM's own fallback, torch.distributed, sleeps on a socket.
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda _: False


def _hook_engine() -> None:
    from vllm.v1.engine.core import EngineCore

    add = EngineCore.add_request

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(self, MARK):
            setattr(self, MARK, True)
            go_first()
        return add(self, *args, **kwargs)

    EngineCore.add_request = add_request
