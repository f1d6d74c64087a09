"""vLLM's thinking budget for rows that come back: after a failure, and whenever a request was not part of a step.

vLLM's V1 sampler follows the thinking of each row of its batch token by token, to force its end in time
(`thinking_token_budget`). From tokens that come all at once it tells something else, and begins to force the end anew.
That is what a row has that is put into the batch with tokens, because its request was rebuilt, or was left out of a
step, as happens all the time with more than one stage. So here what is known of a row outlives its absence, and of one
that was rebuilt it is found out again from one token after another. Then it follows from the tokens alone.

Non-public names of vLLM: a runner's `requests` with their `output_token_ids`, and, used in this module only,
`InputBatch.thinking_budget_state_holder`, of that `_state`, with the fields `output_tok_ids`, `prev_output_length`,
`spec_token_ids`, `force_index` and `scan_offset`, `_update_think_state` and `_find_last_sequence_index`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.v1.sample.logits_processor.interface import BatchUpdate
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from kevlarflow.errors import IncompatibleVllm

USED_NAMES = ("sync_batch", "_update_think_state", "_find_last_sequence_index", "_init_state_entry")
KEPT = "kevlarflow_thinking"
"""Attribute of a request in vLLM's runner: what is known of its row while that is not in the batch. So it is gone with
the request."""


def check_thinking_budget(runner: Any) -> None:
    """Raise `IncompatibleVllm` when vLLM's runner or its thinking budget lacks a name that this module uses."""
    missing = [name for name in USED_NAMES if not hasattr(ThinkingBudgetStateHolder, name)]
    if not hasattr(runner, "requests"):
        missing.append("GPUModelRunner.requests")
    if not hasattr(runner.input_batch, "thinking_budget_state_holder"):
        missing.append("InputBatch.thinking_budget_state_holder")
    if missing:
        raise IncompatibleVllm(
            f"vLLM's thinking budget has no {', '.join(missing)}: this KevlarFlow release needs vLLM 0.32"
        )


def follow_thinking(runner: Any) -> None:
    """Replace the state holder of a runner whose stage samples, if it has one: without reasoning it has none."""
    check_thinking_budget(runner)
    holder = runner.input_batch.thinking_budget_state_holder
    if holder is not None:
        runner.input_batch.thinking_budget_state_holder = ThinkingBudget(holder, runner.requests)


def catch_up(batch: Any, request: Any) -> None:
    """Find out what is to be known of a request that was rebuilt, before it is in the batch.

    With long answers that takes as long as some steps do, and the step that first has them would be taken for stuck.
    """
    holder = getattr(batch, "thinking_budget_state_holder", None)
    if isinstance(holder, ThinkingBudget):
        holder.catch_up(request)


class ThinkingBudget(ThinkingBudgetStateHolder):
    """See the module's text."""

    def __init__(self, original: ThinkingBudgetStateHolder, requests: Mapping[str, Any]) -> None:
        self.__dict__.update(original.__dict__)
        self._requests = requests
        """The runner's own, by name: those that have not ended, whether or not they are in the batch."""

    def sync_batch(self, batch_update: BatchUpdate | None) -> None:
        """Take note of rows that come, go and move."""
        before = list(self._state.values())
        super().sync_batch(batch_update)
        if not before and not self._state:
            return
        # They share the list of output tokens with their rows.
        requests = {id(request.output_token_ids): request for request in self._requests.values()}
        now = {id(state) for state in self._state.values()}
        for state in before:
            request = requests.get(id(state["output_tok_ids"]))
            # vLLM forgets a request that has ended before its row.
            if id(state) not in now and request is not None:
                vars(request)[KEPT] = state
        known = {id(state) for state in before}
        for index, state in self._state.items():
            if id(state) not in known:
                self._state[index] = self._as_before(state, requests.get(id(state["output_tok_ids"])))

    def catch_up(self, request: Any) -> None:
        """See the function of that name."""
        budget = request.sampling_params.thinking_token_budget
        if budget is not None:
            new = self._init_state_entry(request.prompt_token_ids, budget)
            vars(request)[KEPT] = self._found_out(new | {"output_tok_ids": request.output_token_ids})

    def _as_before(self, new: dict[str, Any], request: Any) -> dict[str, Any]:
        tokens: list[int] = new["output_tok_ids"]
        kept: dict[str, Any] | None = vars(request).pop(KEPT, None) if request is not None else None
        # The last token may have been withdrawn; more than that is another story.
        if kept is not None and kept["output_tok_ids"] is tokens and kept["prev_output_length"] <= len(tokens):
            return kept
        return self._found_out(new)

    def _found_out(self, new: dict[str, Any]) -> dict[str, Any]:
        """What it would have learnt before each token; before the next one it is asked anyway.

        vLLM looks for the beginning and the end of a thought in all tokens since the last one (`scan_offset`). Here it
        is let see only the last few: it was asked before each token, so what lies further back it has found already.
        Otherwise the time for a row would grow with the square of its tokens, and its node be taken for stuck.
        """
        tokens: list[int] = new["output_tok_ids"]
        so_far: list[int] = []
        new |= {"output_tok_ids": so_far, "spec_token_ids": []}
        longest = max(len(self.think_start_token_ids), len(self.think_end_token_ids))
        last_thought: int = new["scan_offset"]
        for token in tokens:
            seen_from = max(last_thought, len(so_far) - longest)
            new["scan_offset"], new["force_index"] = seen_from, []
            self._update_think_state(new)
            if new["scan_offset"] != seen_from:
                last_thought = new["scan_offset"]
            so_far.append(token)
        return new | {"output_tok_ids": tokens, "scan_offset": last_thought}

    @staticmethod
    def _find_last_sequence_index(target_list: Sequence[int], token_ids: Sequence[int]) -> int:
        """As vLLM does, but quickly where there is nothing: it looks at all tokens before each token."""
        if not token_ids or token_ids[0] not in target_list:
            return -1
        found: int = ThinkingBudgetStateHolder._find_last_sequence_index(list(target_list), list(token_ids))
        return found
