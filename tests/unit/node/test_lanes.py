"""Lanes: what may run next, and what an epoch fences off."""

from kevlarflow.node.lanes import Lanes, Work
from kevlarflow.recovery.coverage import Replica
from kevlarflow.replication.queue import ReplicationQueue
from kevlarflow.replication.source import LaneReplication
from kevlarflow.wire.steps import Execute, Place, PlaceRest, Recompute, Restore


class Runner:
    """Counts how often a lane was emptied."""

    def __init__(self):
        self.resets = 0

    def reset(self):
        self.resets += 1

    def use_blocks(self, table):
        self.table = table


def lanes(first_stage=False, runners=2):
    return Lanes([Runner() for _ in range(runners)], 9, is_first_stage=first_stage)


def execute(sequence, pipeline=0, epoch=1, has_tokens=True):
    return Work(b"engine", Execute(pipeline, epoch, sequence, has_tokens, ()), [b"step %d" % sequence])


def test_a_lane_opens_with_a_free_runner_and_forgets_its_requests():
    table = lanes()
    lane = table.open(0, 1)
    assert lane.runner.resets == 1
    assert table.open(1, 1).runner is not lane.runner
    assert table.open(2, 1) is None, "there is no third runner"


def test_an_old_epoch_does_not_open_a_lane():
    table = lanes()
    table.open(0, 2)
    assert table.open(0, 2) is None
    assert table.open(0, 1) is None


def test_opened_again_it_keeps_its_runner_and_drops_its_work():
    table = lanes(first_stage=True)
    lane = table.open(0, 1)
    table.add_work(execute(1))
    assert table.open(0, 2) is lane
    assert table.next_work() is None


def test_a_lane_that_was_left_frees_its_runner_and_its_epoch_stays_used():
    table = lanes(runners=1)
    lane = table.open(0, 3)
    assert table.leave(0, 3) is not None
    assert table.open(0, 3) is None
    assert table.open(1, 1).runner is lane.runner


def test_a_lane_that_was_left_before_the_order_to_open_it_came_stays_closed():
    table = lanes()
    assert table.leave(0, 3) is None
    assert table.open(0, 2) is None
    assert table.open(0, 4) is not None


def test_leaving_under_an_old_epoch_does_nothing():
    table = lanes()
    table.open(0, 3)
    assert table.leave(0, 2) is None


def test_work_of_another_epoch_is_refused():
    table = lanes(first_stage=True)
    table.open(0, 2)
    assert not table.add_work(execute(1, epoch=1))
    assert not table.add_work(execute(1, epoch=3))
    assert not table.add_work(execute(1, pipeline=7))


def test_a_step_waits_for_its_activations():
    table = lanes()
    table.open(0, 1)
    table.add_work(execute(1))
    assert table.next_work() is None
    table.add_activations(0, 1, 1, {"hidden": "x"})
    _, work, activations = table.next_work()
    assert (work.header.sequence, activations) == (1, {"hidden": "x"})


def test_the_first_stage_and_a_step_without_tokens_wait_for_nothing():
    first = lanes(first_stage=True)
    first.open(0, 1)
    first.add_work(execute(1))
    assert first.next_work() is not None
    second = lanes()
    second.open(0, 1)
    for work in (
        execute(1, has_tokens=False),
        Work(b"", Restore(0, 1), []),
        Work(b"", PlaceRest(0, 1), []),
    ):
        second.add_work(work)
        assert second.next_work() is not None


def test_work_stays_in_order_within_a_lane():
    table = lanes()
    table.open(0, 1)
    table.add_work(Work(b"", Recompute(0, 1, -1, 1, 0), []))
    table.add_work(execute(2))
    table.add_activations(0, 1, 2, {})
    assert table.next_work() is None, "the chunk before it still waits"


def test_lanes_take_turns():
    table = lanes(first_stage=True)
    for pipeline in (0, 1):
        table.open(pipeline, 1)
        for sequence in (1, 2):
            table.add_work(execute(sequence, pipeline))
    order = []
    while (ready := table.next_work()) is not None:
        order.append(ready[0].pipeline)
    assert order == [0, 1, 0, 1]


def test_what_a_recovery_waits_for_goes_first_and_costs_no_turn():
    table = lanes(first_stage=True)
    own, borrowed = table.open(0, 1), table.open(1, 1)
    for sequence in (1, 2):
        table.add_work(execute(sequence))
    table.add_work(Work(b"", Place(1, 1), []))
    assert table.next_work()[0] is borrowed
    assert table.next_work()[0] is own
    table.add_work(Work(b"", Restore(1, 1), []))
    table.add_work(execute(1, pipeline=1))
    order = [table.next_work() for _ in range(3)]
    assert [(lane.pipeline, type(work.header)) for lane, work, _ in order] == [
        (1, Restore), (1, Execute), (0, Execute),
    ]  # fmt: skip


def test_what_is_put_in_place_ahead_of_a_move_has_no_hurry():
    table = lanes(first_stage=True)
    table.open(0, 1)
    table.open(1, 1)
    table.add_work(execute(1, pipeline=1))
    table.next_work()
    table.add_work(execute(1))
    table.add_work(Work(b"", Place(1, 1, ahead=True), []))
    assert table.next_work()[0].pipeline == 0


def test_activations_may_arrive_before_their_epoch_and_old_ones_are_dropped():
    table = lanes()
    table.open(0, 1)
    assert table.add_activations(0, 2, 5, {"early": True})
    table.open(0, 2)
    assert not table.add_activations(0, 1, 6, {})
    table.add_work(execute(5, epoch=2))
    assert table.next_work()[2] == {"early": True}


def test_activations_of_a_lane_that_was_left_before_it_was_opened_are_dropped():
    table = lanes()
    assert table.add_activations(0, 1, 7, {})
    assert table.add_activations(1, 1, 7, {})
    table.leave(0, 2)
    assert set(table._activations) == {(1, 1, 7)}


def test_a_broken_lane_takes_no_work_until_it_is_opened_again():
    table = lanes(first_stage=True)
    lane = table.open(0, 1)
    table.add_work(execute(1))
    table.fail(lane)
    assert table.next_work() is None
    assert not table.add_work(execute(2))
    table.open(0, 2)
    assert table.add_work(execute(3, epoch=2))


def test_a_lane_works_once_it_has_its_blocks():
    table = lanes(first_stage=True)
    own, guest = table.open(0, 1), table.open(1, 1)
    table.share(own, None)
    table.share(guest, frozenset({1, 2, 3, 4}))
    table.add_work(execute(1, pipeline=1))
    assert table.next_work() is None, "the other lane has all blocks"
    table.share(own, frozenset({5, 6, 7, 8}))
    assert table.next_work()[0] is guest
    assert guest.runner.table == [0, 4, 3, 2, 1, 0, 0, 0, 0]


def test_a_copy_that_is_under_way_when_a_lane_is_left_is_not_believed():
    table = lanes()
    lane = table.open(0, 1)
    table.share(lane, None)
    lane.replication = LaneReplication(0, lane.blocks.table, ReplicationQueue(4, 0))
    lane.replication.queue.end([Replica(3, 1, 4)])
    copied = lane.replication.queue.next()
    table.leave(0, 2)
    assert lane.blocks.table[3] == 0, "it is anybody's"
    assert not lane.replication.queue.finish(copied)


def test_a_lane_hears_only_the_connection_that_opened_it():
    table = lanes(first_stage=True)
    lane = table.open(0, 1)
    lane.engine = b"engine"
    assert not table.loses_touch(0, 1, b"engine")
    assert table.add_work(execute(1))
    # The connection broke and was made anew: what was on its way in it may be lost.
    assert not table.loses_touch(0, 2, b"anew"), "that is not of this lane's epoch"
    assert table.loses_touch(0, 1, b"anew")
    assert table.next_work() is None
    assert not table.add_work(execute(3)), "a step between these may be missing"
    table.open(0, 2)
    lane.engine = b"anew"
    assert not table.loses_touch(0, 2, b"anew")
    assert table.add_work(execute(3, epoch=2))
