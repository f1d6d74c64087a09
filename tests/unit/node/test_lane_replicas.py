"""Replicas that are put in place while copies still come in: what was replaced meanwhile counts as not there."""

from __future__ import annotations

import pytest

from kevlarflow.config import ServeConfig
from kevlarflow.node.lane_replicas import LaneReplicas
from kevlarflow.node.lanes import Lanes
from kevlarflow.node.replicator import Replicator
from kevlarflow.recovery.coverage import Replica
from kevlarflow.replication.zmq_transfer import ZmqTransfer
from kevlarflow.types import Epoch, Member, NodeId, PipelineId, Stage
from unit.replication.parts import BOUNDS, Memory

P = PipelineId(0)
OLD, DEEPER = Replica(1, 1, 2, depth=0), Replica(2, 1, 4, depth=1)
PLACES = 2


class Runner:
    """The lane's, which has nothing to do here."""

    def reset(self):
        pass

    def use_blocks(self, table):
        pass


class SlowMemory(Memory):
    """Something happens before what is to be written has been read."""

    def __init__(self):
        super().__init__()
        self.meanwhile = lambda: None

    def write(self, copies):
        self.meanwhile()
        super().write(copies)


class Standby:
    """A node that keeps two copies of a lane, and opens the lane."""

    def __init__(self, folder):
        config = ServeConfig(
            model="m", served_model_name="m", host="", port=1, stages=1, pipelines=2, kv_cache_memory_bytes=1,
            standby_memory_bytes=PLACES * BOUNDS.block_bytes, run_folder=str(folder),
        )  # fmt: skip
        self.memory = SlowMemory()
        transfer = ZmqTransfer(f"ipc://{folder}/b.kv", BOUNDS.block_bytes, 2)
        # Its thread is not started: what it would do, the test does in a moment of its choice.
        replicator = Replicator(config, Member(NodeId("b"), 1), Stage(0), self.memory, BOUNDS, transfer)
        self.store = replicator.store
        self.replicas = LaneReplicas(replicator, self.memory)
        lanes = Lanes([Runner()], 9, is_first_stage=True)
        lane = lanes.open(P, Epoch(2))
        assert lane is not None
        lanes.share(lane, None)
        self.lane = lane
        self.store.put(P, OLD, memoryview(b"abcd"), 0)
        self.store.put(P, DEEPER, memoryview(b"12345678"))

    def place_ahead(self):
        return self.replicas.place_ahead(self.lane, [OLD, DEEPER])

    def content(self, block):
        return self.memory.blocks[self.lane.blocks.table[block]]


@pytest.fixture
def standby(tmp_path):
    return Standby(tmp_path)


def test_what_nobody_has_touched_is_in_place(standby):
    assert standby.place_ahead() == ([], [])
    assert standby.content(1)[:4] == b"abcd"
    assert standby.content(2) == b"12345678"


def test_a_copy_of_another_content_that_comes_meanwhile_leaves_neither_in_place(standby):
    newer = Replica(1, 7, 4, depth=0)
    standby.memory.meanwhile = lambda: standby.store.put(P, newer, memoryview(b"ABCDEFGH"))
    assert standby.place_ahead() == ([OLD], [])
    assert standby.content(1) == b"ABCDEFGH", "the place of the copy was given to another one"


def test_a_copy_that_has_to_make_room_meanwhile_is_not_in_place(standby):
    other = Replica(5, 3, 4, depth=0)
    standby.memory.meanwhile = lambda: standby.store.put(PipelineId(1), other, memoryview(b"ABCDEFGH"))
    assert standby.place_ahead() == ([DEEPER], [])
    assert standby.content(2) == b"ABCDEFGH", "the place of the copy was given to another lane"


def test_tokens_that_come_meanwhile_for_the_same_content_spoil_nothing(standby):
    more = Replica(1, 1, 3, depth=0)
    standby.memory.meanwhile = lambda: standby.store.put(P, more, memoryview(b"ef"), 2)
    assert standby.place_ahead() == ([], [])
    assert standby.content(1)[:4] == b"abcd"


def test_tokens_that_came_before_are_told(standby):
    more = Replica(1, 1, 3, depth=0)
    standby.store.put(P, more, memoryview(b"ef"), 2)
    assert standby.place_ahead() == ([], [more])
    assert standby.content(1)[:6] == b"abcdef"


def test_a_lane_that_is_opened_anew_is_not_said_to_be_flushed_for_what_was_asked_before(standby):
    standby.replicas.flush(standby.lane, now=1.0)
    assert standby.lane.replication.flushing
    standby.replicas.open(standby.lane)
    assert not standby.lane.replication.flushing
