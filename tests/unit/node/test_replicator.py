"""Two nodes' replication threads over real channels."""

import os
import select
import statistics
import time

import pytest
import zmq

from kevlarflow.config import ServeConfig
from kevlarflow.node.lane_replicas import LaneReplicas
from kevlarflow.node.lanes import Lanes
from kevlarflow.node.replicator import Replicator
from kevlarflow.node.thread_clock import ThreadClock
from kevlarflow.recovery.coverage import Replica
from kevlarflow.recovery.use import NO_CHANGE
from kevlarflow.replication.zmq_transfer import ZmqTransfer
from kevlarflow.types import Member
from kevlarflow.wire import steps
from unit.replication.parts import BOUNDS, Memory, asleep, content, header, standby_info

DEADLINE_SECONDS = 60.0


class Node:
    def __init__(self, folder, name, limit=1_000):
        config = ServeConfig(
            model="m", served_model_name="m", host="", port=1, stages=1, pipelines=2, kv_cache_memory_bytes=1,
            standby_memory_bytes=limit, replication_interval_tokens=2, run_folder=str(folder),
        )  # fmt: skip
        self.memory = Memory()
        self.member = Member(name, 1)
        self.address = f"ipc://{folder}/{name}.kv"
        transfer = ZmqTransfer(self.address, BOUNDS.block_bytes, 2)
        self.replicator = Replicator(config, self.member, 0, self.memory, BOUNDS, transfer)
        self.replicator.start()
        self.info = standby_info(self.address, name)

    def write(self, lane, block, filled, content, generation=1):
        replica = Replica(block, generation, filled)
        lane.queue.begin([replica], NO_CHANGE)
        self.memory.blocks[lane.table[block]] = content
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
    lane = source.replicator.lane(0, range(100, 150))
    source.replicator.assign(lane, standby.info)
    replica = source.write(lane, 3, 4, b"12345678")
    wait_for(lambda: source.replicator.outcomes)
    outcome = source.replicator.outcomes[0]
    assert (outcome.stored, outcome.standby) == (((3, 1, 4),), standby.member)
    assert (content(standby.replicator.store, 0, replica)) == b"12345678"


def test_an_answer_that_is_taken_before_it_is_told_of_wakes_the_main_thread_once(pair):
    replicator = pair[0].replicator
    replicator.outcomes.append(steps.Flushed(0, 1, 0))
    assert list(replicator.take_outcomes())
    os.eventfd_write(replicator.answered, 1)
    assert select.select([replicator.answered], [], [], 0)[0]
    assert not list(replicator.take_outcomes())
    assert not select.select([replicator.answered], [], [], 0)[0]


def test_the_memory_that_a_replica_would_be_put_into_is_backed_once(pair):
    source, standby = pair
    lane = source.replicator.lane(0, range(1_000))
    source.replicator.assign(lane, standby.info)
    for filled in (2, 4):
        source.write(lane, 3, filled, b"12345678")
        wait_for(lambda expected=filled // 2: len(source.replicator.outcomes) == expected)
    assert standby.memory.backed == [BOUNDS.blocks - 1]


class Runner:
    """A lane's, which has nothing to do here."""

    def reset(self):
        pass

    def use_blocks(self, table):
        pass


def test_what_a_lane_has_copies_of_comes_to_lie_in_memory_that_is_backed(pair):
    """Its share has many more blocks, most of which come before them."""
    source, standby = pair
    lane = source.replicator.lane(1, range(1_000))
    source.replicator.assign(lane, standby.info)
    copied = range(60, 75)
    for block in copied:
        source.write(lane, block, 4, bytes([block]) * 8)
    wait_for(lambda: len(source.replicator.outcomes) == len(copied))
    lanes, replicas = Lanes([Runner(), Runner()], BOUNDS.blocks, True), LaneReplicas(standby.replicator, standby.memory)
    own, guest = lanes.open(0, 1), lanes.open(1, 1)
    lanes.share(own, None)
    lanes.share(own, frozenset(range(1, 50)))
    lanes.share(guest, frozenset({*range(1, 30), *copied}), first=replicas.kept(guest))
    assert sorted(guest.blocks.table[block] for block in copied) == sorted(standby.memory.backed)


def test_many_blocks_are_all_copied(pair):
    source, standby = pair
    lane = source.replicator.lane(0, range(1_000))
    for block in range(50):
        source.write(lane, block, 4, bytes([block]) * 8)
    source.replicator.assign(lane, standby.info)
    wait_for(lambda: len(source.replicator.outcomes) == 50)
    for block in range(50):
        assert (content(standby.replicator.store, 0, Replica(block, 1, 4))) == bytes([block]) * 8


def test_a_standby_that_is_not_there_does_not_hold_anything_up(pair, tmp_path):
    source, _ = pair
    lane = source.replicator.lane(0, range(1_000))
    source.replicator.assign(lane, standby_info(f"ipc://{tmp_path}/gone.kv", "gone"))
    require_that_nothing_is_held_up(source, lane)


def test_a_standby_that_reads_nothing_does_not_hold_anything_up(pair, tmp_path):
    source, _ = pair
    deaf = zmq.Context.instance().socket(zmq.ROUTER)
    deaf.setsockopt(zmq.RCVHWM, 1)
    deaf.bind(f"ipc://{tmp_path}/deaf.kv")
    lane = source.replicator.lane(0, range(1_000))
    source.replicator.assign(lane, standby_info(f"ipc://{tmp_path}/deaf.kv", "deaf"))
    require_that_nothing_is_held_up(source, lane)
    assert not source.replicator.outcomes
    deaf.close(linger=0)


def require_that_nothing_is_held_up(node, lane):
    """Noting a block holds the thread which computes up for no longer than the interpreter's lock may take."""
    clock, seconds = ThreadClock(), []
    for block in range(90):
        began = asleep(clock)
        node.write(lane, block, 4, b"x" * 8)
        seconds.append(asleep(clock) - began)
    assert statistics.median(seconds) < 0.02
    assert max(seconds) < 1.0


def test_a_peer_that_sends_nonsense_over_the_wire_is_refused_and_others_are_served(pair):
    source, standby = pair
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(standby.address)
    peer.send_multipart([b"nonsense"])
    wait_for(lambda: standby.replicator._standby.refused == 1)
    peer.send_multipart([header(block=9), b"12345678"])
    lane = source.replicator.lane(0, range(1_000))
    source.replicator.assign(lane, standby.info)
    source.write(lane, 3, 4, b"12345678")
    wait_for(lambda: source.replicator.outcomes)
    assert content(standby.replicator.store, 0, Replica(9, 1, 4)) is None
    peer.close()


def test_a_turn_that_fails_does_not_end_replication(pair):
    source, standby = pair
    lane = source.replicator.lane(0, range(1_000))
    read, failures = source.memory.read, []

    def fail_once(block, into):
        if not failures:
            failures.append(block)
            raise OSError("gone wrong")
        read(block, into)

    source.memory.read = fail_once
    source.replicator.assign(lane, standby.info)
    for block in range(2):
        source.write(lane, block, 4, b"12345678")
    wait_for(lambda: source.replicator.outcomes)
    assert failures
