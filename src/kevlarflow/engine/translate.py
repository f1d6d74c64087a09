"""From vLLM's scheduler objects to the ledger's, and back: the one place that knows both."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Sequence

from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput
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
    """What the ledger has to know of a `ModelRunnerOutput`, with that itself for the scheduler."""
    tokens = dict(zip(output.req_ids, output.sampled_token_ids, strict=True))
    return StepResult(tokens=tokens, generators=generators, output=output)


@dataclasses.dataclass
class AbandonedOutput(ModelRunnerOutput):
    """Stands for the output of a step that will never have one; the scheduler hook ends its requests."""

    reason: str = ""


def abandoned(reason: str) -> AbandonedOutput:
    """What vLLM gets for a step that will never have an output."""
    return AbandonedOutput(req_ids=[], req_id_to_index={}, reason=reason)


def completed(output: ModelRunnerOutput | None, left_out: frozenset[str]) -> ModelRunnerOutput | None:
    """The output for vLLM, in which requests that were left out of the step have sampled nothing.

    They may be in it: if another step raises, its requests are taken out of those that are under way with them.
    """
    if not left_out:
        return output
    output = output or ModelRunnerOutput(req_ids=[], req_id_to_index={})
    for request in sorted(left_out):
        if request in output.req_id_to_index:
            output.sampled_token_ids[output.req_id_to_index[request]] = []
            output.prompt_logprobs_dict.pop(request, None)
        else:
            output.req_id_to_index[request] = len(output.req_ids)
            output.req_ids.append(request)
            output.sampled_token_ids.append([])
    return output


def leave_out(payload: tuple[bytes, bytes], requests: frozenset[str]) -> tuple[bytes, bytes]:
    """A pickled step, (`SchedulerOutput`, `GrammarOutput` or None), as if these requests were not in it."""
    step: SchedulerOutput = pickle.loads(payload[0])
    grammar: GrammarOutput | None = pickle.loads(payload[1])
    step.scheduled_new_reqs = [new for new in step.scheduled_new_reqs if new.req_id not in requests]
    step.scheduled_cached_reqs = _cached_without(step.scheduled_cached_reqs, requests)
    step.num_scheduled_tokens = {r: n for r, n in step.num_scheduled_tokens.items() if r not in requests}
    step.total_num_scheduled_tokens = sum(step.num_scheduled_tokens.values())
    if grammar is not None:
        rows = [row for row, r in enumerate(grammar.structured_output_request_ids) if r not in requests]
        ids = [grammar.structured_output_request_ids[row] for row in rows]
        grammar = GrammarOutput(ids, grammar.grammar_bitmask[rows]) if rows else None
    return pickle.dumps(step, pickle.HIGHEST_PROTOCOL), pickle.dumps(grammar, pickle.HIGHEST_PROTOCOL)


def _cached_without(cached: CachedRequestData, requests: frozenset[str]) -> CachedRequestData:
    kept = [index for index, request in enumerate(cached.req_ids) if request not in requests]
    return CachedRequestData(
        req_ids=[cached.req_ids[index] for index in kept],
        resumed_req_ids=cached.resumed_req_ids - requests,
        new_token_ids=[cached.new_token_ids[index] for index in kept] if cached.new_token_ids else [],
        all_token_ids={r: tokens for r, tokens in cached.all_token_ids.items() if r not in requests},
        new_block_ids=[cached.new_block_ids[index] for index in kept],
        num_computed_tokens=[cached.num_computed_tokens[index] for index in kept],
        num_output_tokens=[cached.num_output_tokens[index] for index in kept],
    )


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
