"""The comparison itself: whatever may go wrong in a stream has to be reported, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from parity.client import Recording
from parity.compare import Difference, compare, compare_all, unexcused
from parity.workload import Request, completion

REQUEST = completion("r", "hello", "greedy", logprobs=2)
WORDS = ("a", " quick", " brown", " fox", " jumps", ".")
MARGINS = [1.0, 0.5, 0.00005, 1.0, 1.0, 1.0]


def event(position: int, *, final: bool = False) -> dict[str, Any]:
    word = WORDS[position]
    choice = {
        "index": 0,
        "text": word,
        "token_ids": [100 + position],
        "logprobs": {
            "tokens": [word],
            "token_logprobs": [-0.5 - position],
            "top_logprobs": [{word: -0.5 - position, "x": -7.0}],
            "text_offset": [position],
        },
        "finish_reason": "length" if final else None,
    }
    return {"id": "cmpl-1", "created": 1, "object": "text_completion", "model": "m", "choices": [choice]}


def recording() -> Recording:
    events = [event(position, final=position == len(WORDS) - 1) for position in range(len(WORDS))]
    usage = {"prompt_tokens": 1, "completion_tokens": len(WORDS), "total_tokens": 1 + len(WORDS)}
    events.append({"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [], "usage": usage})
    return Recording("r", status=200, events=events, done=True)


def differences(damage: Callable[[Recording], None], request: Request = REQUEST) -> list[Difference]:
    damaged = recording()
    damage(damaged)
    return compare(request, recording(), damaged, MARGINS)


def lose(damaged: Recording) -> None:
    del damaged.events[3]


def repeat(damaged: Recording) -> None:
    damaged.events.insert(3, copy.deepcopy(damaged.events[2]))


def reorder(damaged: Recording) -> None:
    damaged.events[3], damaged.events[4] = damaged.events[4], damaged.events[3]


def move_logprob(damaged: Recording) -> None:
    damaged.events[3]["choices"][0]["logprobs"]["token_logprobs"][0] += 0.01


def move_alternative(damaged: Recording) -> None:
    damaged.events[3]["choices"][0]["logprobs"]["top_logprobs"][0]["x"] = -6.0


def change_token(damaged: Recording) -> None:
    damaged.events[3]["choices"][0]["token_ids"] = [999]


def change_text(damaged: Recording) -> None:
    damaged.events[3]["choices"][0]["text"] = " cat"


def move_text(damaged: Recording) -> None:
    damaged.events[2]["choices"][0]["text"] = " brown fox"
    damaged.events[3]["choices"][0]["text"] = ""


def end_early(damaged: Recording) -> None:
    damaged.events = [*damaged.events[:3], damaged.events[-1]]


def change_reason(damaged: Recording) -> None:
    damaged.events[5]["choices"][0]["finish_reason"] = "stop"


def go_on_after_the_end(damaged: Recording) -> None:
    extra = event(5)
    extra["choices"][0].update(text="", token_ids=[], logprobs=None)
    damaged.events.insert(6, extra)


def change_usage(damaged: Recording) -> None:
    damaged.events[-1]["usage"]["completion_tokens"] += 1


def add_error(damaged: Recording) -> None:
    damaged.events.append({"error": {"message": "no"}})


def drop_end_mark(damaged: Recording) -> None:
    damaged.done = False


def break_connection(damaged: Recording) -> None:
    damaged.failure = "ReadError"


def answer_unavailable(damaged: Recording) -> None:
    damaged.status = 503


def add_unknown_field(damaged: Recording) -> None:
    damaged.events[2]["choices"][0]["surprise"] = 1


@pytest.mark.parametrize(
    "damage",
    [
        lose, repeat, reorder, move_logprob, move_alternative, change_token, change_text, move_text, end_early,
        change_reason, go_on_after_the_end, change_usage, add_error, drop_end_mark, break_connection,
        answer_unavailable, add_unknown_field,
    ],
)  # fmt: skip
def test_damage_is_reported(damage: Callable[[Recording], None]) -> None:
    assert unexcused(differences(damage)) != []


def test_nothing_is_reported_of_an_equal_recording() -> None:
    assert differences(lambda damaged: None) == []


def test_ids_and_times_do_not_matter() -> None:
    def rename(damaged: Recording) -> None:
        for each in damaged.events:
            each["id"], each["created"] = "other", 99

    assert differences(rename) == []


def test_where_the_server_cuts_events_does_not_matter() -> None:
    def join(damaged: Recording) -> None:
        first, second = (damaged.events[index]["choices"][0] for index in (2, 3))
        first["text"] += second["text"]
        first["token_ids"] += second["token_ids"]
        for key in first["logprobs"]:
            first["logprobs"][key] += second["logprobs"][key]
        del damaged.events[3]

    assert differences(join) == []


def test_a_logprob_may_move_within_the_tolerance() -> None:
    def nudge(damaged: Recording) -> None:
        damaged.events[3]["choices"][0]["logprobs"]["token_logprobs"][0] += 0.0005

    assert differences(nudge) == []


def test_a_tie_in_the_reference_excuses_another_token_and_is_listed() -> None:
    def take_the_other(damaged: Recording) -> None:
        damaged.events[2]["choices"][0]["token_ids"] = [555]

    found = differences(take_the_other)
    assert [difference.excused for difference in found] == [True]
    assert "tie" in str(found[0])
    assert unexcused(found) == []


def test_a_tie_excuses_nothing_before_it() -> None:
    def lose_before_the_tie(damaged: Recording) -> None:
        del damaged.events[1]

    assert unexcused(differences(lose_before_the_tie)) != []


def test_a_stream_that_ends_at_a_tie_is_not_excused() -> None:
    def stop_at_the_tie(damaged: Recording) -> None:
        damaged.events = [*damaged.events[:2], damaged.events[-1]]

    assert unexcused(differences(stop_at_the_tie)) != []


@pytest.mark.parametrize("kept", [0, 2, 4])
def test_a_cancelled_stream_is_compared_as_far_as_it_went(kept: int) -> None:
    cancelled = completion("r", "hello", "cancel", logprobs=2, cancel_after_events=kept)

    def leave(damaged: Recording) -> None:
        damaged.events, damaged.done, damaged.cancelled = damaged.events[:kept], False, True

    def leave_with_damage(damaged: Recording) -> None:
        leave(damaged)
        damaged.events[1]["choices"][0]["token_ids"] = [7]

    assert differences(leave, cancelled) == []
    if kept:
        assert unexcused(differences(leave_with_damage, cancelled)) != []


def test_a_request_that_should_have_been_cancelled_and_was_not_is_reported() -> None:
    cancelled = completion("r", "hello", "cancel", cancel_after_events=2)
    assert unexcused(differences(lambda damaged: None, cancelled)) != []


def test_a_missing_recording_is_reported() -> None:
    assert compare_all([REQUEST], {"r": recording()}, {}, {}) != []


def test_choices_are_compared_each_by_itself() -> None:
    def two(order: tuple[int, ...]) -> Recording:
        events = []
        for index in order:
            position = sum(each["choices"][0]["index"] == index for each in events)
            events.append(event(position, final=position == 1))
            events[-1]["choices"][0]["index"] = index
        return Recording("r", status=200, events=events, done=True)

    assert compare(REQUEST, two((0, 1, 0, 1)), two((1, 1, 0, 0))) == []
    assert unexcused(compare(REQUEST, two((0, 1, 0, 1)), two((0, 0)))) != []
