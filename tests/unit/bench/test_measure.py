"""Measurement on records made by hand, with the answers worked out on paper."""

from __future__ import annotations

import pytest

from kevlarflow.bench.measure import (
    DRAIN_SECONDS,
    gaps,
    longest_gap_during,
    longest_gap_within,
    pause_after,
    percentile,
    ratios,
    spread,
    summarize,
    time_per_output_token,
    time_to_first_token,
)
from kevlarflow.bench.streams import Stream


def stream(sent_at: float, *times: float, counts: list[int] | None = None) -> Stream:
    return Stream("s", sent_at, times=list(times), counts=counts or [1] * len(times), pieces=["x"] * len(times))


def test_percentile_interpolates_between_neighbours():
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.0) == 1.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 1.0) == 4.0
    assert percentile([0.0, 10.0], 0.99) == pytest.approx(9.9)
    assert percentile([7.0], 0.99) == 7.0


def test_there_is_no_percentile_of_nothing():
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


def test_time_to_first_token_counts_from_the_request():
    assert time_to_first_token(stream(10.0, 10.25, 10.5)) == 0.25


def test_time_per_output_token_counts_tokens_not_events():
    # 1 + 3 tokens in two events: 3 tokens in 0.6 s.
    assert time_per_output_token(stream(0.0, 1.0, 1.6, counts=[1, 3])) == pytest.approx(0.2)


def test_time_per_output_token_leaves_out_what_came_with_the_first_event():
    assert time_per_output_token(stream(0.0, 1.0, 2.0, counts=[5, 1])) == pytest.approx(1.0)


def test_one_event_has_no_time_per_output_token():
    assert time_per_output_token(stream(0.0, 1.0, counts=[4])) is None


def test_gaps_are_between_events():
    assert gaps(stream(0.0, 1.0, 1.5, 3.0)) == [0.5, 1.5]


def test_summary_of_a_load():
    summary = summarize([stream(0.0, 1.0, 2.0, 3.0), stream(1.0, 3.0, 5.0)], at_a_time=2)
    assert (summary.streams, summary.requests, summary.tokens) == (2, 2, 5)
    assert summary.seconds == 5.0
    assert summary.tokens_per_second == 1.0
    assert (summary.ttft_p50, summary.tpot_p50) == (1.5, 1.5)
    assert summary.ttft_p99 == pytest.approx(1.99)


# ---- pauses


def test_a_pause_ends_with_the_token_after_the_longest_wait():
    pause = pause_after(stream(0.0, 1.0, 2.0, 5.0, 6.0), fault_at=2.5)
    assert pause is not None
    assert (pause.resumed_seconds, pause.gap_seconds, pause.tokens_before) == (2.5, 3.0, 2)


def test_a_token_that_was_on_its_way_does_not_end_the_pause():
    pause = pause_after(stream(0.0, 1.0, 2.0, 2.01, 4.0, 4.1), fault_at=2.005)
    assert pause is not None
    assert pause.next_token_seconds == pytest.approx(0.005)
    assert pause.resumed_seconds == pytest.approx(1.995)
    assert pause.tokens_before == 3


def test_a_wait_that_begins_when_what_was_on_its_way_must_have_arrived_is_no_pause():
    """A token each 0.1 s; after the recovery a fresh node loads, which takes longer than the recovery did."""
    before = [0.1 * number for number in range(1, 11)]
    pause = pause_after(stream(0.0, *before, 1.3, 1.4, 2.0), fault_at=1.05)
    assert pause.resumed_seconds == pytest.approx(0.25)
    on_its_way = pause_after(stream(0.0, *before, 1.2, 1.6, 1.7), fault_at=1.05)
    assert on_its_way.resumed_seconds == pytest.approx(0.55), "a step that was under way came late"


def test_a_wait_that_was_long_before_the_fault_is_not_the_faults():
    """A slow step ends just after the fault, with a token that was on its way; the next one takes the recovery."""
    pause = pause_after(stream(0.0, 48.8, 49.4, 50.01, 50.5, 50.6), fault_at=50.0)
    assert pause.resumed_seconds == pytest.approx(0.5)
    assert pause.gap_seconds == pytest.approx(0.49)


def test_a_longer_wait_well_after_the_fault_is_not_the_faults():
    late = 2.0 + DRAIN_SECONDS + 0.5
    pause = pause_after(stream(0.0, 1.0, 2.0, 2.6, late, late + 9.0), fault_at=2.0)
    assert pause is not None
    assert pause.resumed_seconds == pytest.approx(late - 2.0)


def test_a_stream_that_waits_for_its_first_token_is_counted_from_its_request():
    pause = pause_after(stream(1.0, 4.0, 4.1), fault_at=2.0)
    assert pause is not None
    assert (pause.resumed_seconds, pause.gap_seconds, pause.tokens_before) == (2.0, 3.0, 0)


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(stream(0.0, 1.0, 2.0), id="over"),
        pytest.param(stream(3.0, 4.0), id="not yet sent"),
        pytest.param(stream(0.0), id="never answered"),
    ],
)
def test_a_stream_that_was_not_under_way_has_no_pause(record: Stream):
    assert pause_after(record, fault_at=2.0) is None


def test_tokens_before_the_pause_are_counted_by_token():
    pause = pause_after(stream(0.0, 1.0, 2.0, 9.0, counts=[2, 3, 1]), fault_at=2.5)
    assert pause is not None
    assert pause.tokens_before == 5


# ---- rounds


def test_spread_of_rounds():
    middle = spread([3.0, 1.0, 2.0])
    assert (middle.median, middle.lowest, middle.highest, middle.rounds) == (2.0, 1.0, 3.0, 3)


def test_ratios_take_only_rounds_that_both_have():
    assert ratios([2.0, None, 6.0, 8.0], [1.0, 5.0, None, 4.0]) == [2.0, 2.0]
    assert ratios([], []) == []


# ---- gaps around a move


def test_the_longest_gap_during_a_span_may_begin_before_it_and_end_after_it():
    streams = [stream(0.0, 1.0, 1.2, 2.0), stream(0.0, 1.5, 1.6)]
    assert longest_gap_during(streams, 1.5, 1.8) == pytest.approx(0.8)
    assert longest_gap_during(streams, 0.5, 1.1) == pytest.approx(0.2)
    assert longest_gap_during(streams, 3.0, 4.0) == 0.0


def test_the_longest_gap_within_a_span_leaves_out_what_began_before_it():
    streams = [stream(0.0, 1.0, 1.9, 2.0, 2.3)]
    assert longest_gap_within(streams, 1.5, 2.5) == pytest.approx(0.3)
    assert longest_gap_within(streams, 1.5, 2.2) == pytest.approx(0.1)
    assert longest_gap_within([], 0.0, 9.0) == 0.0
