"""Which block is copied next, and when a finished copy must not be sent."""

import pytest

from kevlarflow.recovery.coverage import Replica, Worth
from kevlarflow.recovery.use import NO_CHANGE, Use
from kevlarflow.replication.queue import Due, ReplicationQueue


def wrote(queue, *replicas):
    queue.begin(replicas, NO_CHANGE)
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
    assert queue.finish(queue.next())
    assert not wrote(queue, Replica(1, 1, 5))
    assert wrote(queue, Replica(1, 1, 6))


def test_without_an_interval_only_full_blocks_are_copied():
    queue = ReplicationQueue(block_size=8, interval=0)
    assert not wrote(queue, Replica(1, 1, 7))


def test_a_block_that_was_given_away_during_the_copy_is_not_sent():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4))
    copied = queue.next()
    queue.begin([Replica(1, 2, 1)], NO_CHANGE)
    assert not queue.finish(copied)


def test_a_block_that_grew_during_the_copy_is_sent_as_what_it_was():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 2))
    copied = queue.next()
    queue.begin([Replica(1, 1, 3)], NO_CHANGE)
    assert queue.finish(copied)


def test_a_new_standby_gets_everything_again():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4), Replica(2, 1, 4))
    for _ in range(2):
        queue.finish(queue.next())
    assert queue.next() is None
    queue.restart()
    assert [queue.next().replica, queue.next().replica] == [Replica(1, 1, 4), Replica(2, 1, 4)]


@pytest.mark.parametrize("interval", [0, 4])
def test_a_lane_that_is_about_to_move_is_copied_token_by_token_until_it_has_moved(interval):
    queue = ReplicationQueue(block_size=8, interval=interval)
    assert not wrote(queue, Replica(1, 1, 2))
    assert queue.hasten()
    assert queue.finish(queue.next())
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


def test_a_block_whose_content_came_and_went_during_the_copy_is_copied_once_more():
    """The lane is formed anew: block 1 first gets back what a step in flight has overwritten, then that step runs."""
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 2, 4))
    copied = queue.next()
    queue.hold(())
    queue.hold([Replica(2, 1, 4)])
    assert wrote(queue, Replica(1, 2, 4))
    assert queue.finish(copied) is None
    assert {queue.next().replica, queue.next().replica} == {Replica(1, 2, 4), Replica(2, 1, 4)}


def test_what_the_standby_has_is_not_sent_again_after_a_re_forming():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4))
    queue.finish(queue.next())
    assert not queue.hold([Replica(1, 1, 4)])


def test_a_copy_that_could_not_be_sent_is_due_again():
    queue = ReplicationQueue(block_size=4, interval=0)
    wrote(queue, Replica(1, 1, 4))
    copied = queue.next()
    assert queue.finish(copied)
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
    assert queue.finish(queue.next())
    wrote(queue, Replica(1, 1, 5))
    assert queue.next() == Due(Replica(1, 1, 5), start=3)


def test_another_content_of_the_block_is_copied_from_its_first_token():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 3))
    assert queue.finish(queue.next())
    wrote(queue, Replica(1, 2, 5))
    assert queue.next() == Due(Replica(1, 2, 5), start=0)


def test_what_the_standby_dropped_is_copied_from_the_first_token_but_no_sooner():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 3))
    assert queue.finish(queue.next())
    queue.dropped([(1, 1)])
    assert queue.next() is None
    wrote(queue, Replica(1, 1, 5))
    whole = queue.next()
    assert queue.finish(whole)
    assert whole == Due(Replica(1, 1, 5), start=0)
    wrote(queue, Replica(1, 1, 7))
    assert queue.next() == Due(Replica(1, 1, 7), start=5)


def test_what_the_standby_had_nothing_to_go_on_from_for_is_due_at_once():
    queue = ReplicationQueue(block_size=4, interval=2)
    wrote(queue, Replica(1, 1, 2))
    assert queue.finish(queue.next())
    wrote(queue, Replica(1, 1, 4))
    assert queue.finish(queue.next())
    queue.lacking([1])
    assert queue.next() == Due(Replica(1, 1, 4), start=0)


def test_a_copy_that_was_given_up_starts_from_the_first_token():
    queue = ReplicationQueue(block_size=8, interval=2)
    wrote(queue, Replica(1, 1, 3))
    copied = queue.next()
    assert queue.finish(copied)
    queue.not_sent(copied.replica)
    wrote(queue, Replica(1, 1, 5))
    assert queue.next() == Due(Replica(1, 1, 5), start=0)


def copied(queue, *replicas):
    """These were written, copied and sent."""
    wrote(queue, *replicas)
    return [queue.finish(queue.next()) for _ in replicas]


def told(queue, limit=10):
    revalued = queue.revalued(limit)
    queue.told(revalued)
    return revalued


def test_a_copy_is_worth_most_while_a_request_holds_the_block():
    queue = ReplicationQueue(block_size=4, interval=1)
    assert [each.worth for each in copied(queue, Replica(1, 1, 4))] == [Worth.REQUEST]
    assert told(queue) == []


def test_what_is_released_after_it_was_copied_is_told_once():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, Replica(1, 1, 4), Replica(2, 1, 3))
    queue.begin((), Use(released=(1, 2, 3)))
    assert told(queue) == [(1, 1, Worth.PREFIX), (2, 1, Worth.NOBODY)]
    assert told(queue) == []


def test_what_could_not_be_told_is_told_later():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, Replica(1, 1, 4))
    queue.begin((), Use(released=(1,)))
    assert queue.revalued(10) == queue.revalued(10) == [(1, 1, Worth.PREFIX)]


def test_a_prefix_that_is_hit_again_is_told_as_well():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, Replica(1, 1, 4))
    queue.begin((), Use(released=(1,)))
    told(queue)
    queue.begin((), Use(taken=(1,)))
    assert told(queue) == [(1, 1, Worth.REQUEST)]


def test_a_prefix_that_is_hit_before_anybody_was_told_is_no_news():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, Replica(1, 1, 4))
    queue.begin((), Use(released=(1,)))
    queue.begin((), Use(taken=(1,)))
    assert told(queue) == []


def test_a_block_that_is_released_before_its_copy_says_so_itself():
    queue = ReplicationQueue(block_size=4, interval=1)
    wrote(queue, Replica(1, 1, 4))
    due = queue.next()
    queue.begin((), Use(released=(1,)))
    assert queue.finish(due).worth is Worth.PREFIX
    assert told(queue) == []


def test_a_partly_filled_block_that_nobody_holds_is_not_copied():
    queue = ReplicationQueue(block_size=4, interval=1)
    wrote(queue, Replica(1, 1, 3), Replica(2, 1, 4))
    queue.begin((), Use(released=(1, 2)))
    assert queue.next().replica == Replica(2, 1, 4)
    assert queue.next() is None


def test_a_partly_filled_block_that_somebody_holds_again_is_copied():
    queue = ReplicationQueue(block_size=4, interval=1)
    queue.begin([Replica(1, 1, 3)], NO_CHANGE)
    queue.begin((), Use(released=(1,)))
    assert not queue.end([Replica(1, 1, 3)])
    queue.begin((), Use(taken=(1,)))
    assert queue.next().replica == Replica(1, 1, 3)


def test_an_answer_costs_no_look_at_all_blocks():
    queue = ReplicationQueue(block_size=4, interval=1)
    wrote(queue, *(Replica(block, 1, 4) for block in range(50)))
    asked = []
    queue._is_due = lambda replica: asked.append(replica.block)
    queue.lacking([])
    queue.lacking([7])
    assert asked == [7]


def test_nothing_is_told_of_what_was_given_away_or_dropped_or_never_copied():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, Replica(1, 1, 4), Replica(2, 1, 4))
    wrote(queue, Replica(3, 1, 4))
    queue.begin((), Use(released=(1, 2, 3)))
    queue.begin([Replica(1, 2, 1)], Use(taken=(1,)))
    queue.dropped([(2, 1)])
    assert told(queue) == []


def test_few_are_told_at_a_time_and_all_in_the_end():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, *(Replica(block, 1, 4) for block in range(5)))
    queue.begin((), Use(released=tuple(range(5)), taken=(9,)))
    found = [block for _ in range(6) for block, _, _ in told(queue, limit=2)]
    assert sorted(found) == list(range(5))


def test_after_a_re_forming_the_standby_hears_what_has_changed():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, Replica(1, 1, 4), Replica(2, 1, 4))
    queue.begin((), Use(released=(2,)))
    told(queue)
    queue.hold([Replica(1, 1, 4, worth=Worth.PREFIX), Replica(2, 1, 4)])
    assert sorted(told(queue)) == [(1, 1, Worth.PREFIX), (2, 1, Worth.REQUEST)]


def test_a_new_standby_is_told_with_the_copies():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, Replica(1, 1, 4))
    queue.begin((), Use(released=(1,)))
    queue.restart()
    assert queue.finish(queue.next()).worth is Worth.PREFIX
    assert told(queue) == []


def test_after_a_re_forming_the_standby_hears_of_what_nobody_holds_any_more():
    queue = ReplicationQueue(block_size=4, interval=1)
    copied(queue, Replica(1, 1, 4), Replica(2, 1, 4), Replica(3, 1, 4))
    queue.hold([Replica(1, 1, 4)])
    wrote(queue, Replica(3, 2, 1))
    assert told(queue) == [(2, 1, Worth.NOBODY)], "block 3 will be copied again"
    assert told(queue) == []


def test_a_drop_of_an_older_content_is_not_taken_for_one_of_the_newer():
    queue = ReplicationQueue(block_size=4, interval=1)
    for generation in (1, 2):
        copied(queue, Replica(1, generation, 4))
    queue.dropped([(1, 1)])
    queue.begin((), Use(released=(1,)))
    assert told(queue) == [(1, 2, Worth.PREFIX)]


# ---- full blocks that the standby had no room for


def full_and_dropped(*blocks):
    queue = ReplicationQueue(4, 0)
    replicas = [Replica(block, 1, 4, depth) for depth, block in enumerate(blocks)]
    queue.begin(replicas, Use(blocks, ()))
    queue.end(replicas)
    while (due := queue.next()) is not None:
        queue.finish(due)
    queue.dropped([(block, 1) for block in blocks])
    return queue


def due_now(queue):
    found = []
    while (due := queue.next()) is not None:
        assert due.start == 0
        queue.finish(due)
        found.append(due.replica.block)
    return found


def test_as_many_as_requests_let_go_of_are_tried_again():
    queue = full_and_dropped(1, 2, 3)
    assert due_now(queue) == []
    queue.begin([], Use((), (3, 9)))
    assert due_now(queue) == [1, 2]
    assert due_now(queue) == []


def test_one_that_a_request_hits_is_tried_again():
    queue = full_and_dropped(1, 2)
    queue.begin([], Use((2,), ()))
    assert due_now(queue) == [2]


@pytest.mark.parametrize("occasion", ["hasten", "hold"])
def test_all_are_tried_again_when_the_lane_moves_or_was_formed_anew(occasion):
    queue = full_and_dropped(1, 2)
    if occasion == "hasten":
        queue.hasten()
    else:
        queue.hold([Replica(1, 1, 4, 0), Replica(2, 1, 4, 1)])
    assert due_now(queue) == [1, 2]


def test_what_was_given_to_another_request_is_not():
    queue = full_and_dropped(1, 2)
    queue.begin([Replica(1, 2, 2)], Use((1,), (1,)))
    assert due_now(queue) == [2]


def test_one_that_is_hit_while_another_is_let_go_of_is_tried_again_once():
    queue = full_and_dropped(1, 2)
    queue.begin([], Use((), (1,)))
    assert due_now(queue) == [2]
    queue.begin([], Use((1,), (2,)))
    assert due_now(queue) == [1]
