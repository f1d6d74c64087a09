"""What a source copies and when, over the transfer's twin in memory. Time is an argument."""

import tracemalloc

import pytest
import zmq

from kevlarflow.recovery.coverage import Replica, Worth
from kevlarflow.recovery.use import NO_CHANGE, Use
from kevlarflow.replication.queue import ReplicationQueue
from kevlarflow.replication.source import BLOCKED_SECONDS, CLOSED_SECONDS, UNANSWERED_SECONDS, Source
from kevlarflow.replication.transfer import CHANNEL_PLACES, MemoryNetwork, MemoryTransfer
from kevlarflow.replication.zmq_transfer import ZmqTransfer
from kevlarflow.types import Member
from kevlarflow.wire import replicas, steps
from unit.replication.parts import BLOCK_SIZE, NO_MESSAGES, Memory, standby_info

STANDBY = Member("b", 1)
FAST = 1 << 30


class Bench:
    def __init__(self, bytes_per_second=FAST, interval=2):
        self.memory = Memory()
        self.told = []
        self.source = Source(Member("a", 1), 0, self.memory, bytes_per_second, self.told.append)
        self.network = MemoryNetwork()
        self.here = MemoryTransfer(self.network, "a")
        self.there = MemoryTransfer(self.network, "b")
        self.interval = interval
        self.now = 0.0

    def lane(self, pipeline=0, first_block=0, standby="b"):
        lane = self.source.lane(
            pipeline, range(first_block, first_block + 50), ReplicationQueue(BLOCK_SIZE, self.interval)
        )
        lane.epoch = 5
        self.source.assign(lane, standby_info(standby))
        return lane

    def write(self, lane, block, filled=4, content=b"12345678", generation=1):
        replica = Replica(block, generation, filled)
        lane.queue.begin([replica], NO_CHANGE)
        self.memory.blocks[lane.table[block]] = content
        lane.queue.end([replica])
        return replica

    def turn(self, seconds=0.0):
        self.now += seconds
        return self.source.turn(self.here, self.now)

    def turns(self, count, seconds=0.01):
        for _ in range(count):
            self.turn(seconds)

    def arrived(self):
        messages = []
        while (arrival := self.there.receive()) is not None:
            messages.append((arrival.peer, replicas.decode(arrival.header), bytes(arrival.data)))
        return messages

    def confirm(self, messages, dropped=()):
        for peer, message, _ in messages:
            tags = [(copy.block, copy.generation, copy.filled) for copy in message.copies]
            self.answer(
                peer, message,
                stored=tuple(tag for tag in tags if tag[0] not in dropped),
                dropped=tuple(tag for tag in tags if tag[0] in dropped),
            )  # fmt: skip

    def answer(self, peer, message, stored=(), dropped=(), lacking=()):
        outcome = replicas.Outcome(message.number, message.pipeline, STANDBY, stored, dropped, lacking, 8, 80)
        self.there.answer(peer, replicas.encode(outcome))


def blocks_of(messages):
    return [copy.block for _, message, _ in messages for copy in message.copies]


def ranges(messages):
    """(start, filled, bytes) of messages of one copy each."""
    return [(copy.start, copy.filled, data) for _, message, data in messages for (copy,) in [message.copies]]


def test_what_was_lost_is_due_again_though_others_are_answered():
    """A connection breaks and is there again: one message was lost with it, and those behind it are answered."""
    bench = Bench(interval=1)
    lane = bench.lane()
    bench.write(lane, 1)
    bench.turn()
    assert blocks_of(bench.arrived()) == [1]
    bench.write(lane, 2)
    bench.turn(0.01)
    bench.confirm(bench.arrived())
    bench.turns(2)
    assert blocks_of(bench.arrived()) == [1]


def test_an_answer_is_awaited_from_when_its_own_message_was_sent():
    """Others that follow do not put it off, nor are they given up with it."""
    bench = Bench(interval=1)
    lane = bench.lane()
    bench.write(lane, 1)
    bench.turn()
    bench.write(lane, 2)
    bench.turn(0.75 * UNANSWERED_SECONDS)
    assert blocks_of(bench.arrived()) == [1, 2]
    bench.turns(2, UNANSWERED_SECONDS / 4)
    assert blocks_of(bench.arrived()) == [1]


def test_a_copy_carries_its_tag_its_epoch_and_a_checksum():
    bench = Bench()
    lane = bench.lane(first_block=100)
    bench.write(lane, 3)
    bench.turn()
    ((_, message, data),) = bench.arrived()
    assert data == b"12345678"
    assert (message.number, message.pipeline, message.epoch, message.stage) == (1, 0, 5, 0)
    assert message.copies == (replicas.Copy(block=3, generation=1, start=0, filled=4, depth=0),)
    assert message.length == 8
    assert replicas.is_intact(message, memoryview(data))
    assert not replicas.is_intact(message, memoryview(b"12345679"))


def test_what_was_confirmed_is_told_with_the_bytes_of_full_and_of_partial_blocks():
    bench = Bench()
    lane = bench.lane()
    bench.write(lane, 1, filled=4)
    bench.write(lane, 2, filled=2)
    bench.turns(2)
    bench.confirm(bench.arrived())
    bench.turn()
    assert [each.stored for each in bench.told] == [((1, 1, 4),), ((2, 1, 2),)]
    assert (bench.told[-1].full_bytes, bench.told[-1].partial_bytes, bench.told[-1].used_bytes) == (8, 4, 8)


def test_a_block_that_changes_hands_during_the_copy_is_not_sent():
    bench = Bench()
    lane = bench.lane()
    replica = bench.write(lane, 1)
    read = bench.memory.read

    def read_and_lose(block, into):
        read(block, into)
        lane.queue.begin([Replica(replica.block, 2, 1)], NO_CHANGE)

    bench.memory.read = read_and_lose
    bench.turns(3)
    assert not bench.arrived()


def test_what_was_written_before_there_was_a_standby_is_copied_too():
    bench = Bench()
    lane = bench.lane(standby="nobody")
    for block in range(3):
        bench.write(lane, block)
    bench.turns(5)
    bench.source.assign(lane, standby_info("b"))
    bench.turns(5)
    assert blocks_of(bench.arrived()) == [0, 1, 2]


def test_catching_up_keeps_to_the_bandwidth():
    bench = Bench(bytes_per_second=80)
    lane = bench.lane()
    for block in range(50):
        bench.write(lane, block)
    sent = 0
    for _ in range(200):
        bench.turn(0.01)
        copies = bench.arrived()
        bench.confirm(copies)
        sent += len(copies)
    assert 18 <= sent <= 21, "80 bytes a second are ten blocks a second"


def test_lanes_share_the_bandwidth():
    bench = Bench(bytes_per_second=80)
    lanes = [bench.lane(0), bench.lane(1, first_block=100)]
    for lane in lanes:
        for block in range(50):
            bench.write(lane, block)
    sent = []
    for _ in range(200):
        bench.turn(0.01)
        copies = bench.arrived()
        bench.confirm(copies)
        sent += [copy.pipeline for _, copy, _ in copies]
    assert abs(sent.count(0) - sent.count(1)) <= 2


def test_a_standby_that_does_not_answer_gets_a_few_copies_and_then_the_same_again_later():
    bench = Bench()
    lane = bench.lane()
    for block in range(20):
        bench.write(lane, block)
    bench.turns(50, seconds=0.001)
    first = bench.arrived()
    assert blocks_of(first) == [0, 1, 2, 3]
    assert len(first) == CHANNEL_PLACES
    bench.turn(UNANSWERED_SECONDS + 0.1)
    later = []
    for _ in range(40):
        bench.turn(0.001)
        copies = bench.arrived()
        bench.confirm(copies)
        later += blocks_of(copies)
    assert sorted(later) == list(range(20)), "what was given up is due again, behind the others"


def test_a_full_channel_is_not_a_loss():
    bench = Bench()
    lane = bench.lane(standby="nobody")
    for block in range(6):
        bench.write(lane, block)
    bench.turns(50, seconds=UNANSWERED_SECONDS)
    assert len(lane.queue._due) >= 2, "the channel was to be full"
    bench.source.assign(lane, standby_info("b"))
    sent = []
    for _ in range(20):
        bench.turn(0.01)
        copies = bench.arrived()
        bench.confirm(copies)
        sent += blocks_of(copies)
    assert sorted(sent) == list(range(6))


class LargeMemory(Memory):
    """KV memory of blocks that ZeroMQ does not copy."""

    block_bytes = 1 << 17
    token_bytes = block_bytes // BLOCK_SIZE

    def read(self, block, into):
        into[:] = bytes(len(into))

    def read_tokens(self, block, start, end, into):
        into[:] = bytes(len(into))


def test_a_standby_that_reads_nothing_takes_a_bounded_amount_of_memory_however_long_that_lasts(tmp_path):
    deaf = zmq.Context.instance().socket(zmq.ROUTER)
    deaf.setsockopt(zmq.RCVHWM, 1)
    deaf.bind(f"ipc://{tmp_path}/deaf")
    transfer = ZmqTransfer(f"ipc://{tmp_path}/a", LargeMemory.block_bytes, peers=2)
    source = Source(Member("a", 1), 0, LargeMemory(), FAST, lambda _: None)
    lane = source.lane(0, range(50), ReplicationQueue(BLOCK_SIZE, 2))
    source.assign(lane, standby_info(f"ipc://{tmp_path}/deaf"))
    most, now = 0, 0.0
    tracemalloc.start()
    try:
        for generation in range(200):
            for filled in (2, 4):
                written = [Replica(block, generation, filled) for block in range(50)]
                lane.queue.begin(written, NO_CHANGE)
                lane.queue.end(written)
            for _ in range(2 * CHANNEL_PLACES):
                now += source.turn(transfer, now)
            now += UNANSWERED_SECONDS
            most = max(most, tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
        transfer.close()
        deaf.close(linger=0)
    assert not lane.queue.is_empty
    assert most < 10 * CHANNEL_PLACES * LargeMemory.block_bytes, "200 times the channel's places were filled"


def test_a_replica_that_the_standby_dropped_is_told_and_not_sent_again():
    bench = Bench()
    lane = bench.lane()
    bench.write(lane, 1)
    bench.turn()
    bench.confirm(bench.arrived(), dropped=(1,))
    bench.turns(5)
    assert bench.told[0].dropped == ((1, 1, 4),)
    assert not bench.arrived()


@pytest.mark.parametrize("answer", [replicas.encode(replicas.Closed("wrong checksum")), *NO_MESSAGES.values()])
def test_a_closed_channel_is_counted_and_opened_anew_after_a_while(answer):
    bench = Bench()
    lane = bench.lane()
    bench.write(lane, 1)
    bench.turn()
    ((peer, _, _),) = bench.arrived()
    bench.there.answer(peer, answer)
    bench.turn(0.01)
    bench.write(lane, 2)
    bench.turns(5)
    assert not bench.arrived()
    assert lane.refused == 1
    bench.turn(CLOSED_SECONDS + 1)
    bench.turn(0.01)
    again = bench.arrived()
    assert set(blocks_of(again)) == {1, 2}
    assert all(other != peer for other, _, _ in again)


def test_what_comes_through_a_closed_channel_is_read_all_the_same():
    """Unread it would wake the thread again and again."""
    bench = Bench()
    lane = bench.lane()
    bench.write(lane, 1)
    bench.turn()
    ((peer, message, _),) = bench.arrived()
    bench.there.answer(peer, replicas.encode(replicas.Closed("wrong checksum")))
    bench.turn(0.01)
    bench.answer(peer, message, dropped=((1, 1, 4),))
    bench.turn(0.01)
    (channel,) = bench.source._channels.values()
    assert channel.outlet.receive() is None
    assert not bench.told


def test_a_copy_that_fails_takes_no_room_from_the_next():
    bench = Bench()
    lane = bench.lane()
    bench.turn()
    read = bench.memory.read

    def fail(block, into):
        raise OSError("no such memory")

    bench.memory.read = fail
    for block in range(2 * CHANNEL_PLACES):
        bench.write(lane, block)
        with pytest.raises(OSError, match="no such memory"):
            bench.turn(1.0)
    bench.memory.read = read
    bench.turns(2 * CHANNEL_PLACES, seconds=1.0)
    assert blocks_of(bench.arrived())


def test_nothing_is_copied_for_a_channel_that_takes_nothing():
    bench = Bench()
    lane = bench.lane(standby="nobody")
    for block in range(20):
        bench.write(lane, block)
    bench.turns(50, seconds=0.02)
    bench.turn(UNANSWERED_SECONDS + 1.0)
    reads, read = [], bench.memory.read
    bench.memory.read = lambda block, into: reads.append(block) or read(block, into)
    bench.turns(200, seconds=0.001)
    assert len(reads) <= 0.2 / BLOCKED_SECONDS + 1, "each step rings"


def test_a_lane_that_was_left_is_not_copied():
    bench = Bench()
    lane = bench.lane()
    bench.write(lane, 1)
    bench.source.leave(0)
    bench.turns(3)
    assert not bench.arrived()


def test_nothing_due_means_a_long_wait_and_a_cap_a_short_one():
    bench = Bench(bytes_per_second=80)
    lane = bench.lane()
    assert bench.turn() >= 1.0
    bench.write(lane, 1)
    bench.write(lane, 2)
    bench.turn()
    assert bench.turn(0.04) == pytest.approx(0.06)


def test_a_partly_filled_block_travels_a_few_tokens_at_a_time():
    bench = Bench(interval=1)
    lane = bench.lane()
    for filled in (2, 3, 4):
        bench.write(lane, 1, filled)
        bench.turn(0.01)
    assert ranges(bench.arrived()) == [(0, 2, b"1234"), (2, 3, b"56"), (3, 4, b"78")]


def test_what_a_step_has_added_to_many_blocks_travels_together():
    bench = Bench(interval=1)
    lane = bench.lane()
    for filled in (1, 2):
        for block, content in ((1, b"12345678"), (2, b"abcdefgh"), (3, b"ABCDEFGH")):
            bench.write(lane, block, filled, content)
        bench.turn(0.01)
    first, second = bench.arrived()
    assert [(copy.block, copy.start, copy.filled) for copy in second[1].copies] == [(1, 1, 2), (2, 1, 2), (3, 1, 2)]
    assert (first[2], second[2]) == (b"12abAB", b"34cdCD")
    assert (lane.full_bytes, lane.partial_bytes) == (0, 12)


def test_a_message_is_no_longer_than_a_block_and_keeps_the_order():
    bench = Bench(interval=1)
    lane = bench.lane()
    for block, filled in ((1, 3), (2, 2), (3, 4), (4, 1), (5, 3)):
        bench.write(lane, block, filled)
    bench.turns(5)
    copied = [[copy.block for copy in message.copies] for _, message, _ in bench.arrived()]
    assert copied == [[1], [2], [3], [4, 5]]


def test_of_a_message_only_what_changes_hands_during_the_copy_is_left_out():
    bench = Bench(interval=1)
    lane = bench.lane()
    bench.write(lane, 1, 1, b"12345678")
    bench.write(lane, 2, 1, b"abcdefgh")
    read_tokens = bench.memory.read_tokens

    def read_and_lose(block, start, end, into):
        read_tokens(block, start, end, into)
        if block == 1:
            lane.queue.begin([Replica(1, 2, 1)], NO_CHANGE)

    bench.memory.read_tokens = read_and_lose
    bench.turn()
    ((_, message, data),) = bench.arrived()
    assert ([copy.block for copy in message.copies], data) == ([2], b"ab")


def test_where_a_block_cannot_be_taken_apart_it_travels_whole():
    bench = Bench()
    bench.memory.token_bytes = 0
    lane = bench.lane()
    for filled in (2, 4):
        bench.write(lane, 1, filled)
        bench.turn(0.01)
    assert ranges(bench.arrived()) == [(0, 2, b"12345678"), (0, 4, b"12345678")]


def test_where_blocks_cannot_be_taken_apart_each_is_a_message_of_its_own():
    bench = Bench()
    bench.memory.token_bytes = 0
    lane = bench.lane()
    for block in (1, 2):
        bench.write(lane, block, filled=2)
    bench.turns(2)
    assert [len(message.copies) for _, message, _ in bench.arrived()] == [1, 1]


def test_what_the_standby_lacks_is_sent_whole():
    bench = Bench(interval=1)
    lane = bench.lane()
    bench.write(lane, 1, 2)
    bench.turn(0.01)
    bench.write(lane, 1, 3)
    bench.turn(0.01)
    _, (peer, message, _) = bench.arrived()
    bench.answer(peer, message, lacking=((1, 1, 3),))
    bench.turn(0.01)
    assert ranges(bench.arrived()) == [(0, 3, b"123456")]


def test_no_place_of_a_channel_is_lost_when_the_same_tokens_are_on_their_way_twice():
    bench = Bench(interval=1)
    lane = bench.lane()
    for generation in range(1, 2 * CHANNEL_PLACES):
        for filled in (1, 2, 3):
            bench.write(lane, 1, filled, generation=generation)
            bench.turn(0.001)
        first, *later = bench.arrived()
        bench.confirm([first])
        # The standby has lost the first token, which the next two go on from; the second of them still has no answer.
        bench.answer(*later[0][:2], lacking=((1, generation, 2),))
        bench.turn(0.001)
        bench.answer(*later[1][:2], lacking=((1, generation, 3),))
        bench.turn(0.001)
        bench.confirm(bench.arrived())
        bench.turn(0.001)
    (channel,) = bench.source._channels.values()
    assert len(channel.buffers) + len(channel.unanswered) == CHANNEL_PLACES
    bench.write(lane, 2)
    bench.turn(0.001)
    assert blocks_of(bench.arrived()) == [2]


def test_a_later_copy_tells_what_earlier_ones_are_worth_now():
    bench = Bench()
    lane = bench.lane()
    bench.write(lane, 1)
    bench.turn()
    lane.queue.begin((), Use(released=(1,)))
    bench.turn(0.01)
    bench.write(lane, 2)
    bench.turn(0.01)
    first, second = bench.arrived()
    assert [message.copies[0].worth for _, message, _ in (first, second)] == [Worth.REQUEST, Worth.REQUEST]
    assert (first[1].revalued, second[1].revalued) == ((), ((1, 1, Worth.PREFIX),))


def test_what_a_copy_could_not_tell_the_next_one_does():
    bench = Bench()
    lane = bench.lane()
    bench.write(lane, 1)
    bench.turn()
    lane.queue.begin((), Use(released=(1,)))
    for block in range(2, 7):
        bench.write(lane, block)
    (outlet,) = (channel.outlet for channel in bench.source._channels.values())
    send, outlet.send = outlet.send, lambda header, data: False
    bench.turn(0.01)
    outlet.send = send
    bench.turn(BLOCKED_SECONDS)
    assert [copy.revalued for _, copy, _ in bench.arrived()] == [(), ((1, 1, Worth.PREFIX),)]


def test_everything_is_sent_once_more_when_the_answers_may_have_been_lost():
    bench = Bench()
    lane = bench.lane()
    bench.write(lane, 3)
    bench.turns(3)
    (first,) = bench.arrived()
    bench.confirm([first])
    assert not bench.source.assign(lane, standby_info("b"))
    bench.turns(3)
    assert bench.arrived() == []
    assert bench.source.assign(lane, standby_info("b"), anew=True)
    bench.turns(3)
    ((peer, message, _),) = bench.arrived()
    assert message == first[1]
    assert peer != first[0], "it goes over a new channel"


# ---- before a lane moves


def flushed(bench):
    return [each for each in bench.told if isinstance(each, steps.Flushed)]


def test_a_lane_is_flushed_once_the_standby_has_answered_everything():
    bench = Bench()
    lane = bench.lane()
    for block in range(CHANNEL_PLACES + 1):
        bench.write(lane, block)
    lane.flushing = 5
    bench.turns(CHANNEL_PLACES + 1)
    first = bench.arrived()
    assert len(first) == CHANNEL_PLACES
    assert flushed(bench) == []
    bench.confirm(first)
    bench.turns(2)
    assert flushed(bench) == []
    bench.confirm(bench.arrived())
    bench.turns(2)
    assert flushed(bench) == [steps.Flushed(0, 5, 0)]
    assert bench.told[-1] == steps.Flushed(0, 5, 0)


def test_the_bandwidth_does_not_hold_up_a_lane_that_is_flushed():
    bench = Bench(bytes_per_second=8)
    lane, other = bench.lane(), bench.lane(pipeline=1, first_block=100)
    for block in range(5):
        bench.write(lane, block)
    bench.write(other, 0)
    lane.flushing = 5
    copies = []
    for _ in range(6):
        bench.turn(0.01)
        copies += (came := bench.arrived())
        bench.confirm(came)
    assert {copy.pipeline for _, copy, _ in copies} == {0}
    assert blocks_of(copies) == [0, 1, 2, 3, 4]


def test_a_lane_without_a_standby_is_flushed_at_once():
    bench = Bench()
    lane = bench.lane()
    bench.source.assign(lane, None)
    lane.flushing = 5
    bench.turn()
    assert flushed(bench) == [steps.Flushed(0, 5, 0)]
