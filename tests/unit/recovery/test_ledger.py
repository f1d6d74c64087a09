"""The ledger folds completed steps into what a worker has to know."""

import pytest

from kevlarflow.errors import ProtocolViolation
from kevlarflow.recovery.ledger import Admission, Continuation, Ledger, Step, StepResult


def step(sequence=1, admissions=(), continuations=(), scheduled=None, finished=(), preempted=()):
    return Step(sequence, admissions, continuations, scheduled or {}, frozenset(finished), frozenset(preempted))


def result(generators=None, **tokens):
    return StepResult(tokens=tokens, generators=generators or {})


def admitted(prompt=(1, 2, 3), blocks=(4,), computed=0, scheduled=3, **options):
    ledger = Ledger()
    admission = Admission("a", prompt, blocks, computed, sampling=None, **options)
    ledger.complete(step(admissions=(admission,), scheduled={"a": scheduled}), result(a=[9]))
    return ledger


def test_an_admission_becomes_an_entry_with_its_first_token():
    entry = admitted()["a"]
    assert (entry.prompt, entry.output, entry.blocks, entry.computed) == ([1, 2, 3], [9], [4], 3)


def test_a_prefix_hit_counts_as_computed():
    assert admitted(blocks=(7, 4), computed=2, scheduled=1)["a"].computed == 3


def test_blocks_are_appended_and_the_scheduler_list_is_not_shared():
    ledger = admitted()
    blocks = [5]
    ledger.complete(step(2, continuations=(Continuation("a", False, blocks, 3, 1),), scheduled={"a": 1}), result(a=[8]))
    blocks.append(6)
    entry = ledger["a"]
    assert (entry.blocks, entry.computed, entry.output) == ([4, 5], 4, [9, 8])


def test_copies_stay_as_the_ledger_was():
    ledger = admitted()
    (before,) = ledger.copies()
    ledger.complete(step(2, continuations=(Continuation("a", False, [5], 3, 1),), scheduled={"a": 1}), result(a=[8]))
    assert (before.blocks, before.output, before.computed) == ([4], [9], 3)
    assert (ledger["a"].blocks, ledger["a"].output) == ([4, 5], [9, 8])


def test_a_preempted_request_owns_no_blocks_and_keeps_its_tokens():
    ledger = admitted()
    ledger.complete(step(2, preempted=["a"]), result())
    entry = ledger["a"]
    assert (entry.blocks, entry.computed, entry.tokens) == ([], 0, [1, 2, 3, 9])


def test_a_resumed_request_gets_a_new_table():
    ledger = admitted()
    ledger.complete(step(2, preempted=["a"]), result())
    ledger.complete(step(3, continuations=(Continuation("a", True, (6, 7), 2, 1),), scheduled={"a": 2}), result(a=[8]))
    assert (ledger["a"].blocks, ledger["a"].computed) == ([6, 7], 4)


def test_output_that_the_scheduler_dropped_is_dropped():
    ledger = admitted()
    ledger.complete(step(2, continuations=(Continuation("a", False, (), 3, 0),), scheduled={"a": 1}), result(a=[8]))
    assert ledger["a"].output == [8]


def test_a_finished_request_is_forgotten_before_a_new_one_of_its_name_is_admitted():
    ledger = admitted()
    again = Admission("a", (5,), (9,), 0, None)
    ledger.complete(step(2, admissions=(again,), scheduled={"a": 1}, finished=["a"]), result(a=[1]))
    assert ledger["a"].prompt == [5]


def test_prompt_log_probabilities_are_owed_until_the_first_token():
    ledger = Ledger()
    admission = Admission("a", (1, 2, 3), (4,), 0, None, prompt_logprobs=True)
    ledger.complete(step(admissions=(admission,), scheduled={"a": 2}), result())
    assert ledger["a"].prompt_logprobs
    ledger.complete(step(2, continuations=(Continuation("a", False, (), 2, 0),), scheduled={"a": 1}), result(a=[9]))
    assert not ledger["a"].prompt_logprobs


def test_the_newest_generator_state_is_kept():
    ledger = admitted()
    going_on = (Continuation("a", False, (), 3, 1),)
    ledger.complete(step(2, continuations=going_on, scheduled={"a": 1}), result({"a": b"s1"}, a=[8]))
    ledger.complete(step(3, continuations=(Continuation("a", False, (), 4, 2),), scheduled={"a": 1}), result(a=[7]))
    assert ledger["a"].generator == b"s1"


def test_a_step_for_an_unknown_request_is_refused():
    with pytest.raises(ProtocolViolation, match="ghost"):
        Ledger().complete(step(scheduled={"ghost": 1}), result(ghost=[1]))


def test_a_request_that_goes_on_behind_more_tokens_than_are_known_is_refused():
    """Its random generator would not be where its output is."""
    going_on = Continuation("a", False, (), 3, 2)
    with pytest.raises(ProtocolViolation, match="behind 2 output tokens, but the ledger knows of 1"):
        admitted().complete(step(2, continuations=(going_on,), scheduled={"a": 1}), result(a=[8]))
