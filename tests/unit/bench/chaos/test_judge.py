"""Judgement, from answers made by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from kevlarflow.bench.chaos.judge import Happened, Observed, differences, harm, judge, largest_gap
from kevlarflow.bench.chaos.load import Answer
from kevlarflow.bench.chaos.scenario import Checks
from kevlarflow.bench.chaos.show import last_line
from kevlarflow.bench.streams import Stream, Tokens


def answer(name: str = "r", pieces: str = "abcd", *, cancelled: bool = False, **fields: Any) -> Answer:
    times = [10.0 + index for index in range(len(pieces))]
    whole = {"usage_tokens": len(pieces), "finish_reason": "length", "done": True} if not cancelled else {}
    stream = Stream(name, 9.0, 0, times, [1] * len(pieces), list(pieces))
    return Answer(msgspec.structs.replace(stream, **(whole | fields)), was_cancelled=cancelled)


def found(checks: Checks, seen: Observed) -> dict[str, bool]:
    return {verdict.check: verdict.holds for verdict in judge(checks, seen)}


FAULT = Happened("crash node-0-1#1", 11.5, "gone", is_to_be_detected=True, detected_seconds=0.1)
GOOD = Observed(
    faults=[FAULT],
    answers=[answer(), answer("s")],
    reference=[answer(), answer("s")],
    lane_back_seconds=8.0,
    moved_seconds=[15.0],
    left_behind=[],
)
ALL = Checks(largest_gap_seconds=1, detected_seconds=0.1, lane_back_seconds=8, moved_seconds=15)


def test_all_checks_hold() -> None:
    verdicts = judge(ALL, GOOD)
    assert len(verdicts) == 8
    assert all(verdict.holds for verdict in verdicts)
    assert last_line("crash", verdicts).startswith(
        "PASSED crash: requests lost: 0 of 2, texts identical: all of 2 compared"
    )


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"answers": [answer(done=False), answer("s")]}, "requests lost"),
        ({"answers": [answer(failure="HTTP 503"), answer("s")]}, "requests lost"),
        ({"answers": [answer(pieces="abXd")]}, "texts identical"),
        ({"answers": [answer(finish_reason="stop")]}, "texts identical"),
        ({"reference": None}, "texts identical"),
        ({"answers": [answer(times=[10.0, 11.0, 12.5, 13.0])]}, "largest gap"),
        ({"answers": [answer(times=[1.0, 2.0, 3.0, 4.0])]}, "largest gap"),
        ({"faults": [msgspec.structs.replace(FAULT, detected_seconds=0.2)]}, "detected within"),
        ({"faults": [FAULT, msgspec.structs.replace(FAULT, detected_seconds=None)]}, "detected within"),
        ({"lane_back_seconds": 8.1}, "lane back within"),
        ({"lane_back_seconds": None}, "lane back within"),
        ({"moved_seconds": [15.0, 15.1]}, "moved within"),
        ({"moved_seconds": [15.0, None]}, "moved within"),
        ({"moved_seconds": []}, "moved within"),
        ({"left_behind": ["kevlarflow node"]}, "left behind"),
        ({"unexpected": ["crash of node-1-1"]}, "unexpected losses"),
    ],
)
def test_what_breaks_one_check_breaks_no_other(change: dict[str, Any], broken: str) -> None:
    verdicts = judge(ALL, msgspec.structs.replace(GOOD, **change))
    assert [verdict.check for verdict in verdicts if not verdict.holds] == [broken]
    assert last_line("crash", verdicts).startswith(f"FAILED crash: {broken}: ")


def test_only_what_is_asked_for_is_judged() -> None:
    nothing = Checks(lost_requests=None, identical=False, unexpected_losses=None, left_behind=None)
    assert judge(nothing, GOOD) == []
    usual = {"requests lost", "texts identical", "unexpected losses"}
    assert set(found(Checks(), msgspec.structs.replace(GOOD, left_behind=None))) == usual


def test_texts_are_not_identical_when_none_was_compared() -> None:
    checks = Checks(lost_requests=None, unexpected_losses=None, left_behind=None)
    for answers in ([], [answer(failure="HTTP 503")]):
        (verdict,) = judge(checks, msgspec.structs.replace(GOOD, answers=answers))
        assert (verdict.found, verdict.holds) == ("all of 0 compared", False)


def test_a_void_run_is_held_to_what_no_fault_excuses() -> None:
    def broken(**change: Any) -> list[str]:
        return [verdict.check for verdict in harm(ALL, msgspec.structs.replace(GOOD, lane_back_seconds=None, **change))]

    assert broken() == broken(answers=[]) == broken(answers=[], reference=None) == []
    assert broken(answers=[answer(failure="HTTP 503"), answer("s")]) == ["requests lost"]
    assert broken(answers=[answer(failure="HTTP 503")]) == ["requests lost"]
    assert broken(answers=[], unexpected=["crash of node-1-1"]) == ["unexpected losses"]


def test_gaps_count_from_the_first_fault_on() -> None:
    answers = [answer(times=[0.0, 5.0, 6.0, 8.0])]
    assert largest_gap(answers, since=5.5) == 2.0
    assert largest_gap(answers, since=4.0) == 5.0
    assert largest_gap(answers, since=8.0) is None


def test_a_wait_that_begins_when_all_is_whole_again_is_no_faults() -> None:
    answers = [answer(times=[0.0, 5.0, 6.0, 8.0, 18.0])]
    assert largest_gap(answers, since=5.5, until=7.0) == 2.0
    assert largest_gap(answers, since=5.5, until=8.0) == 10.0, "it began before that"
    assert largest_gap(answers, since=5.5, until=None) == 10.0, "never whole again"


@pytest.mark.parametrize(
    ("tokens", "is_same"),
    [
        (Tokens([1, 2, 3], [-0.5, -0.1, None]), True),
        (Tokens([1, 2, 3], [-0.5, -0.1009, None]), True),
        (Tokens([1, 2, 3], [-0.5, -0.102, None]), False),
        (Tokens([1, 2, 3], [-0.5, -0.1, -0.2]), False),
        (Tokens([1, 2, 3], [-0.5, -0.1]), False),
        (Tokens([1, 2, 4], [-0.5, -0.1, None]), False),
    ],
)
def test_the_same_text_from_other_tokens_or_with_other_logprobs_differs(tokens: Tokens, is_same: bool) -> None:
    expected = answer()
    expected.tokens = Tokens([1, 2, 3], [-0.5, -0.1, None])
    found = answer()
    found.tokens = tokens
    assert differences([found], [expected]) == ([] if is_same else ["r"])


def test_tokens_of_a_cancelled_request_are_compared_as_far_as_both_went() -> None:
    one, other = answer(cancelled=True), answer(cancelled=True)
    one.tokens, other.tokens = Tokens([1, 2]), Tokens([1, 2, 3])
    assert differences([one], [other]) == []
    one.tokens = Tokens([1, 4])
    assert differences([one], [other]) == ["r"]


def test_a_cancelled_request_is_compared_as_far_as_both_went() -> None:
    assert differences([answer(pieces="abc", cancelled=True)], [answer(pieces="abcd", cancelled=True)]) == []
    assert differences([answer(pieces="abX", cancelled=True)], [answer(pieces="abcd", cancelled=True)]) == ["r"]
    assert answer(cancelled=True).defect() is None
