import pytest

from kevlarflow.cli import bench_suite
from kevlarflow.errors import UsageError


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], r"name a suite \(quick, full\) or a --cell"),
        (["slow"], "there is no suite 'slow': use quick or full"),
        (["quick", "--cells", "*.nothing.*"], "no cell matches"),
        (["--cell", "a10-2x4-1g.stock"], "is no cell: write SETTING.SYSTEM.RATE.FAULT.SEED"),
        (["--cell", "a10-2x4-1g.dynamo.near.none.0"], "'dynamo' is none of stock, stock-dp, replay, kevlarflow"),
        (["quick", "--rate", "0"], "a rate of 0 requests/s sends nothing"),
        (["quick", "--rate", "inf"], "a rate of inf requests/s never ends"),
        (["quick", "--trace", "/nowhere.csv"], "the trace /nowhere.csv cannot be read"),
        (["quick", "--arrivals", "monthly"], "there are no 'monthly' arrivals: use poisson or trace"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(words, complaint, tmp_path):
    with pytest.raises(UsageError, match=complaint):
        bench_suite.run(["run", *words, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_suite_is_listed_with_reasons(capsys):
    assert bench_suite.run(["run", "quick", "--list"]) == 0
    assert "real-2x2.stock.light.one-last.0" in capsys.readouterr().out
