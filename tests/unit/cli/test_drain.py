"""``kevlarflow drain``: how it ends, from status documents made by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kevlarflow.cli import drain
from kevlarflow.control import status
from kevlarflow.errors import RequestRefused


def watch(monkeypatch: pytest.MonkeyPatch, *documents: dict[str, Any]) -> None:
    answers = iter(documents)
    monkeypatch.setattr(status, "ask_status", lambda *_, **__: next(answers))
    monkeypatch.setattr(drain, "LOOK_SECONDS", 0.0)
    drain._watch(Path("x"), "node-0-1", 1, time.time())


def document(state: str, *recoveries: dict[str, Any], lanes: tuple[int, ...] = ()) -> dict[str, Any]:
    node = {"id": "node-0-1", "incarnation": 1, "state": state, "lanes": list(lanes)}
    return {"nodes": [node], "recoveries": list(recoveries)}


def record(cause: str, seconds_ago: float = 0.0, node: str = "node-0-1") -> dict[str, Any]:
    return {"from": node, "cause": cause, "time": time.time() - seconds_ago}


def test_a_node_that_has_given_its_lanes_away_has_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier, other = record("crash", 60.0), record("crash", node="node-1-1")
    watch(monkeypatch, document("draining", lanes=(0,)), document("dead", record("drain"), earlier, other))
    assert "node-0-1 has left after" in capsys.readouterr().out


def test_a_node_that_dies_meanwhile_has_not_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RequestRefused, match="node-0-1 was lost before it had given its lanes away"):
        watch(monkeypatch, document("draining", lanes=(0,)), document("dead", record("crash")))
    assert "has left" not in capsys.readouterr().out
