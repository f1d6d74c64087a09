"""Slowness is a matter of comparison: with the same work, at the same time, for long."""

from __future__ import annotations

import msgspec
import pytest

from cluster_driver import member
from kevlarflow.config import PACE_REPORTS
from kevlarflow.recovery.pace import Paces
from kevlarflow.types import Pace, Stage
from toy_world import make_config

STEP_SECONDS = 0.02
CONFIG = make_config(2, 3)
ENOUGH = CONFIG.timeouts.slow_after_ms // CONFIG.timeouts.pace_interval_ms
FIRST_COMPARISON = 4
"""The report with which a node can be compared: three of its peers, who report after it, have come before."""


def steps(factor: float = 1.0, requests: int = 4, context: int = 11, count: int = 10) -> Pace:
    return Pace(requests, context, count, factor * STEP_SECONDS * count)


class World:
    """Nodes that all report once a second."""

    def __init__(self, ratio: float = 3.0) -> None:
        self.paces = Paces(msgspec.structs.replace(CONFIG, slow_ratio=ratio))
        self.now = 100.0

    def second(self, **reports: list[Pace]) -> dict[str, float]:
        """Whom the reports of one second show as slow, and by how much; `n01` is node-0-1."""
        self.now += CONFIG.timeouts.pace_interval_ms / 1_000
        found = {}
        for name, report in reports.items():
            node = member(f"node-{name[1]}-{name[2]}")
            for slow in self.paces.hear(node, Stage(int(name[2])), report, self.now):
                assert slow.member == node
                found[name] = slow.ratio
        return found

    def seconds(self, count: int, **reports: list[Pace]) -> list[dict[str, float]]:
        return [self.second(**reports) for _ in range(count)]

    def never(self, count: int, **reports: list[Pace]) -> bool:
        return not any(self.seconds(count, **reports))


def test_a_node_is_slow_after_it_has_been_for_long_and_as_long_as_it_is():
    world = World()
    found = world.seconds(FIRST_COMPARISON + ENOUGH + 1, n01=[steps(5)], n11=[steps()], n21=[steps(1.2)])
    slow_from = FIRST_COMPARISON + ENOUGH - 2
    assert not any(found[:slow_from])
    assert [list(each) for each in found[slow_from:]] == [["n01"]] * 3
    assert found[-1]["n01"] == pytest.approx(5 / 1)


def test_two_nodes_are_enough_to_compare():
    world = World()
    assert world.seconds(30, n01=[steps(4)], n11=[steps()])[-1] == {"n01": pytest.approx(4)}


def test_of_three_nodes_two_may_be_slow():
    world = World()
    assert set(world.seconds(30, n01=[steps(5)], n11=[steps()], n21=[steps(5)])[-1]) == {"n01", "n21"}


@pytest.mark.parametrize(
    "reports",
    [
        pytest.param({"n01": [steps(2.9)], "n11": [steps()]}, id="less than the limit"),
        pytest.param({"n01": [steps(5)], "n11": [steps(5)]}, id="all together"),
        pytest.param({"n01": [steps(5)], "n00": [steps()]}, id="than another stage"),
        pytest.param({"n01": [steps(5)]}, id="without a peer"),
        pytest.param({"n01": [steps(5)], "n11": []}, id="than an idle one"),
        pytest.param({"n01": [steps(5, requests=5)], "n11": [steps(requests=2)]}, id="with more requests"),
        pytest.param({"n01": [steps(5, context=14)], "n11": [steps(context=11)]}, id="with longer contexts"),
        pytest.param({"n01": [steps(1, count=40)], "n11": [steps(1, count=4)]}, id="in all, with two lanes"),
    ],
)
def test_who_is_not_slow(reports):
    assert World().never(40, **reports)


def test_more_work_of_a_peer_is_as_good_as_the_same():
    for bigger in (steps(1, requests=6), steps(1, context=13)):
        assert World().seconds(30, n01=[steps(5)], n11=[bigger])[-1] == {"n01": pytest.approx(5)}


def test_less_work_of_a_peer_is_scaled_up():
    for smaller in (steps(1, requests=3), steps(1, context=10), steps(1, requests=3, context=10)):
        assert World().seconds(30, n01=[steps(7)], n11=[smaller])[-1] == {"n01": pytest.approx(3.5)}
        assert World().never(30, n01=[steps(5)], n11=[smaller])


def test_the_tightest_bound_counts():
    peer = [steps(1, requests=2), steps(1.5, requests=3), steps(2, requests=6)]
    assert World().seconds(30, n01=[steps(7)], n11=peer)[-1] == {"n01": pytest.approx(3.5)}


def test_too_few_steps_say_nothing():
    world = World()
    for _ in range(20):
        assert world.never(1, n01=[steps(9, count=1)], n11=[steps()])
        assert world.never(1, n01=[], n11=[steps()])


def test_one_odd_second_says_nothing():
    world = World()
    for _ in range(10):
        assert world.never(1, n01=[steps(500)], n11=[steps()])
        assert world.never(2, n01=[steps(1)], n11=[steps()])


def test_a_pause_within_a_slow_time_changes_nothing():
    world = World()
    world.seconds(ENOUGH, n01=[steps(5)], n11=[steps()])
    world.seconds(PACE_REPORTS - 1, n01=[], n11=[])
    assert world.seconds(4, n01=[steps(5)], n11=[steps()])[-1]


def test_a_ratio_that_wavers_about_the_limit_adds_up_and_one_that_falls_begins_again():
    world = World()
    reports = [{"n01": [steps(factor)], "n11": [steps()]} for factor in (3.2, 3.2, 3.2, 2.7, 2.7, 2.7) * 10]
    assert any(world.second(**each) for each in reports)
    world = World()
    reports = [{"n01": [steps(factor)], "n11": [steps()]} for factor in (3.2, 3.2, 3.2, 1.5, 1.5, 1.5) * 10]
    assert not any(world.second(**each) for each in reports)


def test_what_a_node_did_long_ago_is_not_compared():
    world = World()
    world.seconds(PACE_REPORTS, n01=[], n11=[steps()])
    assert world.never(40, n01=[steps(5)])


def test_a_machine_that_becomes_slow_makes_no_node_slow():
    world = World()
    assert world.never(20, n01=[steps()], n11=[steps()])
    assert world.never(20, n01=[steps(6)], n11=[steps(5)])


def test_who_is_gone_is_no_peer():
    world = World()
    world.seconds(PACE_REPORTS, n01=[steps(5)], n11=[steps()])
    world.paces.forget(member("node-1-1"))
    assert world.never(40, n01=[steps(5)])


def test_with_a_ratio_of_zero_nobody_is_slow():
    assert World(ratio=0).never(40, n01=[steps(50)], n11=[steps()])
