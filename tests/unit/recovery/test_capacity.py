"""Who has to give way, and what that leaves behind."""

from kevlarflow.recovery.capacity import Fallout, choose_usable, fallout, without
from kevlarflow.recovery.coverage import allocated
from kevlarflow.recovery.ledger import Admission, Step
from kevlarflow.recovery.recompute import unreachable_hits

SIZE = 4


def step(sequence, *admissions):
    scheduled = {each.request: len(each.prompt) - each.computed for each in admissions}
    return Step(sequence, admissions, (), scheduled, frozenset(), frozenset())


def admission(request, blocks, tokens, computed=0):
    return Admission(request, tuple(range(tokens)), blocks, computed, None)


def test_oldest_requests_keep_their_blocks_and_less_is_a_part_of_what_was():
    tables = {"old": (1, 2, 3), "new": (4, 5), "small": (6,)}
    half, aside = choose_usable(tables, [], None, 9, 2, lambda _: 0)
    assert ({1, 2, 3, 6} <= half, len(half), aside) == (True, 4, {"new"})
    third, _ = choose_usable({"old": (1, 2)}, [], half, 9, 3, lambda _: 0)
    assert third < half
    again, _ = choose_usable({}, [], third, 9, 2, lambda _: 0)
    assert third < again


def test_who_holds_a_block_that_nobody_fills_goes_as_well():
    steps = [step(1, admission("a", (1, 2), 8)), step(2, admission("b", (1, 3), 6, computed=4))]
    found = fallout({}, steps, None, Fallout(frozenset("a")), SIZE)
    assert found == Fallout(frozenset("ab"), frozenset({1, 2, 3}))


def test_a_block_that_was_given_to_somebody_left_out_counts_as_taken():
    left = without(step(1, admission("a", (1, 2), 8), admission("b", (3,), 4)), frozenset("b"), SIZE)
    assert left.scheduled == {"a": 8}
    assert allocated(left, SIZE) == {1, 2, 3}, "some stage may have written block 3 already"


def test_a_cached_block_behind_one_that_is_filled_in_flight_is_out_of_reach():
    filling = step(1, admission("a", (1, 2), 8))
    hitting = step(2, admission("b", (1, 5, 6), 12, computed=8))
    assert unreachable_hits([filling, hitting], SIZE, lost=True) == {"b"}
    assert unreachable_hits([hitting], SIZE, lost=True) == set()


def test_with_no_stage_lost_it_is_so_once_a_later_step_has_taken_it():
    filling = step(1, admission("a", (1, 2), 8))
    hitting = step(2, admission("b", (1, 5, 6), 12, computed=8))
    assert unreachable_hits([filling, hitting], SIZE, lost=False) == set()
    taking = step(3, admission("c", (5,), 4))
    assert unreachable_hits([filling, hitting, taking], SIZE, lost=False) == {"b"}
