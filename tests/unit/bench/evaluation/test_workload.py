import statistics

import pytest

from kevlarflow.bench.evaluation.workload import SAMPLE, TRACE, Workload, plan, read_trace, request_of
from kevlarflow.errors import UsageError


def test_the_sample_is_azures():
    rows = read_trace(SAMPLE)
    assert len(rows) == 1000
    assert 900 < statistics.fmean(row.context_tokens for row in rows) < 1400
    assert "CC-BY" in SAMPLE.read_text()


def test_poisson_arrivals_have_the_rate():
    load = plan(Workload(requests_per_second=20.0, seconds=100.0))
    assert len(load) == pytest.approx(2000, rel=0.1)
    assert all(0 <= each.start_seconds < 100 for each in load)


def test_the_traces_arrivals_are_stretched_to_the_rate():
    load = plan(Workload(requests_per_second=2.0, seconds=100.0, arrivals=TRACE))
    assert len(load) == pytest.approx(200, rel=0.25)
    assert load[0].start_seconds == 0.0


def test_the_same_workload_is_the_same_load():
    workload = Workload(requests_per_second=5.0, seconds=20.0, seed=3)
    assert plan(workload) == plan(workload) != plan(Workload(requests_per_second=5.0, seconds=20.0, seed=4))


def test_lengths_are_scaled_and_bounded():
    load = plan(Workload(requests_per_second=50.0, seconds=20.0, longest_prompt=200, longest_output=40))
    assert max(each.prompt_tokens for each in load) == 200
    assert max(each.output_tokens for each in load) == 40
    assert min(each.output_tokens for each in load) >= 4


def test_a_request_asks_for_its_tokens():
    planned = plan(Workload(requests_per_second=5.0, seconds=20.0))[0]
    body = request_of(planned, "0", 1).body
    assert body["max_tokens"] == planned.output_tokens
    assert body["temperature"] == 0
    assert request_of(planned, "0", 1).body == body != request_of(planned, "1", 1).body


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_sends_nothing_is_refused(rate):
    with pytest.raises(UsageError, match="sends nothing: use more than 0"):
        plan(Workload(requests_per_second=rate, seconds=1.0))


def test_a_trace_that_is_missing_or_something_else_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.csv cannot be read .*: name another with --trace"):
        read_trace(tmp_path / "gone.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="needs the columns seconds, context_tokens, generated_tokens"):
        read_trace(tmp_path / "other.csv")
    (tmp_path / "empty.csv").write_text("seconds,context_tokens,generated_tokens\n")
    with pytest.raises(UsageError, match="holds no request"):
        read_trace(tmp_path / "empty.csv")


def test_a_trace_that_is_over_before_the_load_is_refused():
    """The failure window would be empty, and nothing lost in it."""
    with pytest.raises(UsageError, match=r"is over after \d+ of 200 s at 10 requests/s: use a lower rate"):
        plan(Workload(requests_per_second=10.0, seconds=200.0, arrivals=TRACE))


def test_a_load_without_any_request_is_refused():
    with pytest.raises(UsageError, match=r"no request comes within 1 s: use a higher rate"):
        plan(Workload(requests_per_second=1e-6, seconds=1.0))
