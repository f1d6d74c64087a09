"""What a killed node leaves in the run folder goes with its successor."""

import pytest

from kevlarflow.node.sockets import Sockets, remove_of_former_lives
from kevlarflow.types import Member, NodeId
from kevlarflow.wire import flight_record


@pytest.fixture
def sockets(tmp_path):
    def made(node, incarnation):
        member = Member(NodeId(node), incarnation)
        paths = [*Sockets.of(tmp_path, member), flight_record.path_of(tmp_path, member)]
        for path in paths:
            path.touch()
        return paths

    return made


def there(*lives):
    assert all(len({path.exists() for path in life}) == 1 for life in lives), "all of it or nothing"
    return [life[0].exists() for life in lives]


def test_a_new_life_removes_what_all_lives_before_it_left(tmp_path, sockets):
    first, second, third = (sockets("node-0-1", number) for number in (1, 2, 10))
    remove_of_former_lives(tmp_path, Member(NodeId("node-0-1"), 10))
    assert there(first, second, third) == [False, False, True]


def test_nobody_elses_are_touched(tmp_path, sockets):
    later, other, longer = sockets("node-0-1", 3), sockets("node-0-2", 1), sockets("node-0-11", 1)
    remove_of_former_lives(tmp_path, Member(NodeId("node-0-1"), 2))
    assert there(later, other, longer) == [True, True, True]
