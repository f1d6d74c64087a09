"""The standby's store stays within its bytes, and drops what is cheapest to compute again."""

import random

import pytest

from kevlarflow.recovery.coverage import Replica, Worth
from kevlarflow.replication.store import SILENT_COPIES, NothingToGoOnFrom, StandbyStore
from unit.replication.parts import BOUNDS, Memory, content

DATA = b"x" * BOUNDS.block_bytes


def store_of(limit):
    return StandbyStore(limit // 10 * BOUNDS.block_bytes, Memory())


def replica(block, depth=0, generation=1, filled=4, worth=Worth.REQUEST):
    return Replica(block, generation, filled, depth, worth)


def test_only_the_content_that_is_asked_for_is_given_back():
    store = store_of(100)
    store.put(0, replica(1, filled=3), DATA)
    assert content(store, 0, replica(1, filled=3)) == DATA
    assert content(store, 0, replica(1, generation=2, filled=3)) is None
    assert content(store, 0, replica(1, filled=4)) is None
    assert content(store, 1, replica(1)) is None


def test_a_newer_copy_of_a_block_replaces_the_older():
    store = store_of(100)
    store.put(0, replica(1, filled=2), DATA)
    store.put(0, replica(1, filled=4), DATA)
    assert store.used_bytes == len(DATA)


def test_a_newer_copy_serves_who_only_knows_of_an_older():
    store = store_of(100)
    store.put(0, replica(1, filled=2), b"o" * 8)
    store.put(0, replica(1, filled=4), b"n" * 8)
    assert content(store, 0, replica(1, filled=2)) == b"n" * 8


def test_the_deepest_block_is_dropped_first():
    store = store_of(30)
    for block, depth in ((1, 0), (2, 5), (3, 1)):
        store.put(0, replica(block, depth), DATA)
    assert store.put(1, replica(4, 2), DATA) == [(0, replica(2, 5))]
    assert content(store, 0, replica(2, 5)) is None


def test_a_lane_that_sends_nothing_any_more_keeps_nobody_out():
    store = store_of(20)
    store.put(0, replica(1), DATA)
    store.put(0, replica(2), DATA)
    newer = replica(3, depth=1)
    refused = [store.put(1, newer, DATA) for _ in range(SILENT_COPIES)]
    assert all(each == [(1, newer)] for each in refused), "it may be held by requests still"
    assert store.put(1, newer, DATA) == [(0, replica(1))]
    assert content(store, 0, replica(2)) == DATA, "a prefix that may be hit again"


def test_a_lane_that_sends_again_after_a_silence_is_worth_as_much_as_before():
    store = store_of(30)
    store.put(0, replica(1), DATA)
    store.put(0, replica(2, depth=3, worth=Worth.PREFIX), DATA)
    for number in range(SILENT_COPIES + 10):
        store.put(1, replica(10, generation=number, depth=9), DATA)
    store.put(1, replica(11, depth=9), DATA)
    assert content(store, 0, replica(2)) is None, "deeper than the other"
    store.put(0, replica(3, depth=1), DATA)
    for block in (12, 13):
        store.put(1, replica(block, depth=9), DATA)
    assert content(store, 0, replica(1)) == DATA
    assert content(store, 0, replica(3, depth=1)) == DATA


def test_among_equally_deep_blocks_the_oldest_goes():
    store = store_of(20)
    store.put(0, replica(1), DATA)
    store.put(0, replica(2), DATA)
    assert store.put(0, replica(3), DATA) == [(0, replica(1))]


def test_a_block_deeper_than_all_others_is_not_taken():
    store = store_of(20)
    store.put(0, replica(1), DATA)
    store.put(0, replica(2), DATA)
    assert store.put(0, replica(3, depth=9), DATA) == [(0, replica(3, 9))]
    assert content(store, 0, replica(1)) == DATA


def test_what_serves_nobody_goes_first_and_then_what_only_a_prefix_cache_could_use():
    store = store_of(40)
    store.put(0, replica(1, depth=9), DATA)
    store.put(0, replica(2, depth=5, worth=Worth.PREFIX), DATA)
    store.put(0, replica(3, depth=7, worth=Worth.PREFIX), DATA)
    store.put(0, replica(4, depth=0, filled=3, worth=Worth.NOBODY), DATA)
    gone = [store.put(1, replica(block), DATA)[0][1].block for block in range(4)]
    assert gone == [4, 3, 2, 1]


def test_a_prefix_is_not_taken_in_place_of_what_a_request_holds():
    store = store_of(10)
    store.put(0, replica(1, depth=9), DATA)
    prefix = replica(2, depth=0, worth=Worth.PREFIX)
    assert store.put(0, prefix, DATA) == [(0, prefix)]
    assert store.put(0, replica(3, depth=8), DATA) == [(0, replica(1, depth=9))]


def test_a_replica_that_its_request_let_go_of_makes_room_and_one_that_is_hit_again_stays():
    store = store_of(30)
    for block in (1, 2, 3):
        store.put(0, replica(block, depth=block), DATA)
    store.revalue(0, [(1, 1, Worth.PREFIX), (2, 1, Worth.PREFIX)])
    store.revalue(0, [(2, 1, Worth.REQUEST)])
    assert store.put(1, replica(7, depth=9), DATA) == [(0, replica(1))]
    assert store.put(1, replica(8, depth=2), DATA) == [(1, replica(7))]


@pytest.mark.parametrize(
    ("pipeline", "block", "generation"), [(0, 1, 2), (1, 1, 1), (0, 2, 1)], ids=["generation", "lane", "block"]
)
def test_another_content_is_not_worth_less_for_it(pipeline, block, generation):
    store = store_of(20)
    store.put(0, replica(1, depth=1), DATA)
    store.put(0, replica(9, depth=2), DATA)
    store.revalue(pipeline, [(block, generation, Worth.PREFIX)])
    assert store.put(0, replica(3), DATA) == [(0, replica(9))]


def test_tokens_that_are_put_behind_a_replica_bring_its_worth_along():
    store = store_of(20)
    store.put(0, replica(1, depth=1, filled=2, worth=Worth.PREFIX), b"abcd", 0)
    store.put(0, replica(1, depth=1, filled=3), b"ef", 2)
    store.put(0, replica(2, depth=2), DATA)
    assert store.put(0, replica(3), DATA) == [(0, replica(2))]


def test_the_order_stays_bounded_however_often_replicas_are_revalued():
    store = store_of(20)
    store.put(0, replica(1, depth=1), DATA)
    store.put(0, replica(2, depth=2), DATA)
    for _ in range(5_000):
        store.revalue(0, [(1, 1, Worth.PREFIX), (2, 1, Worth.REQUEST)])
    assert len(store._order) < 2_000
    assert store.put(0, replica(3), DATA) == [(0, replica(1))]


def test_a_forgotten_lane_frees_its_bytes():
    store = store_of(100)
    store.put(0, replica(1), DATA)
    store.put(1, replica(1), DATA)
    store.forget(0)
    assert store.used_bytes == len(DATA)
    assert content(store, 1, replica(1)) == DATA


def test_it_never_holds_more_than_its_limit():
    rng = random.Random(1)
    store = store_of(95)
    for _ in range(2_000):
        worth = rng.choice(list(Worth))
        store.put(rng.randrange(3), replica(rng.randrange(20), rng.randrange(6), rng.randrange(9), worth=worth), DATA)
        store.revalue(rng.randrange(3), [(rng.randrange(20), rng.randrange(9), rng.choice(list(Worth)))])
        assert store.used_bytes <= store.limit_bytes
        if rng.random() < 0.02:
            store.forget(rng.randrange(3))


def test_the_bytes_of_each_lane_are_known():
    store = store_of(100)
    store.put(0, replica(1), DATA)
    store.put(1, replica(1), DATA)
    store.put(1, replica(2), DATA)
    assert (store.bytes_of(0), store.bytes_of(1), store.used_bytes) == (8, 16, 24)
    store.forget(1)
    assert (store.bytes_of(0), store.bytes_of(1)) == (8, 0)


def test_contents_are_not_mixed_up_when_places_are_used_again():
    store = store_of(30)
    for block in range(9):
        store.put(0, replica(block), bytes([block]) * 8)
    assert [(content(store, 0, replica(block))) for block in (6, 7, 8)] == [bytes([block]) * 8 for block in (6, 7, 8)]


def test_a_pinned_lane_is_neither_dropped_nor_replaced():
    store = store_of(20)
    store.put(0, replica(1, depth=5), DATA)
    store.put(0, replica(2, depth=4), DATA)
    store.pin(0)
    assert store.put(1, replica(7), DATA) == [(1, replica(7))]
    assert store.put(0, replica(1, generation=2), b"y" * 8) == [(0, replica(1, generation=2))]
    assert content(store, 0, replica(1)) == DATA
    store.unpin(0)
    assert store.put(1, replica(7), DATA) == [(0, replica(1))]


def test_what_is_pinned_is_looked_at_once_however_many_copies_come_meanwhile():
    store = store_of(1_000)
    for block in range(100):
        store.put(0, replica(block, depth=block, worth=Worth.PREFIX), DATA)
    store.pin(0)
    store.put(1, replica(1), DATA)
    assert not store._order
    store.unpin(0)
    assert store.put(1, replica(1), DATA) == [(0, replica(99, depth=99, worth=Worth.PREFIX))]


def test_a_store_smaller_than_a_block_takes_nothing():
    store = store_of(9)
    assert store.put(0, replica(1), DATA) == [(0, replica(1))]
    assert store.used_bytes == 0


def test_a_copy_that_goes_on_from_an_earlier_one_is_put_behind_it():
    store = store_of(100)
    store.put(0, replica(1, filled=2), b"abcd", 0)
    assert store.put(0, replica(1, filled=3), b"ef", 2) == []
    assert store.put(0, replica(1, filled=4), b"gh", 3) == []
    assert content(store, 0, replica(1, filled=4)) == b"abcdefgh"
    assert store.used_bytes == BOUNDS.block_bytes


@pytest.mark.parametrize(
    "here", [(), (replica(1, filled=1),), (replica(1, generation=2, filled=2),), (replica(2, filled=2),)]
)
def test_a_copy_that_has_nothing_to_go_on_from_is_not_taken(here):
    store = store_of(100)
    for each in here:
        store.put(0, each, b"??" * each.filled, 0)
    with pytest.raises(NothingToGoOnFrom):
        store.put(0, replica(1, filled=3), b"ef", 2)
    assert content(store, 0, replica(1, filled=3)) is None


def test_a_late_copy_of_fewer_tokens_takes_none_away():
    store = store_of(100)
    store.put(0, replica(1, filled=4), b"abcdefgh")
    store.put(0, replica(1, filled=3), b"ef", 2)
    assert content(store, 0, replica(1, filled=4)) == b"abcdefgh"


def test_nothing_is_put_behind_a_replica_that_is_being_put_in_place():
    store = store_of(100)
    store.put(0, replica(1, filled=2), b"abcd", 0)
    store.pin(0)
    assert store.put(0, replica(1, filled=3), b"ef", 2) == [(0, replica(1, filled=3))]
    assert content(store, 0, replica(1, filled=3)) is None


def test_what_was_put_behind_a_replica_is_dropped_with_it():
    store = store_of(10)
    store.put(0, replica(1, depth=1, filled=2), b"abcd", 0)
    store.put(0, replica(1, depth=1, filled=3), b"ef", 2)
    assert store.put(0, replica(2), DATA) == [(0, replica(1, filled=3))]


def test_a_copy_that_goes_on_from_another_is_the_same_and_one_that_replaces_it_is_not():
    store = store_of(100)
    store.put(0, replica(1, filled=2), DATA)
    store.put(1, replica(2), DATA)
    before = store.ages(0)
    assert before.keys() == {1}
    store.put(0, replica(1, filled=4), DATA[:4], start=2)
    assert store.ages(0) == before
    store.put(0, replica(1, filled=4), DATA)
    assert store.ages(0) != before
