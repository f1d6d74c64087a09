"""`kevlarflow node`, up to where it becomes the node."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from kevlarflow import config as configuration
from kevlarflow.cli import node
from kevlarflow.control import status
from kevlarflow.control.run_folder import RUN_ID_FILE
from kevlarflow.types import Member, NodeId, Stage
from kevlarflow.wire.messages import Answered
from standins import make_config


@pytest.mark.parametrize("elsewhere", ["tokenizer: owner/other", None])
def test_a_file_of_flags_is_looked_for_where_the_cluster_was_started(
    elsewhere: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here, run_folder = (tmp_path / name for name in ("there", "here", "run"))
    for folder in (there, here, run_folder):
        folder.mkdir()
    (there / "c.yaml").write_text("max-num-seqs: 8")
    if elsewhere is not None:
        (here / "c.yaml").write_text(elsewhere)
    config = make_config(run_folder, 8000)
    configuration.save(msgspec.structs.replace(config, vllm_args=("--config", "c.yaml"), directory=str(there)))
    (run_folder / RUN_ID_FILE).write_text("a run")
    became: list[dict[str, str]] = []
    monkeypatch.setattr(configuration, "run_folder_of", lambda _: run_folder)
    answer = Answered("", Member(NodeId("node-0-1"), 2), Stage(1))
    monkeypatch.setattr(status, "ask", lambda *_: answer)
    monkeypatch.setattr(os, "execve", lambda _, __, environment: became.append(environment))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(here)
    node.run(["--join", "node-0-1"])
    assert [environment.get("HF_HUB_OFFLINE") for environment in became] == ["1"]
    assert Path.cwd() == there
