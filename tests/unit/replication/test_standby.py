"""A standby stores what is right in every point, and closes the channel to whoever sends something else."""

import contextlib
import logging
import os

import msgspec
import pytest

from kevlarflow.recovery.coverage import Replica, Worth
from kevlarflow.replication.standby import Standby, log
from kevlarflow.replication.store import StandbyStore
from kevlarflow.replication.transfer import Arrival
from kevlarflow.types import Member
from kevlarflow.wire import replicas
from kevlarflow.wire.replicas import Copy
from unit.replication.parts import BOUNDS, NO_MESSAGES, Memory, content, header

DATA = b"12345678"


class Answers:
    """A transfer that only keeps what is answered."""

    def __init__(self):
        self.sent = []

    def answer(self, peer, frame):
        self.sent.append((peer, replicas.decode(frame)))


class Bench:
    def __init__(self, limit=800):
        self.store = StandbyStore(limit, Memory())
        self.standby = Standby(Member("b", 1), 0, self.store, BOUNDS)
        self.answers = Answers()

    def send(self, peer=b"a", payload=DATA, raw_header=None, **changes):
        frame = header(payload, **changes) if raw_header is None else raw_header
        self.standby.take(Arrival(peer, frame, memoryview(payload)), self.answers)


def test_a_right_copy_is_stored_and_confirmed():
    bench = Bench()
    bench.send()
    assert content(bench.store, 0, Replica(1, 1, 4)) == DATA
    assert bench.answers.sent == [(b"a", replicas.Outcome(1, 0, Member("b", 1), ((1, 1, 4),), (), (), 8, 800))]


COPY = Copy(1, 1, 0, 4, 0)


def damaged(before, after):
    """A header in which something was changed on its way."""
    texts = [msgspec.msgpack.encode(each).removeprefix(b"\x81") for each in (before, after)]
    right = header(DATA)
    assert right.count(texts[0]) == 1
    return right.replace(*texts)


WRONG = {
    "stage": {"stage": 1},
    "pipeline": {"pipeline": 2},
    "block": {"block": 100},
    "negative block": {"block": -1},
    "too many tokens": {"filled": 5},
    "no token": {"filled": 0},
    "generation": {"generation": -1},
    "depth": {"depth": -1},
    "said length": {"length": 7},
    "length": {"payload": b"123"},
    "longer": {"payload": b"x" * 9},
    "some tokens in the length of all": {"filled": 3},
    "negative start": {"start": -1},
    "no token from its start on": {"start": 4},
    "the length of other tokens": {"start": 2, "payload": b"123456"},
    "checksum": {"checksum": 1},
    "epoch": {"epoch": 4},
    "no header": {"raw_header": b""},
    "worth": {"worth": 3},
    "worth of another": {"revalued": ((1, 1, -1),)},
    "no copy at all": {"copies": ()},
    "one of two": {"copies": (Copy(1, 1, 0, 2, 0), Copy(100, 1, 0, 2, 0))},
    "the length of one of two": {"copies": (Copy(1, 1, 0, 2, 0), Copy(2, 1, 0, 4, 0))},
    "a tag under another's checksum": {"raw_header": damaged(COPY, Copy(3, 1, 0, 4, 0))},
    "an epoch under another's checksum": {"raw_header": damaged({"epoch": 5}, {"epoch": 69})},
    **{f"no message: {name}": {"raw_header": frame} for name, frame in NO_MESSAGES.items()},
    "another message": {"raw_header": replicas.encode(replicas.Closed("why"))},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_copy_is_dropped_counted_and_its_channel_closed(wrong):
    bench = Bench()
    bench.send(b"good")
    before = content(bench.store, 0, Replica(1, 1, 4))
    bench.send(b"bad", **wrong)
    peer, closed = bench.answers.sent[-1]
    assert (peer, type(closed), bench.standby.refused) == (b"bad", replicas.Closed, 1)

    bench.send(b"bad", block=2)
    assert content(bench.store, 0, Replica(2, 1, 4)) is None, "a closed channel is not heard again"
    bench.send(b"good", block=3)
    assert content(bench.store, 0, Replica(3, 1, 4)) == DATA, "others are"
    assert (content(bench.store, 0, Replica(1, 1, 4))) == before
    assert bench.store.used_bytes == 16
    assert bench.standby.refused == 1


def test_a_damaged_copy_never_replaces_the_one_that_is_there():
    bench = Bench()
    bench.send()
    bench.send(b"bad", payload=b"damaged!", checksum=1, generation=2)
    assert content(bench.store, 0, Replica(1, 1, 4)) == DATA


def test_what_one_message_drops_and_brings_again_is_said_to_be_there():
    bench = Bench(limit=16)
    bench.send(payload=b"12", copies=(Copy(1, 1, 0, 1, 5),))
    bench.send(payload=b"12", copies=(Copy(2, 1, 0, 1, 5),))
    bench.send(payload=b"abcd12", copies=(Copy(3, 1, 0, 2, 0), Copy(1, 1, 0, 1, 5)))
    _, outcome = bench.answers.sent[-1]
    assert content(bench.store, 0, Replica(1, 1, 1)) is not None
    assert ((1, 1, 1) in outcome.stored, outcome.dropped) == (True, ((2, 1, 1),))


def test_a_full_standby_says_what_it_dropped_to_whoever_sent_it():
    bench = Bench(limit=16)
    bench.send(b"a", block=1, depth=3)
    bench.send(b"a", block=2, depth=1)
    bench.send(b"other", pipeline=1, block=1, depth=2)
    (asked, stored), (other, lost) = bench.answers.sent[2:]
    assert (asked, stored.dropped) == (b"other", ())
    assert (other, lost.number, lost.dropped, lost.used_bytes) == (b"a", 0, ((1, 1, 4),), 8)
    bench.send(b"a", block=3, depth=9)
    _, outcome = bench.answers.sent[-1]
    assert (outcome.stored, outcome.dropped) == ((), ((3, 1, 4),))
    assert bench.store.used_bytes == 16


def test_a_full_standby_drops_first_what_a_copy_says_that_no_request_holds():
    bench = Bench(limit=16)
    bench.send(block=1, depth=0)
    bench.send(block=2, depth=7)
    bench.send(block=3, depth=9, revalued=((1, 1, Worth.PREFIX),))
    _, outcome = bench.answers.sent[-1]
    assert (outcome.stored, outcome.dropped) == (((3, 1, 4),), ((1, 1, 4),))
    bench.send(block=4, depth=0, worth=Worth.PREFIX)
    _, outcome = bench.answers.sent[-1]
    assert (outcome.stored, outcome.dropped) == ((), ((4, 1, 4),))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_for_logs_costs_the_line_and_nothing_else():
    handler, lost = logging.FileHandler("/dev/full"), []
    handler.handleError = lost.append
    log.addHandler(handler)
    try:
        bench = Bench()
        bench.send(b"bad", checksum=1)
        bench.send(b"good")
    finally:
        log.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()
    assert len(lost) == 1, "the disk was to be full"
    assert bench.standby.refused == 1
    assert content(bench.store, 0, Replica(1, 1, 4)) == DATA


def test_tokens_with_nothing_before_them_are_named_and_the_channel_stays_open():
    bench = Bench()
    bench.send(payload=b"5678", start=2)
    bench.send(payload=b"1234", filled=2)
    bench.send(payload=b"5678", start=2)
    lacking, first, second = (answer for _, answer in bench.answers.sent)
    assert (lacking.stored, lacking.lacking) == ((), ((1, 1, 4),))
    assert (first.stored, second.stored) == (((1, 1, 2),), ((1, 1, 4),))
    assert content(bench.store, 0, Replica(1, 1, 4)) == DATA


def test_where_blocks_are_copied_whole_no_tokens_are_taken():
    bench = Bench()
    bench.standby = Standby(Member("b", 1), 0, bench.store, BOUNDS._replace(token_bytes=0))
    bench.send(payload=b"5678", start=2)
    assert bench.standby.refused == 1


def test_copies_of_several_blocks_are_stored_each_by_itself_and_answered_at_once():
    bench = Bench()
    bench.send(payload=b"12", copies=(Copy(1, 1, 0, 1, 0),), number=7)
    bench.send(payload=b"3456ab", copies=(Copy(1, 1, 1, 2, 0), Copy(2, 1, 2, 3, 1), Copy(3, 1, 0, 1, 2)), number=8)
    _, outcome = bench.answers.sent[-1]
    assert (outcome.number, outcome.stored, outcome.lacking) == (8, ((1, 1, 2), (3, 1, 1)), ((2, 1, 3),))
    assert content(bench.store, 0, Replica(1, 1, 2))[:4] == b"1234"
    assert content(bench.store, 0, Replica(2, 1, 3)) is None
    assert content(bench.store, 0, Replica(3, 1, 1))[:2] == b"ab"


def test_a_copy_that_makes_room_for_the_next_of_its_message_was_not_stored():
    bench = Bench(limit=8)
    bench.send(payload=b"12ab", copies=(Copy(1, 1, 0, 1, 3), Copy(2, 1, 0, 1, 1)))
    _, outcome = bench.answers.sent[-1]
    assert (outcome.stored, outcome.dropped) == (((2, 1, 1),), ((1, 1, 1),))
