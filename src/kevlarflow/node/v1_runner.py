"""Runner state over vLLM's V1 model runner: the only module that knows how that runner keeps requests.

A lane is a runner of its own over shared weights and shared KV tensors. Where block `b` of its scheduler is in those
tensors says the lane's block table (`node.block_map`); ids are translated here, on the way in, so neither the scheduler
nor the kernels know of it.

Non-public names of vLLM that are used, all checked by `check_runner`: `requests`, `input_batch`,
`num_prompt_logprobs`, `execute_model_state`, `discard_request_mask`, `_get_prompt_logprobs_dict`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from vllm.sampling_params import SamplingParams, SamplingType
from vllm.sequence import IntermediateTensors
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from kevlarflow.errors import IncompatibleVllm
from kevlarflow.node.block_map import physical
from kevlarflow.node.stage import Activations, Sampled
from kevlarflow.node.thinking_budget import catch_up
from kevlarflow.recovery.ledger import LedgerEntry
from kevlarflow.recovery.recompute import Chunk, Span

USED_NAMES = (
    "requests",
    "input_batch",
    "num_prompt_logprobs",
    "execute_model_state",
    "discard_request_mask",
    "_get_prompt_logprobs_dict",
)


def check_runner(runner: Any) -> None:
    """Raise `IncompatibleVllm` when the model runner lacks a name that this module uses."""
    missing = [name for name in USED_NAMES if not hasattr(runner, name)]
    if missing:
        raise IncompatibleVllm(
            f"vLLM's {type(runner).__name__} has no {', '.join(missing)}: this KevlarFlow release needs vLLM 0.32"
        )


class V1LaneRunner:
    """`LaneRunner` over a V1 `GPUModelRunner` or one of its subclasses."""

    def __init__(self, runner: Any) -> None:
        check_runner(runner)
        self._runner = runner
        self._table: Sequence[int] = ()
        self._gathered: dict[str, Any] = {}
        """Prompt log-probabilities that recompute chunks have gathered so far."""

    def use_blocks(self, table: Sequence[int]) -> None:
        """See `LaneRunner.use_blocks`."""
        self._table = table

    # ---- running

    def execute(
        self, step: Any, activations: Activations | None, grammar: Any, computed: Callable[[], None]
    ) -> Activations | Sampled | None:
        """See `LaneRunner.execute`."""
        translate_blocks(step, self._table)
        self._forget_withdrawn_tokens(step.scheduled_cached_reqs)
        with torch.inference_mode():
            output = self._runner.execute_model(step, _wrap(activations))
            computed()
            if isinstance(output, IntermediateTensors):
                return dict(output.tensors)
            if output is not None:
                return None
            with self._keep_generators_of_unfinished_prompts():
                sampled: ModelRunnerOutput = self._runner.sample_tokens(grammar)
        return Sampled(sampled, self._generator_states(sampled))

    @property
    def batch(self) -> tuple[str, ...]:
        """See `LaneRunner.batch`."""
        return tuple(self._runner.input_batch.req_ids)

    def follow(self, step: Any, output: Activations, batch: Sequence[str]) -> Activations:
        """See `LaneRunner.follow`."""
        translate_blocks(step, self._table)
        # They hold what the step has written already.
        step.new_block_ids_to_zero = None
        # Without tokens the runner takes note of everything else, and computes nothing.
        step.total_num_scheduled_tokens = 0
        self._forget_withdrawn_tokens(step.scheduled_cached_reqs)
        with torch.inference_mode():
            self._runner.execute_model(step)
        return reordered(output, batch, self.batch, step.num_scheduled_tokens)

    def _forget_withdrawn_tokens(self, going_on: CachedRequestData) -> None:
        """Take back output tokens that the scheduler does not count.

        When somebody resets the prefix cache with requests running, vLLM's scheduler drops the tokens in flight. The
        ledger hears of it with the next step only, so a request may have been restored with one. vLLM's runner takes
        it back at the last stage; at the others it has no tokens but what the scheduler sends.
        """
        for request, outputs in zip(going_on.req_ids, going_on.num_output_tokens, strict=True):
            if request not in self._runner.input_batch.req_id_to_index:
                del self._runner.requests[request].output_token_ids[outputs:]

    @contextmanager
    def _keep_generators_of_unfinished_prompts(self) -> Iterator[None]:
        """Let a seeded request draw nothing while its prompt is chunked.

        vLLM samples for such a request too, drops the token, and winds the generator back by its offset, which CPU
        generators do not have (it raises). Without a generator the row draws from the global one instead.
        """
        batch = self._runner.input_batch
        unfinished = numpy.flatnonzero(self._runner.discard_request_mask.np[: batch.num_reqs])
        held = {index: batch.generators.pop(index) for index in unfinished.tolist() if index in batch.generators}
        try:
            yield
        finally:
            batch.generators.update(held)

    def _generator_states(self, output: ModelRunnerOutput) -> dict[str, bytes]:
        states = {}
        for index, generator in self._runner.input_batch.generators.items():
            if output.sampled_token_ids[index]:
                states[output.req_ids[index]] = generator.get_state().numpy().tobytes()
        return states

    # ---- recovery

    def recompute(self, chunk: Chunk, activations: Activations | None) -> Activations | None:
        """See `LaneRunner.recompute`."""
        names = [f"recompute-{index}" for index in range(len(chunk.spans))]
        batch = self.batch
        step = SchedulerOutput.make_empty()
        step.scheduled_new_reqs = [self._new(n, s) for n, s in zip(names, chunk.spans, strict=True)]
        step.num_scheduled_tokens = {n: s.end - s.start for n, s in zip(names, chunk.spans, strict=True)}
        step.total_num_scheduled_tokens = chunk.num_tokens
        try:
            with torch.inference_mode():
                output = self._runner.execute_model(step, _wrap(activations))
                if output is None:
                    self._gather_prompt_logprobs(names, step, chunk)
        finally:
            self._runner.execute_model_state = None
            self._forget(names)
            # The stages behind the lost one do not run it: the order of the rows must not come to differ from theirs.
            if batch:
                self._batch_again(batch)
        return output.tensors if isinstance(output, IntermediateTensors) else None

    def _batch_again(self, batch: Sequence[str]) -> None:
        """Put these requests into the empty batch, in this order, as they are."""
        known = [self._runner.requests[request] for request in batch]
        step = SchedulerOutput.make_empty()
        step.scheduled_cached_reqs = CachedRequestData(
            req_ids=list(batch),
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None] * len(batch),
            num_computed_tokens=[each.num_computed_tokens for each in known],
            num_output_tokens=[len(each.output_token_ids) for each in known],
        )
        step.num_scheduled_tokens = dict.fromkeys(batch, 1)
        self._runner.execute_model(step)

    def _new(self, name: str, span: Span) -> NewRequestData:
        """A request that is all prompt: nothing will be sampled from it."""
        return NewRequestData(
            req_id=name,
            prompt_token_ids=list(span.tokens),
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0),
            pooling_params=None,
            block_ids=(physical(span.blocks, self._table),),
            num_computed_tokens=span.start,
            lora_request=None,
        )

    def _gather_prompt_logprobs(self, names: Sequence[str], step: SchedulerOutput, chunk: Chunk) -> None:
        """Collect what the spans owe of their prompts' log-probabilities, as the runner does while it samples."""
        owing = {name: span for name, span in zip(names, chunk.spans, strict=True) if span.prompt_logprobs}
        if not owing:
            return
        runner = self._runner
        for name, span in owing.items():
            runner.requests[name].in_progress_prompt_logprobs_cpu = self._gathered.get(span.request)
        others = runner.num_prompt_logprobs
        runner.num_prompt_logprobs = {n: self._num_prompt_logprobs(s.sampling) for n, s in owing.items()}
        try:
            hidden_states = runner.execute_model_state.hidden_states[: chunk.num_tokens]
            runner._get_prompt_logprobs_dict(hidden_states, step.num_scheduled_tokens)
        finally:
            runner.num_prompt_logprobs = others
        for name, span in owing.items():
            self._gathered[span.request] = runner.requests[name].in_progress_prompt_logprobs_cpu

    def reset(self) -> None:
        """See `LaneRunner.reset`."""
        self._runner.execute_model_state = None
        self._gathered.clear()
        self._forget(list(self._runner.requests))

    def _forget(self, requests: Sequence[str]) -> None:
        step = SchedulerOutput.make_empty()
        step.finished_req_ids = set(requests)
        self._runner.execute_model(step)

    def restore(self, entries: Sequence[LedgerEntry]) -> None:
        """See `LaneRunner.restore`."""
        for entry in entries:
            request = CachedRequestState(
                req_id=entry.request,
                prompt_token_ids=list(entry.prompt),
                mm_features=[],
                sampling_params=entry.sampling,
                generator=self._generator(entry),
                block_ids=(physical(entry.blocks, self._table),),
                num_computed_tokens=entry.computed,
                output_token_ids=list(entry.output),
                in_progress_prompt_logprobs_cpu=self._gathered.pop(entry.request, None),
            )
            self._runner.requests[entry.request] = request
            catch_up(self._runner.input_batch, request)
            if entry.prompt_logprobs:
                self._runner.num_prompt_logprobs[entry.request] = self._num_prompt_logprobs(entry.sampling)

    def _num_prompt_logprobs(self, sampling: SamplingParams) -> int:
        wanted = sampling.prompt_logprobs
        assert wanted is not None
        return int(self._runner.input_batch.vocab_size if wanted == -1 else wanted)

    def _generator(self, entry: LedgerEntry) -> torch.Generator | None:
        if entry.sampling.sampling_type != SamplingType.RANDOM_SEED:
            return None
        generator = torch.Generator(device=self._runner.device)
        generator.manual_seed(entry.sampling.seed)
        if entry.generator is not None:
            generator.set_state(torch.frombuffer(bytearray(entry.generator), dtype=torch.uint8))
        return generator


def _wrap(activations: Activations | None) -> IntermediateTensors | None:
    return None if activations is None else IntermediateTensors(dict(activations))


def reordered(output: Activations, before: Sequence[str], now: Sequence[str], tokens: Mapping[str, int]) -> Activations:
    """A step's output, whose rows are those of a batch in one order, with the rows of the same batch in another."""
    if tuple(before) == tuple(now):
        return output
    first_row = dict(zip(before, itertools.accumulate((tokens[each] for each in before), initial=0), strict=False))
    rows = [row for each in now for row in range(first_row[each], first_row[each] + tokens[each])]
    # What is behind them is padding.
    return {name: tensor[[*rows, *range(len(rows), len(tensor))]] for name, tensor in output.items()}


def translate_blocks(step: SchedulerOutput, table: Sequence[int]) -> None:
    """Put the physical block in place of every block id of a step."""
    for new in step.scheduled_new_reqs:
        new.block_ids = _translated(new.block_ids, table)
    cached: CachedRequestData = step.scheduled_cached_reqs
    cached.new_block_ids = [None if blocks is None else _translated(blocks, table) for blocks in cached.new_block_ids]
    if step.new_block_ids_to_zero:
        step.new_block_ids_to_zero = physical(step.new_block_ids_to_zero, table)


def _translated(blocks: tuple[list[int], ...], table: Sequence[int]) -> tuple[list[int], ...]:
    return tuple(physical(group, table) for group in blocks)
