"""A thinking budget does not depend on which rows were away, or were rebuilt: vLLM's own holder is asked what it says.

The reference is a row that was never away, which vLLM's holder follows token by token.
"""

from __future__ import annotations

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from kevlarflow.errors import IncompatibleVllm
from kevlarflow.node import thinking_budget
from kevlarflow.node.thinking_budget import ThinkingBudget, follow_thinking

PROMPT, START = [1, 2], [7]
VOCABULARY = 20


def vllms(end: list[int]) -> ThinkingBudgetStateHolder:
    config: Any = SimpleNamespace(reasoning_start_token_ids=START, reasoning_end_token_ids=end)
    return ThinkingBudgetStateHolder(config, 4, 0, torch.device("cpu"), False)


def row(index: int, budget: int, tokens: list[int]) -> Any:
    return index, SamplingParams(thinking_token_budget=budget), PROMPT, tokens


def enter(holder: ThinkingBudgetStateHolder, *rows: Any, removed: tuple[int, ...] = (), moved: Any = ()) -> None:
    holder.sync_batch(BatchUpdate(batch_size=len(rows), removed=list(removed), added=list(rows), moved=list(moved)))


def forced(holder: ThinkingBudgetStateHolder, *outputs: list[int]) -> list[int | None]:
    """The token that each row has to have next, None where it is free."""
    holder.update_state([*outputs], None)
    logits = holder.apply_to_logits(torch.zeros(len(outputs), VOCABULARY), False, [[] for _ in outputs])
    return [int(each.argmax()) if each.max() > 1 else None for each in logits]


def drawn(chance: random.Random, budget: int, end: list[int], count: int) -> tuple[list[int], list[int | None]]:
    """Tokens of a request without failure, and which of them were forced."""
    holder, tokens, told = vllms(end), list[int](), list[int | None]()
    enter(holder, row(0, budget, tokens))
    for _ in range(count):
        (token,) = forced(holder, tokens)
        told.append(token)
        tokens.append(chance.choice([*START, *end, 3, 4, 5]) if token is None else token)
    return tokens, told


@pytest.mark.parametrize("end", [[11], [11, 12, 13]])
@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_row_that_comes_back_goes_on_as_if_it_had_never_been_away(end: list[int], rebuilt: bool) -> None:
    for seed in range(150):
        chance = random.Random(seed)
        budget = chance.randrange(6)
        tokens, told = drawn(chance, budget, end, 25)
        holder = ThinkingBudget(vllms(end))
        outputs: list[int] = []
        enter(holder, row(0, budget, outputs))
        for token, expected in zip(tokens, told, strict=True):
            if chance.random() < 0.3:
                enter(holder, removed=(0,))
                if rebuilt:
                    outputs = list(outputs)
                enter(holder, row(0, budget, outputs))
            assert forced(holder, outputs) == [expected], f"seed {seed}, behind {outputs}"
            outputs.append(token)


def test_a_row_that_takes_the_place_of_another_and_one_that_moves_keep_their_own() -> None:
    end = [11, 12, 13]
    tokens, told = drawn(random.Random(5), 2, end, 20)
    holder, here, there = ThinkingBudget(vllms(end)), list[int](), list[int]()
    enter(holder, row(0, 2, here))
    for token, expected in zip(tokens, told, strict=True):
        assert forced(holder, here) == [expected]
        here.append(token)
        # In one update the place is taken and the former row comes back beside it, as vLLM's batches do.
        enter(holder, row(0, 2, there))
        forced(holder, there)
        enter(holder, row(1, 2, here), moved=[(0, 1, MoveDirectionality.SWAP)])
        enter(holder, removed=(1,))


def test_a_token_that_was_withdrawn_is_asked_for_again() -> None:
    end = [11, 12, 13]
    tokens, told = drawn(random.Random(3), 1, end, 20)
    holder, outputs = ThinkingBudget(vllms(end)), list[int]()
    enter(holder, row(0, 1, outputs))
    for token, expected in zip(tokens, told, strict=True):
        assert forced(holder, outputs) == [expected]
        # It was sampled, and the scheduler does not count it.
        enter(holder, removed=(0,))
        enter(holder, row(0, 1, outputs))
        assert forced(holder, outputs) == [expected], f"behind {outputs}"
        outputs.append(token)


def test_a_long_thought_is_found_out_again_in_less_than_a_step() -> None:
    tokens = [*START, *(3 + each % 3 for each in range(4_000))]
    holder = ThinkingBudget(vllms([11, 12, 13]))
    began = time.thread_time()
    enter(holder, row(0, 100_000, tokens))
    assert time.thread_time() - began < 2.0


def test_rows_that_have_ended_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinking_budget, "MOST_AWAY", 3)
    holder = ThinkingBudget(vllms([11]))
    for _ in range(10):
        enter(holder, row(0, 2, [5]))
        enter(holder, removed=(0,))
    assert len(holder._away) == 3


def test_the_batch_gets_it_where_it_has_reasoning() -> None:
    batch: Any = SimpleNamespace(thinking_budget_state_holder=None)
    follow_thinking(batch)
    assert batch.thinking_budget_state_holder is None
    batch.thinking_budget_state_holder = vllms([11])
    follow_thinking(batch)
    assert isinstance(batch.thinking_budget_state_holder, ThinkingBudget)
    with pytest.raises(IncompatibleVllm, match=r"InputBatch\.thinking_budget_state_holder"):
        follow_thinking(SimpleNamespace())
