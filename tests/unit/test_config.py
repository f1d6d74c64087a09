"""Timeouts that contradict one another are refused, with the relation that is violated."""

from __future__ import annotations

import tempfile

import msgspec
import pytest

from kevlarflow.config import WITHHELD, Timeouts, check, check_timeouts, run_folder_of, without_secrets
from kevlarflow.errors import UsageError
from toy_world import make_config


def test_the_defaults_agree():
    check_timeouts(Timeouts())


@pytest.mark.parametrize(
    ("timeouts", "relation"),
    [
        (Timeouts(heartbeat_interval_ms=500), "2 x heartbeat_interval_ms < suspect_after_ms"),
        (Timeouts(suspect_after_ms=3_000), "suspect_after_ms < confirm_after_ms"),
        (Timeouts(stopped_after_ms=20), "4 x watch_interval_ms < stopped_after_ms"),
        (Timeouts(step_floor_ms=200), "2 x heartbeat_interval_ms < step_floor_ms"),
        (Timeouts(deaf_after_ms=3_000), "confirm_after_ms < deaf_after_ms"),
        (Timeouts(settle_ms=3_000), "confirm_after_ms < settle_ms"),
        (Timeouts(report_interval_ms=500), "4 x report_interval_ms < engine_silent_after_ms"),
        (Timeouts(still_after_ms=800), "4 x report_interval_ms < still_after_ms"),
        (
            Timeouts(heartbeat_interval_ms=150, step_floor_ms=500, still_after_ms=600, report_interval_ms=100),
            "4 x heartbeat_interval_ms < still_after_ms",
        ),
        (Timeouts(step_floor_ms=1_000), "step_floor_ms < still_after_ms"),
        (Timeouts(engine_silent_after_ms=10_000), "engine_silent_after_ms < engine_lost_after_ms"),
        (Timeouts(settle_ms=10_000), "settle_ms < engine_lost_after_ms"),
        (Timeouts(controller_lost_after_ms=4_000), "settle_ms < controller_lost_after_ms"),
        (Timeouts(pace_interval_ms=100), "heartbeat_interval_ms < pace_interval_ms"),
        (Timeouts(slow_after_ms=5_000), "5 x pace_interval_ms < slow_after_ms"),
        (Timeouts(slow_after_ms=3_000, pace_interval_ms=500), "confirm_after_ms < slow_after_ms"),
        (Timeouts(move_patience_ms=400), "2 x report_interval_ms < move_patience_ms"),
        (Timeouts(startup_timeout_s=8), "move_patience_ms < startup_timeout_s"),
        (Timeouts(heartbeat_interval_ms=0), "2 x heartbeat_interval_ms < suspect_after_ms"),
    ],
)
def test_a_contradiction_is_named(timeouts, relation):
    with pytest.raises(UsageError, match=relation):
        check_timeouts(timeouts)


@pytest.mark.parametrize("ratio", [0, 2.5, 3.0])
def test_a_ratio_that_can_only_come_from_a_slow_node_is_taken(ratio):
    check(msgspec.structs.replace(make_config(), slow_ratio=ratio))


@pytest.mark.parametrize("ratio", [2.0, 0.5, -1.0, float("nan")])
def test_a_ratio_that_work_alone_could_explain_is_refused(ratio):
    with pytest.raises(UsageError, match=r"--slow-node-ratio .* use more than that, or 0"):
        check(msgspec.structs.replace(make_config(), slow_ratio=ratio))


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        ("--seed 0 --api-key sk-1 --dtype float32", "--seed 0 --api-key * --dtype float32"),
        ("--api-key sk-1 sk-2 -5 --hf-token hf_x", "--api-key * * * --hf-token *"),
        ("--api-key=sk-1 --hf_token=hf_x --seed=0", "--api-key=* --hf_token=* --seed=0"),
        ("--api_key sk-1 -cc.mode=0 -O3", "--api_key * -cc.mode=0 -O3"),
        ("--api-k sk-1", "--api-k *"),
        ("--hf-token --enforce-eager --watermark-config.key 7", "--hf-token --enforce-eager --watermark-config.key *"),
    ],
)
def test_what_nobody_else_should_know_is_withheld_and_the_rest_is_told(typed, left):
    config = msgspec.structs.replace(make_config(), vllm_args=tuple(typed.split()))
    assert without_secrets(config).vllm_args == tuple(left.replace("*", WITHHELD).split())
    assert config.vllm_args == tuple(typed.split())


def test_a_value_with_spaces_is_a_value_whatever_it_begins_with():
    config = msgspec.structs.replace(make_config(), vllm_args=("--api-key", "-my key"))
    assert without_secrets(config).vllm_args == ("--api-key", WITHHELD)


@pytest.fixture
def _unset(monkeypatch, tmp_path):
    """Nobody has said where temporary files belong, and Python has not looked yet; it has for `tmp_path`."""
    for name in ("XDG_RUNTIME_DIR", "TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)


def only(*folders):
    """A candidate of `tempfile` counts when it is one of these."""

    def choose():
        for folder in tempfile._candidate_tempdir_list():
            if folder in folders:
                return folder
        raise FileNotFoundError(2, "No usable temporary directory found")

    return choose


@pytest.mark.usefixtures("_unset")
@pytest.mark.parametrize("writable", [(), ("the working folder",)])
def test_without_a_folder_that_every_command_finds_there_is_no_cluster(tmp_path, monkeypatch, writable):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", only(*(str(tmp_path) for _ in writable)))
    with pytest.raises(UsageError, match=r"^neither /tmp nor /var/tmp can be written: set XDG_RUNTIME_DIR"):
        run_folder_of(8000)


@pytest.mark.usefixtures("_unset")
@pytest.mark.parametrize("working_folder", ["/", "/var/tmp"])
def test_a_temporary_folder_may_be_the_working_folder_as_well(monkeypatch, working_folder):
    monkeypatch.chdir(working_folder)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", only("/var/tmp"))
    assert str(run_folder_of(8000).parent.parent) == "/var/tmp"


@pytest.mark.usefixtures("_unset")
def test_a_temporary_folder_that_somebody_named_is_taken_wherever_it_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert run_folder_of(8000).parent.parent == tmp_path
