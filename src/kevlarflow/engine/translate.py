"""From vLLM's scheduler objects to the ledger's, and back: the one place that knows both."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from kevlarflow.errors import ProtocolViolation
from kevlarflow.recovery.ledger import Admission, Continuation, Step, StepResult


def step_of(output: SchedulerOutput, sequence: int, formation: int) -> Step:
    """The step in a `SchedulerOutput`.

    Raises `ProtocolViolation` for what cannot be rebuilt after a failure: more than one KV cache group, and copied
    blocks. Start-up refuses the models and features that lead there.
    """
    if output.kv_cache_block_copies:
        raise ProtocolViolation("the scheduler copies KV blocks, which KevlarFlow cannot repeat after a failure")
    return Step(
        sequence=sequence,
        admissions=tuple(_admission(new) for new in output.scheduled_new_reqs),
        continuations=tuple(_continuations(output.scheduled_cached_reqs)),
        scheduled=dict(output.num_scheduled_tokens),
        finished=frozenset(output.finished_req_ids),
        preempted=frozenset(output.preempted_req_ids or ()),
        formation=formation,
    )


def has_news(output: SchedulerOutput) -> bool:
    """Whether a step without tokens tells the nodes anything.

    While all requests have a token in flight, vLLM makes empty steps: one for each that has tokens, mostly.
    """
    return bool(
        output.finished_req_ids
        or output.preempted_req_ids
        or output.new_block_ids_to_zero
        or output.kv_cache_block_copies
        or output.free_encoder_mm_hashes
    )


def result_of(output: ModelRunnerOutput, generators: dict[str, bytes]) -> StepResult:
    """What the ledger has to know of a `ModelRunnerOutput`."""
    return StepResult(tokens=dict(zip(output.req_ids, output.sampled_token_ids, strict=True)), generators=generators)


def _admission(new: NewRequestData) -> Admission:
    sampling = new.sampling_params
    return Admission(
        request=new.req_id,
        prompt=list(new.prompt_token_ids or ()),
        blocks=_only_group(new.block_ids),
        computed=new.num_computed_tokens,
        sampling=sampling,
        prompt_logprobs=sampling is not None and sampling.prompt_logprobs is not None,
    )


def _continuations(cached: CachedRequestData) -> list[Continuation]:
    return [
        Continuation(
            request=request,
            resumed=request in cached.resumed_req_ids,
            new_blocks=_only_group(cached.new_block_ids[index]),
            computed=cached.num_computed_tokens[index],
            outputs=cached.num_output_tokens[index],
        )
        for index, request in enumerate(cached.req_ids)
    ]


def _only_group(blocks: tuple[list[int], ...] | None) -> Sequence[int]:
    """A copy, because vLLM goes on appending to its own lists."""
    if blocks is None:
        return ()
    if len(blocks) != 1:
        raise ProtocolViolation(f"the model has {len(blocks)} KV cache groups, KevlarFlow supports one")
    return tuple(blocks[0])
