"""``kevlarflow bench`` and ``kevlarflow demo`` where they cannot succeed: what they say, and their exit status."""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import pytest

from kevlarflow.bench.machine import describe
from kevlarflow.bench.recipes import Recipe
from kevlarflow.bench.results import Report
from kevlarflow.cli import bench
from kevlarflow.cli.main import main


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "speed"]) == 2
    assert "there is no experiment 'speed': use throughput, startup, failover" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--streams", "0"], ["--streams", "1,x"], ["--kills", "-1"], ["--kv-cache-memory-bytes", "much"]]
)
def test_a_senseless_number_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as refusal:
        main(["bench", *words])
    assert refusal.value.code == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert words[0] in complaint
    assert " is no number " in complaint


@pytest.mark.parametrize("command", [["bench", "transfer"], ["bench", "run", "quick"], ["soak"]])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    command: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main([*command, "--output", "/proc/nowhere"]) == 2
    assert capsys.readouterr().err == (
        "kevlarflow: --output /proc/nowhere cannot be written (No such file or directory): name another folder\n"
    )


def test_sizes_may_have_a_unit():
    options = bench._parse(["--kv-cache-memory-bytes", "2G", "--streams", "2,8"])
    assert (options.kv_cache_memory_bytes, options.streams) == (2 * 2**30, (2, 8))
    assert bench._parse(["--kv-cache-memory-bytes", "1.5g"]).kv_cache_memory_bytes == 1_500_000_000
    assert options.experiments == list(bench.EXPERIMENTS)


def test_replication_stands_for_its_four_experiments():
    assert set(bench._parse(["replication"]).experiments) >= set(bench.REPLICATION)


@pytest.mark.parametrize("content", [None, "{}", "no JSON"])
def test_a_report_that_is_none_cannot_be_resumed(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    assert main(["bench", "transfer", "--resume", str(path)]) == 2
    assert "is no report of kevlarflow bench" in capsys.readouterr().err


def test_a_report_of_another_machine_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    there = msgspec.structs.replace(describe(), processor="another one")
    path = tmp_path / "report.json"
    path.write_bytes(msgspec.json.encode(Report("kevlarflow bench", "2026-11-23T15:00:00+00:00", there, Recipe())))
    assert main(["bench", "transfer", "--resume", str(path), "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{path} was measured with processor 'another one', and this machine has" in said
    assert "begin a new report" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "/no/such/model"], "there is no model /no/such/model"),
        (["--dtype", "float23"], "invalid choice: 'float23'"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused_before_a_system_starts(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as refusal:
        raise SystemExit(main(["bench", "failover", *words, "--output", str(tmp_path)]))
    assert refusal.value.code in (1, 2)
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_system_that_cannot_start_is_said_so_and_fails_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["bench", "failover", "--kv-cache-memory-bytes", "9000G", "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "failover: KevlarFlow ended with exit status 2: 4 nodes need " in shown
    assert "logs of the systems are kept in" in shown
    assert "no further kills" in next(tmp_path.glob("*.md")).read_text()
