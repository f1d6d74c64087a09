"""Steps that come again: what a stage may pass on as it did before, and what it has to compute."""

from __future__ import annotations

from kevlarflow.node import kept
from kevlarflow.node.kept import MAX_RESULTS, MAX_STEPS, KeptSteps


def with_steps(*numbers: int) -> KeptSteps:
    """These were computed in one epoch, and now another one has begun."""
    steps = KeptSteps()
    for number in numbers:
        steps.computed(number, asked(number), f"output {number}", 1, {number: number})
    steps.renew()
    return steps


def asked(number: int) -> bytes:
    return b"step %d" % number


def test_a_step_that_comes_again_as_it_was_is_passed_on_in_the_next_epoch_and_the_one_after() -> None:
    steps = with_steps(1, 2)
    assert steps.output(1, asked(1)) == "output 1"
    steps.passed_on(1, "output 1, as it is now")
    steps.renew()
    assert [steps.output(number, asked(number)) for number in (1, 2)] == ["output 1, as it is now", "output 2"]


def test_within_an_epoch_no_step_comes_twice() -> None:
    steps = KeptSteps()
    steps.computed(1, asked(1), "output", 1, {})
    assert steps.output(1, asked(1)) is None


def test_a_step_that_has_changed_is_computed_and_so_is_all_behind_it() -> None:
    steps = with_steps(1, 2)
    assert steps.output(1, b"without a request") is None
    assert steps.output(2, asked(2)) is not None
    steps.computed(1, b"without a request", "another output", 1, {})
    assert steps.output(2, asked(2)) is None, "step 1 may have written what step 2 reads"


def test_what_is_computed_again_changes_nothing_unless_a_kept_step_was_given_the_block() -> None:
    steps = KeptSteps()
    steps.computed(7, asked(7), "output", 1, {3: 2, 4: 7})
    steps.renew()
    steps.recomputed([1, 3], oldest=7)
    assert steps.output(7, asked(7)) == "output", "block 3 has other tokens of the same request"
    steps.recomputed([4], oldest=7)
    assert steps.output(7, asked(7)) is None, "somebody had block 4 before, and has it again"


def test_a_block_that_was_given_in_a_step_that_is_over_is_computed_again_for_the_same_request() -> None:
    steps = KeptSteps()
    steps.computed(1, asked(1), "output", 1, {9: 1})
    steps.computed(2, asked(2), "output", 1, {9: 1})
    steps.renew()
    steps.recomputed([9], oldest=2)
    assert steps.output(2, asked(2)) == "output"


def test_what_is_put_in_place_for_a_recovery_makes_all_of_them_void() -> None:
    steps = with_steps(1)
    steps.computed(2, asked(2), "output", 1, {})
    steps.spoil()
    steps.renew()
    assert steps.output(1, asked(1)) is None
    assert steps.output(2, asked(2)) is None


def test_a_step_is_computed_if_a_later_one_that_has_run_was_given_its_block() -> None:
    """One in between may have lost a request, and be computed: it would read what is there now."""
    steps = KeptSteps()
    steps.computed(1, asked(1), "output", 1, {5: 1, 6: 1})
    steps.computed(2, asked(2), "output", 1, {6: 1})
    steps.computed(3, asked(3), "output", 1, {5: 3})
    steps.renew()
    assert steps.output(1, asked(1)) is None
    assert steps.output(2, asked(2)) is not None


def test_only_so_many_are_kept_and_so_many_bytes(monkeypatch) -> None:
    steps = with_steps(*range(MAX_STEPS + 1))
    assert steps.output(0, asked(0)) is None
    assert steps.output(MAX_STEPS, asked(MAX_STEPS)) is not None
    monkeypatch.setattr(kept, "MAX_BYTES", 10)
    steps = KeptSteps()
    for number in (1, 2):
        steps.computed(number, asked(number), "output", 6, {})
    steps.renew()
    assert [steps.output(number, asked(number)) is not None for number in (1, 2)] == [False, True]
    steps.computed(3, asked(3), "output", 11, {})
    steps.renew()
    assert steps.output(3, asked(3)) is None, "it is too long by itself"


def test_results_bear_their_epoch_and_the_newest_are_kept() -> None:
    steps = KeptSteps()
    for number in range(MAX_RESULTS + 1):
        steps.sampled(1, number, b"result", 6)
    steps.renew()
    steps.sampled(2, MAX_RESULTS, b"once more", 9)
    assert next(iter(steps.results)) == (1, 2)
    assert list(steps.results)[-2:] == [(1, MAX_RESULTS), (2, MAX_RESULTS)]
