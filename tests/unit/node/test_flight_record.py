"""What a node was computing when it was killed stands in its record; the nodes here are real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kevlarflow.types import Computing, Member, NodeId
from kevlarflow.wire import flight_record
from kevlarflow.wire.flight_record import FlightRecorder

MEMBER = Member(NodeId("node-0-1"), 3)
NODE = """
import pathlib, resource, sys, time
from kevlarflow.types import Member, NodeId
from kevlarflow.wire.flight_record import FlightRecorder

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
recorder = FlightRecorder(pathlib.Path(sys.argv[1]), Member(NodeId("node-0-1"), 3))
with recorder.computing(0, 7, 1_760_000_000_000_001):
    pass
def stay():
    print("there", flush=True)
    time.sleep(60)
"""
STEP = "with recorder.computing(1, 8, 1_760_000_000_000_002):\n    stay()"
CHUNK = "with recorder.computing(0, 9, -4):\n    stay()"


WHOLE = flight_record.FORMAT.size


def killed(folder, moment, room=WHOLE):
    """A node that is killed at the moment at which it says that it is there. Its files may take `room` bytes."""
    command = [sys.executable, "-c", f"{NODE}{moment}", str(folder), str(room)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        os.kill(process.pid, signal.SIGKILL)
    return flight_record.read(folder, MEMBER)


@pytest.mark.parametrize(
    ("moment", "computing"),
    [(STEP, Computing(1, 8, 1_760_000_000_000_002)), (CHUNK, Computing(0, 9, -4)), ("stay()", Computing())],
)
def test_the_record_of_a_killed_node_says_what_it_was_computing(tmp_path, moment, computing):
    assert killed(tmp_path, moment) == computing


def test_work_that_raises_is_over(tmp_path):
    recorder = FlightRecorder(tmp_path, MEMBER)
    with pytest.raises(ValueError, match="a step"), recorder.computing(0, 1, 5):
        raise ValueError("a step")
    assert flight_record.read(tmp_path, MEMBER) == Computing()


def test_of_a_node_without_a_whole_record_nothing_is_known(tmp_path):
    assert flight_record.read(tmp_path, MEMBER) is None
    flight_record.path_of(tmp_path, MEMBER).write_bytes(b"torn")
    assert flight_record.read(tmp_path, MEMBER) is None


def test_the_record_of_another_life_is_not_taken_for_it(tmp_path):
    with FlightRecorder(tmp_path, MEMBER).computing(0, 1, 5):
        assert flight_record.read(tmp_path, Member(MEMBER.node, 2)) is None
        assert flight_record.read(tmp_path, MEMBER) == Computing(0, 1, 5)


@pytest.mark.parametrize("room", [0, WHOLE - 1])
def test_where_the_disk_has_no_room_for_a_record_the_node_computes_without(tmp_path, room):
    assert killed(tmp_path, STEP, room) is None
