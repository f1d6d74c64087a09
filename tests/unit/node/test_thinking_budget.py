"""A thinking budget does not depend on which rows were away, or were rebuilt: vLLM's own holder is asked what it says.

The reference is a row that was never away, which vLLM's holder follows token by token.
"""

from __future__ import annotations

import dataclasses
import random
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

from kevlarflow.errors import IncompatibleVllm
from kevlarflow.node.thinking_budget import KEPT, ThinkingBudget, catch_up, follow_thinking

PROMPT, START = [1, 2], [7]
VOCABULARY = 20


def vllms(end: list[int]) -> ThinkingBudgetStateHolder:
    config: Any = SimpleNamespace(reasoning_start_token_ids=START, reasoning_end_token_ids=end)
    return ThinkingBudgetStateHolder(config, 4, 0, torch.device("cpu"), False)


def ours(end: list[int], *outputs: list[int]) -> ThinkingBudget:
    """In a runner that has requests with these tokens."""
    return ThinkingBudget(vllms(end), {str(index): request(tokens) for index, tokens in enumerate(outputs)})


def request(tokens: list[int]) -> SimpleNamespace:
    return SimpleNamespace(output_token_ids=tokens)


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
        outputs: list[int] = []
        requests = {"r": request(outputs)}
        holder = ThinkingBudget(vllms(end), requests)
        enter(holder, row(0, budget, outputs))
        for token, expected in zip(tokens, told, strict=True):
            if chance.random() < 0.3:
                enter(holder, removed=(0,))
                if rebuilt:
                    outputs = list(outputs)
                    requests["r"] = request(outputs)
                enter(holder, row(0, budget, outputs))
            assert forced(holder, outputs) == [expected], f"seed {seed}, behind {outputs}"
            outputs.append(token)


def test_a_row_that_takes_the_place_of_another_and_one_that_moves_keep_their_own() -> None:
    end = [11, 12, 13]
    tokens, told = drawn(random.Random(5), 2, end, 20)
    here, there = list[int](), list[int]()
    holder = ours(end, here, there)
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
    outputs = list[int]()
    holder = ours(end, outputs)
    enter(holder, row(0, 1, outputs))
    for token, expected in zip(tokens, told, strict=True):
        assert forced(holder, outputs) == [expected]
        # It was sampled, and the scheduler does not count it.
        enter(holder, removed=(0,))
        enter(holder, row(0, 1, outputs))
        assert forced(holder, outputs) == [expected], f"behind {outputs}"
        outputs.append(token)


@dataclasses.dataclass(frozen=True)
class Case:
    """A request with all that vLLM's holder is made of, drawn so that beginnings and ends overlap and are cut off."""

    start: list[int]
    end: list[int]
    prompt: list[int] | None
    budget: int
    tokens: list[int]

    @classmethod
    def drawn(cls, seed: int) -> Case:
        chance = random.Random(seed)
        words = range(1, chance.choice([3, 4, 7]))

        def some(most: int) -> list[int]:
            return [chance.choice(words) for _ in range(chance.randint(0, most))]

        start, end, prompt = some(3), some(4), some(8)
        tokens = [token for _ in range(chance.randrange(12)) for token in chance.choice([start, end, some(6)])]
        return cls(start, end, chance.choice([prompt, prompt + start, None]), chance.randrange(12), tokens)

    def holder(self) -> ThinkingBudgetStateHolder:
        config: Any = SimpleNamespace(reasoning_start_token_ids=self.start, reasoning_end_token_ids=self.end)
        return ThinkingBudgetStateHolder(config, 4, 0, torch.device("cpu"), False)

    def enter(self, holder: ThinkingBudgetStateHolder, tokens: list[int]) -> None:
        enter(holder, (0, SimpleNamespace(thinking_token_budget=self.budget), self.prompt, tokens))


def test_what_is_found_out_again_is_all_that_vllm_would_know() -> None:
    thoughts = 0
    for seed in range(3_000):
        case, outputs = Case.drawn(seed), list[int]()
        vllm, again = case.holder(), ThinkingBudget(case.holder(), {})
        case.enter(vllm, outputs)
        for token in case.tokens:
            vllm.update_state([outputs], None)
            outputs.append(token)
        case.enter(again, outputs)
        if outputs:
            assert again._state == vllm._state, f"seed {seed}: {case}"
        for _ in range(2):
            for holder in (vllm, again):
                holder.update_state([outputs], None)
            assert again._state == vllm._state, f"seed {seed}: {case}"
            outputs.extend(case.end[:1])
        thoughts += vllm._state[0]["scan_offset"] > 0
    assert thoughts > 300, "they are to think, and to be done with it"


class Counted(int):
    """A token that counts how often it is looked at."""

    looks = 0

    def __eq__(self, other: object) -> bool:
        Counted.looks += 1
        return int(self) == other

    __hash__ = int.__hash__


@pytest.mark.parametrize("begins", [False, True])
def test_twice_the_tokens_are_found_out_again_with_twice_the_work(
    monkeypatch: pytest.MonkeyPatch, *, begins: bool
) -> None:
    def looks(count: int) -> int:
        Counted.looks = 0
        tokens = [Counted(each) for each in [*(START if begins else [3]), *(11 + each % 2 for each in range(count))]]
        enter(ours([11, 12, 13]), row(0, 100_000, tokens))
        return Counted.looks

    assert 0 < looks(2_000) < 3 * looks(1_000)


@pytest.mark.parametrize("withdrawn", [0, 1])
def test_a_request_that_was_rebuilt_is_found_out_before_it_is_in_a_step(
    monkeypatch: pytest.MonkeyPatch, withdrawn: int
) -> None:
    for seed in range(500):
        case, outputs = Case.drawn(seed), list[int]()
        vllm = case.holder()
        case.enter(vllm, outputs)
        for token in case.tokens:
            vllm.update_state([outputs], None)
            outputs.append(token)
        sampling = SimpleNamespace(thinking_token_budget=case.budget)
        rebuilt = request(outputs)
        vars(rebuilt).update(prompt_token_ids=case.prompt, sampling_params=sampling)
        runner: Any = SimpleNamespace(input_batch=SimpleNamespace(thinking_budget_state_holder=case.holder()))
        runner.requests = {"r": rebuilt}
        follow_thinking(runner)
        catch_up(runner.input_batch, rebuilt)
        # The scheduler may not count the last token, which was sampled just before the failure.
        del outputs[len(outputs) - withdrawn :]
        again = runner.input_batch.thinking_budget_state_holder
        with monkeypatch.context() as patch:
            patch.setattr(again, "_found_out", lambda _, seed=seed: pytest.fail(f"seed {seed}: not yet"))
            case.enter(again, outputs)
        for holder in (vllm, again):
            holder.update_state([outputs], None)
        assert again._state == vllm._state, f"seed {seed}: {case}"


def test_without_a_budget_or_without_reasoning_there_is_nothing_to_catch_up_with() -> None:
    free = SimpleNamespace(sampling_params=SamplingParams())
    for batch in (SimpleNamespace(), SimpleNamespace(thinking_budget_state_holder=None)):
        catch_up(batch, free)
    catch_up(SimpleNamespace(thinking_budget_state_holder=ours([11])), free)
    assert KEPT not in vars(free)


class Tokens(list[int]):
    """Tokens of which is seen whether anybody keeps them."""


@pytest.mark.parametrize("away", [False, True])
def test_nothing_is_kept_of_a_request_that_has_ended(*, away: bool) -> None:
    tokens = Tokens([*START, 3, 4])
    requests = {"ends": request(tokens), "stays": request([*START, 5])}
    holder = ThinkingBudget(vllms([11]), requests)
    enter(holder, row(0, 9, tokens), row(1, 9, requests["stays"].output_token_ids))
    assert forced(holder, tokens, requests["stays"].output_token_ids) == [None, None]
    kept = weakref.ref(tokens)
    del tokens
    if away:
        enter(holder, removed=(0, 1))
        assert kept() is not None
    del requests["ends"]
    if not away:
        enter(holder, removed=(0, 1))
    assert kept() is None
    known = vars(requests["stays"])[KEPT]
    enter(holder, row(0, 9, requests["stays"].output_token_ids))
    assert holder._state[0] is known


def test_the_batch_gets_it_where_it_has_reasoning() -> None:
    runner: Any = SimpleNamespace(input_batch=SimpleNamespace(thinking_budget_state_holder=None), requests={})
    follow_thinking(runner)
    assert runner.input_batch.thinking_budget_state_holder is None
    runner.input_batch.thinking_budget_state_holder = vllms([11])
    follow_thinking(runner)
    assert isinstance(runner.input_batch.thinking_budget_state_holder, ThinkingBudget)
    with pytest.raises(IncompatibleVllm, match=r"requests, InputBatch\.thinking_budget_state_holder"):
        follow_thinking(SimpleNamespace(input_batch=SimpleNamespace()))
