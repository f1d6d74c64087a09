import math

import pytest

from kevlarflow.bench.evaluation import outcome
from kevlarflow.bench.evaluation.cells import Cell
from kevlarflow.bench.evaluation.outcome import CellResult, RequestRecord, StrikeRecord
from kevlarflow.bench.streams import Stream

CELL = Cell("a10-2x4-1g", "kevlarflow", "near", "one-middle")


def request(name, sent, first, last, tokens=10, asked=10, digest=0, defect=None):
    return RequestRecord(name, sent, asked, tokens, first, last, 0, digest, defect)


def stream(*times, sent=0.0, pipeline=0):
    return Stream("s", sent, pipeline, list(times), [1] * len(times), ["x"] * len(times))


def test_a_window_counts_who_was_under_way_or_came_in_it():
    records = [
        request("over", 0.0, 1.0, 2.0),
        request("under way", 3.0, 4.0, 12.0),
        request("came", 11.0, 14.0, 15.0),
        request("too late", 30.0, 31.0, 32.0),
        request("lost", 12.0, 13.0, 13.5, tokens=4, defect="gone"),
    ]
    seen = outcome.window(records, 10.0, 20.0)
    assert (seen.requests, seen.lost, seen.lost_tokens) == (3, 1, 6)
    assert seen.latency_mean == pytest.approx((9.0 + 4.0) / 2)
    # The first token of the one under way came before the window.
    assert seen.ttft_mean == pytest.approx((3.0 + 1.0) / 2)


def test_a_lost_request_is_under_way_until_its_stream_ends():
    lost = RequestRecord("lost", 5.0, 10, 4, 6.0, 9.9, 0, 0, "HTTP 500", ended=12.0)
    assert outcome.window([lost], 10.0).lost == 1
    assert outcome.window([lost], 13.0).lost == 0


def test_a_request_that_never_had_a_token_is_lost():
    seen = outcome.window([request("refused", 1.0, None, None, tokens=0, defect="HTTP 503")], 0.0)
    assert (seen.lost, seen.lost_tokens) == (1, 10)
    assert math.isnan(seen.latency_mean)


def test_wrong_is_whole_and_different():
    ours = CellResult(CELL, "", requests=[request("a", 0, 1, 2, digest=1), request("b", 0, 1, 2, digest=5)])
    theirs = CellResult(CELL, "", requests=[request("a", 0, 1, 2, digest=1), request("b", 0, 1, 2, digest=2)])
    assert outcome.wrong(ours, theirs) == ["b"]


def test_a_lost_request_is_not_wrong_as_well():
    ours = CellResult(CELL, "", requests=[request("a", 0, 1, 2, digest=9, defect="gone")])
    theirs = CellResult(CELL, "", requests=[request("a", 0, 1, 2, digest=1)])
    assert outcome.wrong(ours, theirs) == []


def test_the_first_token_after_a_fault_ends_a_pause():
    stalled = stream(9.0, 9.9, 10.05, 13.0, 13.1)  # 10.05 was on its way.
    assert outcome.first_token_after([stalled], 0, 10.0) == pytest.approx(3.0)


def test_a_token_that_was_on_its_way_is_not_the_first_after_a_fault():
    broken_off = stream(9.0, 9.9, 10.002)
    assert outcome.first_token_after([broken_off], 0, 10.0) is None
    assert outcome.first_token_after([broken_off, stream(9.0, 9.9, 12.0)], 0, 10.0) == pytest.approx(2.0)


def test_a_first_token_that_was_on_its_way_does_not_end_an_outage():
    """It had been waited for longer than the outage lasts."""
    queued = stream(50.01, 50.6, 50.75, 51.2, sent=48.0)
    assert outcome.first_token_after([queued], 0, 50.0) == pytest.approx(0.6)


def test_the_first_token_after_a_fault_may_be_of_a_later_request():
    assert outcome.first_token_after([stream(15.0, sent=11.0), stream(9.0)], 0, 10.0) == pytest.approx(5.0)
    assert outcome.first_token_after([stream(15.0, sent=11.0)], 1, 10.0) is None


def test_tokens_are_counted_by_the_second():
    assert outcome.arrivals([stream(100.1, 100.9, 102.5)], 100.0) == [2, 0, 1]


def goodput(*bins):
    return CellResult(
        CELL,
        "",
        load_seconds=len(bins),
        tokens_per_second=list(bins),
        good_tokens_per_second=list(bins),
        strikes=[StrikeRecord(20.0, 0, 0, "node")],
    )


def test_goodput_is_back_when_it_stays():
    seconds = outcome.goodput_back_seconds(goodput(*[100] * 20, *[0] * 10, *[100] * 20))
    assert 9.0 <= seconds <= 11.0


def test_goodput_that_never_fell_is_back_at_once():
    assert outcome.goodput_back_seconds(goodput(*[100] * 40)) == 0.0


def test_a_moment_of_goodput_is_not_its_return():
    """What a survivor still had is delivered, and then nothing for a while."""
    seconds = outcome.goodput_back_seconds(goodput(*[100] * 20, *[90] * 8, *[0] * 30, *[100] * 92))
    assert 25.0 <= seconds <= 40.0
    assert outcome.goodput_back_seconds(goodput(*[100] * 20, *[90] * 8, *[0] * 30)) is None


def test_where_nothing_was_delivered_nothing_can_come_back():
    assert outcome.goodput_back_seconds(goodput(*[0] * 40)) is None


def test_goodput_has_to_reach_all_that_was_delivered_before():
    lost_later = goodput(*[60] * 60)
    lost_later.tokens_per_second = [100] * 20 + [60] * 40
    assert outcome.goodput_back_seconds(lost_later) is None


def test_goodput_that_stays_low_is_not_back():
    assert outcome.goodput_back_seconds(goodput(*[100] * 20, *[50] * 20)) is None
