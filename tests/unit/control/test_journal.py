"""What is written down, and what happens when it cannot be."""

from __future__ import annotations

import json
import os

import msgspec
import pytest

from kevlarflow.control.journal import Journal, Memory, Remembered
from kevlarflow.recovery.events import AnyEvent, KnownNode, NodeExited, Snapshot
from kevlarflow.types import Epoch, Member, NodeId, PipelineId

EVENT = NodeExited(Member(NodeId("node-0-1"), 2), 3.5)


def test_lines_are_events(tmp_path):
    journal = Journal(str(tmp_path / "journal.jsonl"))
    journal.start(1.0, resumed=False)
    journal.add(2.0, EVENT)
    first, second = (tmp_path / "journal.jsonl").read_bytes().splitlines()
    assert json.loads(first) == {"at": 1.0, "start": {"resumed": False}}
    assert msgspec.json.decode(msgspec.json.encode(json.loads(second)["event"]), type=AnyEvent) == EVENT


def test_its_size_is_bounded(tmp_path):
    journal = Journal(str(tmp_path / "journal.jsonl"), limit=1_000)
    for number in range(100):
        journal.add(float(number), EVENT)
    sizes = [(tmp_path / name).stat().st_size for name in ("journal.jsonl", "journal.1.jsonl")]
    assert max(sizes) <= 1_000
    assert sorted(os.listdir(tmp_path)) == ["journal.1.jsonl", "journal.jsonl"]
    assert journal.lost == 0


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    journal = Journal(str(tmp_path / "journal.jsonl"))
    journal.add(1.0, EVENT)
    journal.add(1.5, EVENT)
    assert journal.lost == 2
    (tmp_path / "journal.jsonl").unlink()
    journal.add(3.0, EVENT)
    assert journal.lost == 2
    assert len((tmp_path / "journal.jsonl").read_bytes().splitlines()) == 1


def test_memory_goes_from_one_life_to_the_next(tmp_path):
    path = str(tmp_path / "controller.json")
    assert Memory(path).recall() is None
    known = KnownNode(Member(NodeId("node-0-1"), 2), (7,), True, 0)
    remembered = Remembered(Snapshot((known,), {PipelineId(0): Epoch(4)}, True), {7: 123})
    Memory(path).keep(remembered)
    assert Memory(path).recall() == remembered


def test_a_memory_that_cannot_be_read_still_says_that_there_was_a_life(tmp_path):
    path = tmp_path / "controller.json"
    path.write_bytes(b'{"snapshot":')
    remembered = Memory(str(path)).recall()
    assert remembered is not None
    assert remembered.snapshot.nodes == ()


def test_a_memory_that_cannot_be_written_is_counted(tmp_path):
    memory = Memory(str(tmp_path / "no such folder" / "controller.json"))
    memory.keep(Remembered(Snapshot((), {}, False), {}))
    assert memory.lost == 1
