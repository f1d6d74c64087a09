"""The block map: who has which physical block, and that no two lanes ever have the same."""

import random

import pytest

from kevlarflow.errors import ProtocolViolation
from kevlarflow.node.block_map import NONE, BlockMap, physical


def test_a_lane_alone_has_every_block_at_its_own_place():
    blocks = BlockMap(5)
    lane = blocks.add()
    blocks.share(lane, None)
    assert lane.table == [NONE, 1, 2, 3, 4]


def test_what_a_lane_keeps_stays_where_it_is():
    blocks = BlockMap(9)
    lane, guest = blocks.add(), blocks.add()
    blocks.share(lane, None)
    blocks.share(lane, frozenset({2, 3, 7, 8}))
    blocks.share(guest, frozenset({1, 2, 3, 4}))
    assert lane.table == [NONE, NONE, 2, 3, NONE, NONE, NONE, 7, 8]
    assert guest.missing == []
    assert {guest.table[block] for block in (1, 2, 3, 4)} == {1, 4, 5, 6}
    blocks.remove(guest)
    blocks.share(lane, None)
    assert (lane.table[2], lane.table[7]) == (2, 7)
    assert sorted(lane.table) == list(range(9))


def test_of_what_comes_to_a_lane_some_blocks_come_first():
    """They get the last physical blocks, in one row, however many others there are and whenever room is made."""
    blocks = BlockMap(13)
    lane, guest = blocks.add(), blocks.add()
    blocks.share(lane, None)
    blocks.share(guest, frozenset({1, 2, 3, 4, 7, 9}), first={2, 7, 9, 11})
    blocks.share(lane, frozenset({1, 2, 3, 4, 5, 6}))
    assert [guest.table[block] for block in (2, 7, 9)] == [12, 11, 10]
    assert {guest.table[block] for block in (1, 3, 4)} == {7, 8, 9}
    assert guest.table[11] == NONE


def test_who_comes_too_early_waits_and_is_served_in_full():
    blocks = BlockMap(5)
    lane, guest = blocks.add(), blocks.add()
    blocks.share(lane, None)
    blocks.share(guest, frozenset({1, 2}))
    assert guest.missing == [1, 2]
    blocks.share(lane, frozenset({1, 2, 3}))
    assert guest.missing == [1, 2], "one block is not enough"
    blocks.share(lane, frozenset({1, 2}))
    assert guest.missing == []
    assert {guest.table[1], guest.table[2]} == {3, 4}


def test_no_physical_block_is_ever_given_twice():
    rng = random.Random(1)
    blocks = BlockMap(33)
    lanes = []
    for _ in range(2_000):
        if len(lanes) < 3 and rng.random() < 0.2:
            lanes.append(blocks.add())
        elif lanes and rng.random() < 0.1:
            blocks.remove(lanes.pop(rng.randrange(len(lanes))))
        elif lanes:
            usable = frozenset(rng.sample(range(1, 33), rng.randint(0, 32)))
            blocks.share(rng.choice(lanes), rng.choice([usable, None]))
        held = [physical for lane in lanes for physical in lane.table if physical != NONE]
        assert len(held) == len(set(held))
        assert all(lane.table[NONE] == NONE for lane in lanes)


def test_a_block_that_a_lane_does_not_have_is_never_another_ones():
    table = [0, 7, 0, 5]
    assert physical([0, 3, 1], table) == [0, 5, 7]
    with pytest.raises(ProtocolViolation, match=r"blocks \[2\] are none of this lane's"):
        physical([1, 2], table)
