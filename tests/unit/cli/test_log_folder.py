from __future__ import annotations

from pathlib import Path

import pytest

from kevlarflow.cli import chaos
from kevlarflow.cli.log_folder import log_folder


def test_logs_go_when_all_is_well() -> None:
    said: list[str] = []
    with log_folder("test", said.append) as logs:
        assert logs.folder.is_dir()
    assert not logs.folder.exists()
    assert said == []


def test_logs_go_with_ctrl_c() -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), log_folder("test", said.append) as logs:
        raise KeyboardInterrupt
    assert not logs.folder.exists()
    assert said == []


def test_logs_stay_after_an_error_or_when_they_are_wanted() -> None:
    said: list[str] = []
    with pytest.raises(ZeroDivisionError), log_folder("test", said.append) as failed:
        raise ZeroDivisionError
    with log_folder("test", said.append) as wanted:
        wanted.are_kept = True
    assert said == [f"the cluster's log is kept in {each.folder}" for each in (failed, wanted)]
    failed.folder.rmdir()
    wanted.folder.rmdir()


@pytest.mark.parametrize(("lost", "status"), [(0, 0), (1, 1)])
def test_chaos_names_the_log_of_a_run_that_fails(
    lost: int, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kevlarflow import default_model
    from kevlarflow.bench.chaos import judge, stage
    from kevlarflow.bench.chaos.judge import Verdict

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(default_model, "ensure_default_model", lambda: tmp_path)
    monkeypatch.setattr(stage, "on_own_cluster", lambda *_: None)
    monkeypatch.setattr(judge, "judge", lambda *_: [Verdict("lost requests", "0", str(lost), not lost)])
    monkeypatch.setattr(chaos, "_account", lambda *_, **__: {})
    assert chaos.run(["crash", "--plain"]) == status
    assert ("the cluster's log is kept in" in capsys.readouterr().out) == bool(lost)
    assert len(list(tmp_path.glob("kevlarflow-chaos-*"))) == lost
