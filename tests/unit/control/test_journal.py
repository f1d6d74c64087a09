"""What is written down, and what happens when it cannot be."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from kevlarflow.control.journal import CALM_SECONDS, FIRST_LOOK_SECONDS, Journal, Memory, Records, Remembered
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


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: like a full disk, it may take a part of a line."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_lines_and_nothing_else_and_the_journal_says_how_many(tmp_path):
    journal = Journal(str(tmp_path / "journal.jsonl"))
    journal.add(0.0, EVENT)
    with room(0):
        journal.add(1.0, EVENT)
        journal.add(1.5, EVENT)
    assert journal.lost == 2
    assert journal.problem == os.strerror(errno.EFBIG)
    journal.add(3.0, EVENT)
    assert (journal.lost, journal.problem) == (2, "")
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_bytes().splitlines()]
    assert lines[1] == {"at": 3.0, "lost": 2}
    assert [line["at"] for line in lines if "event" in line] == [0.0, 3.0]


def test_half_a_line_is_taken_back(tmp_path):
    journal = Journal(str(tmp_path / "journal.jsonl"))
    journal.add(1.0, EVENT)
    whole = (tmp_path / "journal.jsonl").read_bytes()
    with room(len(whole) + 10):
        journal.add(2.0, EVENT)
        assert (tmp_path / "journal.jsonl").read_bytes() == whole
    assert (journal.lost, journal.problem) == (1, os.strerror(errno.ENOSPC))


def test_what_is_missing_is_written_down_without_waiting_for_the_next_event(tmp_path):
    journal = Journal(str(tmp_path / "journal.jsonl"))
    with room(0):
        journal.add(1.0, EVENT)
        journal.retry(3.0)
    assert journal.lost == 1
    journal.retry(3.5)
    assert journal.problem, "it was to wait a little"
    journal.retry(5.0)
    journal.retry(6.0)
    assert (tmp_path / "journal.jsonl").read_bytes() == b'{"at":5.0,"lost":1}\n'


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


def remembered_at(epoch: int) -> Remembered:
    return Remembered(Snapshot((), {PipelineId(0): Epoch(epoch)}, served=True), {})


def test_a_memory_that_cannot_be_written_is_not_left_out_of_date(tmp_path):
    path = tmp_path / "controller.json"
    memory = Memory(str(path))
    memory.keep(remembered_at(4))
    with room(0):
        memory.keep(remembered_at(5))
        memory.keep(remembered_at(4))
    assert (memory.lost, memory.problem) == (1, os.strerror(errno.EFBIG))
    forgotten = Memory(str(path)).recall()
    assert forgotten is not None, "that there was a life is still known"
    assert not forgotten.snapshot.epochs
    memory.retry()
    assert memory.problem == ""
    assert Memory(str(path)).recall() == remembered_at(4)
    assert os.listdir(tmp_path) == ["controller.json"]


def test_a_memory_without_a_folder_is_counted(tmp_path):
    memory = Memory(str(tmp_path / "no such folder" / "controller.json"))
    memory.keep(remembered_at(4))
    assert memory.lost == 1


def test_a_person_is_told_once_that_nothing_can_be_written_and_once_that_it_can(tmp_path):
    records = Records(str(tmp_path))
    now, told = 0.0, []

    def seconds(count: int) -> None:
        nonlocal now
        for _ in range(20 * count):
            now += 0.05
            told.append(records.see_to(now))

    seconds(round(FIRST_LOOK_SECONDS))
    with room(0):
        records.journal.add(now, EVENT)
        records.memory.keep(remembered_at(4))
        seconds(5)
    # A moment in which there is room is no good news yet.
    seconds(3)
    with room(0):
        records.journal.add(now, EVENT)
        seconds(1)
    assert records.problem
    seconds(round(CALM_SECONDS) + 3)
    assert records.problem == ""
    assert [line for line in told if line] == [
        f"{tmp_path} cannot be written (File too large): serving goes on, logs and journal do not; make room there",
        f"{tmp_path} can be written again; lines that the journal lacks: 2",
    ]
