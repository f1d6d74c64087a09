"""Replicas as values: the same content is the same replica, whatever it is worth."""

from __future__ import annotations

import operator

import pytest

from kevlarflow.recovery.coverage import Replica, Worth


def test_replicas_of_the_same_content_are_equal_and_not_different():
    one, same = Replica(1, 2, 3, depth=4), Replica(1, 2, 3, depth=5, worth=Worth.PREFIX)
    assert one == same
    assert not operator.ne(one, same)
    assert hash(one) == hash(same)


@pytest.mark.parametrize("other", [Replica(9, 2, 3), Replica(1, 9, 3), Replica(1, 2, 9), (1, 2, 3)])
def test_replicas_of_other_content_are_different(other):
    assert Replica(1, 2, 3) != other
    assert not operator.eq(Replica(1, 2, 3), other)
