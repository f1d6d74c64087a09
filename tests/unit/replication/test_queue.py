"""Which block is copied next, and when a finished copy must not be sent."""

import pytest

from kevlarflow.recovery.coverage import Replica
from kevlarflow.replication.queue import Due, ReplicationQueue


def wrote(queue, *replicas):
    queue.begin(replicas)
    return queue.end(replicas)


def test_a_full_block_is_due():
    queue = ReplicationQueue(block_size=4, interval=0)
    assert wrote(queue, Replica(1, 1, 4))
    assert queue.next().replica == Replica(1, 1, 4)
    assert queue.next() is None


def test_a_partly_filled_block_is_due_after_the_interval():
    queue = ReplicationQueue(block_size=8, interval=3)
    assert not wrote(queue, Replica(1, 1, 2))
    assert wrote(queue, Replica(1, 1, 3))
    assert queue.still_holds(queue.next())
    assert not wrote(queue, Replica(1, 1, 5))
    assert wrote(queue, Replica(1, 1, 6))


def test_without_an_interval_only_full_blocks_are_copied():
    queue = ReplicationQueue(block_size=8, interval=0)
    assert not wrote(queue, Replica(1, 1, 7))


def test_a_block_that_was_given_away_during_the_copy_is_not_sent():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4))
    copied = queue.next()
    queue.begin([Replica(1, 2, 1)])
    assert not queue.still_holds(copied)


def test_a_block_that_grew_during_the_copy_is_sent_as_what_it_was():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 2))
    copied = queue.next()
    queue.begin([Replica(1, 1, 3)])
    assert queue.still_holds(copied)


def test_a_new_standby_gets_everything_again():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4), Replica(2, 1, 4))
    for _ in range(2):
        queue.still_holds(queue.next())
    assert queue.next() is None
    queue.restart()
    assert [queue.next().replica, queue.next().replica] == [Replica(1, 1, 4), Replica(2, 1, 4)]


@pytest.mark.parametrize("interval", [0, 4])
def test_a_lane_that_is_about_to_move_is_copied_token_by_token_until_it_has_moved(interval):
    queue = ReplicationQueue(block_size=8, interval=interval)
    assert not wrote(queue, Replica(1, 1, 2))
    assert queue.hasten()
    assert queue.still_holds(queue.next())
    assert wrote(queue, Replica(1, 1, 3))
    queue.hold([Replica(1, 1, 3)])
    assert queue.next() is None
    assert not wrote(queue, Replica(1, 1, 5))


def test_after_a_re_forming_only_what_is_held_is_copied():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4), Replica(2, 1, 4))
    assert queue.hold([Replica(2, 1, 4)])
    assert queue.next().replica == Replica(2, 1, 4)
    assert queue.next() is None


def test_what_the_standby_has_is_not_sent_again_after_a_re_forming():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4))
    queue.still_holds(queue.next())
    assert not queue.hold([Replica(1, 1, 4)])


def test_a_copy_that_could_not_be_sent_is_due_again():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4))
    copied = queue.next()
    assert queue.still_holds(copied)
    queue.not_sent(copied.replica)
    assert queue.next() == copied


def test_the_deeper_a_block_the_sooner_it_is_copied_again():
    def tokens_until_due(depth):
        queue = ReplicationQueue(block_size=128, interval=32)
        return next(filled for filled in range(1, 129) if wrote(queue, Replica(1, 1, filled, depth)))

    assert [tokens_until_due(depth) for depth in (0, 7, 8, 16, 58, 10_000)] == [32, 32, 16, 10, 4, 1]


def test_only_what_was_added_since_the_last_copy_is_copied():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 3))
    assert queue.still_holds(queue.next())
    wrote(queue, Replica(1, 1, 5))
    assert queue.next() == Due(Replica(1, 1, 5), start=3)


def test_another_content_of_the_block_is_copied_from_its_first_token():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 3))
    assert queue.still_holds(queue.next())
    wrote(queue, Replica(1, 2, 5))
    assert queue.next() == Due(Replica(1, 2, 5), start=0)


def test_what_the_standby_dropped_is_copied_from_the_first_token_but_no_sooner():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 3))
    assert queue.still_holds(queue.next())
    queue.dropped([1])
    assert queue.next() is None
    wrote(queue, Replica(1, 1, 5))
    whole = queue.next()
    assert queue.still_holds(whole)
    assert whole == Due(Replica(1, 1, 5), start=0)
    wrote(queue, Replica(1, 1, 7))
    assert queue.next() == Due(Replica(1, 1, 7), start=5)


def test_what_the_standby_had_nothing_to_go_on_from_for_is_due_at_once():
    queue = ReplicationQueue(block_size=4, interval=2)
    wrote(queue, Replica(1, 1, 2))
    assert queue.still_holds(queue.next())
    wrote(queue, Replica(1, 1, 4))
    assert queue.still_holds(queue.next())
    queue.lacking([1])
    assert queue.next() == Due(Replica(1, 1, 4), start=0)


def test_a_copy_that_was_given_up_starts_from_the_first_token():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 3))
    copied = queue.next()
    assert queue.still_holds(copied)
    queue.not_sent(copied.replica)
    wrote(queue, Replica(1, 1, 5))
    assert queue.next() == Due(Replica(1, 1, 5), start=0)
