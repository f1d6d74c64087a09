"""Two replicators over real channels: what is copied, and what a standby refuses."""

import time
import zlib

import pytest
import zmq

from kevlarflow.config import ServeConfig
from kevlarflow.node.replicator import Replicator
from kevlarflow.recovery.coverage import Replica
from kevlarflow.types import Member, NodeInfo
from kevlarflow.wire import replicas

DEADLINE_SECONDS = 10.0


class Memory:
    """KV memory of 8-byte blocks."""

    block_bytes = 8

    def __init__(self):
        self.blocks = {}

    def read(self, block):
        return memoryview(self.blocks.get(block, bytes(8)))

    def write(self, block, data):
        self.blocks[block] = bytes(data)


class Node:
    def __init__(self, folder, name, limit=1_000):
        config = ServeConfig(
            model="m", served_model_name="m", host="", port=1, stages=1, pipelines=2, kv_cache_memory_bytes=1,
            reserve_lanes=1, standby_memory_bytes=limit, replication_interval_tokens=2, run_folder=str(folder),
        )  # fmt: skip
        self.memory = Memory()
        self.member = Member(name, 1)
        self.address = f"ipc://{folder}/{name}.kv"
        self.replicator = Replicator(config, self.member, 0, self.memory, self.address)
        self.replicator.start()
        self.info = NodeInfo(self.member, 0, "here", 1, (1,), "", "", 2, self.address)

    def write(self, lane, block, filled, content, generation=1):
        replica = Replica(block, generation, filled)
        lane.queue.begin([replica])
        self.memory.blocks[lane.first_block + block] = content
        if lane.queue.end([replica]):
            self.replicator.ring()
        return replica


def wait_for(condition):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def pair(tmp_path):
    return Node(tmp_path, "a"), Node(tmp_path, "b")


def test_a_full_block_reaches_the_standby_and_is_confirmed(pair):
    source, standby = pair
    lane = source.replicator.lane(0, first_block=100, block_size=4)
    source.replicator.assign(lane, standby.info)
    replica = source.write(lane, 3, 4, b"12345678")
    wait_for(lambda: source.replicator.outcomes)
    outcome = source.replicator.outcomes[0]
    assert (outcome.stored, outcome.standby) == (((3, 1, 4),), standby.member)
    assert bytes(standby.replicator.store.get(0, replica)) == b"12345678"


def test_what_was_written_before_there_was_a_standby_is_copied_too(pair):
    source, standby = pair
    lane = source.replicator.lane(0, 0, 4)
    for block in range(5):
        source.write(lane, block, 4, bytes([block]) * 8)
    source.replicator.assign(lane, standby.info)
    wait_for(lambda: len(source.replicator.outcomes) == 5)
    assert standby.replicator.store.used_bytes == 40


def test_a_standby_that_is_not_there_does_not_hold_anything_up(pair, tmp_path):
    source, _ = pair
    lane = source.replicator.lane(0, 0, 4)
    nobody = NodeInfo(Member("gone", 1), 0, "here", 1, (1,), "", "", 2, f"ipc://{tmp_path}/gone.kv")
    source.replicator.assign(lane, nobody)
    began = time.monotonic()
    for block in range(50):
        source.write(lane, block, 4, b"x" * 8)
    assert time.monotonic() - began < 1.0


def test_a_full_standby_says_what_it_dropped(tmp_path):
    source, standby = Node(tmp_path, "a"), Node(tmp_path, "b", limit=16)
    lane = source.replicator.lane(0, 0, 4)
    source.replicator.assign(lane, standby.info)
    for block in range(3):
        source.write(lane, block, 4, b"x" * 8)
    wait_for(lambda: len(source.replicator.outcomes) == 3)
    assert [each for outcome in source.replicator.outcomes for each in outcome.dropped] == [(0, 1, 4)]
    assert standby.replicator.store.used_bytes == 16


def send(standby, payload=b"12345678", **changes):
    """Send one copy by hand; returns the socket."""
    fields = {
        "pipeline": 0, "epoch": 5, "stage": 0, "block": 1, "generation": 1, "filled": 4, "depth": 0,
        "length": len(payload), "checksum": zlib.crc32(payload),
    } | changes  # fmt: skip
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(standby.address)
    peer.send_multipart([replicas.encode(replicas.Store(**fields)), payload])
    return peer


@pytest.mark.parametrize(
    "wrong", [{"stage": 1}, {"length": 7}, {"checksum": 1}, {"payload": b"123"}], ids=lambda wrong: next(iter(wrong))
)
def test_a_wrong_copy_is_refused_and_its_sender_not_heard_again(pair, wrong):
    _, standby = pair
    peer = send(standby, **wrong)
    wait_for(lambda: standby.replicator.rejected == 1)
    good = replicas.Store(0, 5, 0, 1, 1, 4, 0, 8, zlib.crc32(b"12345678"))
    peer.send_multipart([replicas.encode(good), b"12345678"])
    other = send(standby, block=2)
    assert other.poll(10_000)
    assert standby.replicator.store.get(0, Replica(1, 1, 4)) is None
    assert standby.replicator.store.get(0, Replica(2, 1, 4)) is not None


def test_a_copy_from_an_old_epoch_is_not_stored(pair):
    _, standby = pair
    newer = send(standby, epoch=7)
    assert newer.poll(10_000)
    older = send(standby, epoch=6, block=2)
    wait_for(lambda: standby.replicator.rejected == 1)
    assert not older.poll(0)
    assert standby.replicator.store.get(0, Replica(2, 1, 4)) is None


def test_a_frame_that_is_no_message_is_refused(pair):
    _, standby = pair
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(standby.address)
    peer.send_multipart([b"nonsense"])
    wait_for(lambda: standby.replicator.rejected == 1)
