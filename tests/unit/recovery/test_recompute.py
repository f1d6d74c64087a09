"""What is computed again after a loss, and what is not."""

from kevlarflow.recovery.ledger import Admission, Continuation, Ledger, Step, StepResult
from kevlarflow.recovery.recompute import Limits, plan

LIMITS = Limits(max_batched_tokens=8, max_requests=2, block_size=2, stages=3)
NOTHING = StepResult(tokens={}, generators={})


def step(sequence, admissions=(), continuations=(), finished=(), preempted=(), **scheduled):
    return Step(sequence, admissions, continuations, scheduled, frozenset(finished), frozenset(preempted))


def ledger_of(**requests):
    """Requests as (prompt length, blocks), all computed."""
    ledger = Ledger()
    for index, (name, (length, blocks)) in enumerate(requests.items()):
        admission = Admission(name, tuple(range(length)), blocks, 0, None)
        ledger.complete(step(index, (admission,), **{name: length}), NOTHING)
    return ledger


def spans(chunks):
    return [[(s.request, s.start, s.end) for s in chunk.spans] for chunk in chunks]


def test_live_tokens_go_through_the_lost_stage_in_chunks():
    chunks = plan(ledger_of(a=(5, (1, 2, 3)), b=(6, (4, 5, 6))), [], [1], LIMITS)
    assert spans(chunks) == [[("a", 0, 5), ("b", 0, 3)], [("b", 3, 6)]]
    assert [chunk.through for chunk in chunks] == [1, 1]


def test_chunks_hold_no_more_requests_than_the_scheduler_allows():
    chunks = plan(ledger_of(a=(1, (1,)), b=(1, (2,)), c=(1, (3,))), [], [0], LIMITS)
    assert [len(chunk.spans) for chunk in chunks] == [2, 1]


def test_nothing_lost_nothing_computed():
    assert plan(ledger_of(a=(5, (1, 2, 3))), [], [], LIMITS) == []


def test_a_shared_prefix_is_computed_once():
    chunks = plan(ledger_of(a=(5, (1, 2, 3)), b=(5, (1, 2, 4))), [], [1], LIMITS)
    assert spans(chunks) == [[("a", 0, 5), ("b", 4, 5)]]


def test_with_several_lost_stages_the_last_one_counts():
    assert plan(ledger_of(a=(1, (1,))), [], [0, 2], LIMITS)[0].through == 2


def test_the_hit_of_a_request_admitted_in_flight_is_computed():
    in_flight = [step(9, (Admission("b", (0, 1, 2, 3, 4), (7, 8, 9), 4, None),), b=1)]
    assert spans(plan(Ledger(), in_flight, [1], LIMITS)) == [[("b", 0, 4)]]


def test_a_hit_that_another_step_in_flight_fills_is_left_to_it():
    first = step(8, (Admission("a", (0, 1, 2, 3), (7, 8), 0, None),), a=4)
    second = step(9, (Admission("b", (0, 1, 2, 3, 4), (7, 8, 9), 4, None),), b=1)
    assert plan(Ledger(), [first, second], [1], LIMITS) == []


def test_a_request_that_ends_in_flight_is_not_computed():
    assert plan(ledger_of(a=(3, (1, 2))), [step(9, finished=["a"])], [1], LIMITS) == []


def test_a_request_that_was_preempted_in_flight_is_not_computed():
    assert plan(ledger_of(a=(3, (1, 2))), [step(9, preempted=["a"])], [1], LIMITS) == []


def test_a_request_whose_block_was_given_away_in_flight_is_computed_on_all_stages():
    ledger = ledger_of(a=(3, (1, 2)))
    uses = step(8, continuations=(Continuation("a", False, (), 3, 1),), a=1)
    takes = step(9, (Admission("b", (5, 6), (2,), 0, None),), preempted=["a"], b=2)
    chunks = plan(ledger, [uses, takes], [0], LIMITS)
    assert spans(chunks) == [[("a", 0, 3)]]
    assert chunks[0].through == 2


def test_it_is_computed_even_when_no_stage_is_lost():
    ledger = ledger_of(a=(3, (1, 2)))
    uses = step(8, continuations=(Continuation("a", False, (), 3, 1),), a=1)
    takes = step(9, (Admission("b", (5, 6), (2,), 0, None),), preempted=["a"], b=2)
    assert len(plan(ledger, [uses, takes], [], LIMITS)) == 1


def test_owed_prompt_log_probabilities_are_gathered_again_at_the_last_stage():
    ledger = Ledger()
    admission = Admission("a", (0, 1, 2, 3, 4), (1, 2, 3), 0, "sampling", prompt_logprobs=True)
    ledger.complete(step(1, (admission,), a=3), NOTHING)
    (chunk,) = plan(ledger, [], [0], LIMITS)
    (span,) = chunk.spans
    assert (chunk.through, span.prompt_logprobs, span.sampling) == (2, True, "sampling")
    assert len(span.tokens) == 5, "the log-probability of a position needs the token behind it"


def test_a_request_that_was_admitted_and_resumed_in_flight_has_its_prompt():
    first = step(8, (Admission("a", (0, 1, 2, 3, 4), (1, 2, 3), 2, None),), a=1)
    resumed = Continuation("a", True, (1, 6, 7), 2, 0)
    second = step(9, continuations=(resumed,), preempted=["a"], a=1)
    assert spans(plan(Ledger(), [first, second], [1], LIMITS)) == [[("a", 0, 2)]]


def test_a_request_that_ends_is_computed_again_if_it_is_computed_until_then():
    """Another one hits what it writes on the way: it has copies of its own of the blocks before."""
    ledger = Ledger()
    tokens = tuple(range(100, 114))
    first = Admission("ends", tokens[:13], (11, 12), 0, None)
    ledger.complete(Step(1, (first,), (), {"ends": 8}, frozenset(), frozenset()), NOTHING)
    writes = Step(2, (), (Continuation("ends", False, (13,), 8, 0),), {"ends": 4}, frozenset(), frozenset())
    hits = Admission("hits", tokens, (1, 2, 13, 14), 12, None)
    over = Step(3, (hits,), (), {"hits": 2}, frozenset({"ends"}), frozenset())
    limits = Limits(max_batched_tokens=64, max_requests=8, block_size=4, stages=2)
    assert spans(plan(ledger, [writes, over], [0], limits)) == [[("ends", 0, 8), ("hits", 0, 8)]]
    # Once that step is over, nobody reads its blocks any more.
    ledger.complete(writes, NOTHING)
    assert spans(plan(ledger, [over], [0], limits)) == [[("hits", 0, 12)]]


def test_a_name_that_is_used_again_at_once_stands_for_the_new_request():
    ledger = ledger_of(a=(6, (1, 2, 3)))
    again = step(9, (Admission("a", (90, 91, 92), (7, 8), 2, None),), finished=["a"], a=1)
    (chunk,) = plan(ledger, [again], [0], LIMITS)
    (span,) = chunk.spans
    assert (span.tokens, span.blocks) == ((90, 91), (7,))
