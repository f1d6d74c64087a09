"""Nodes that load and then die by themselves, again and again: each time the lane comes home it costs a pause."""

from __future__ import annotations

import pytest

from cluster_driver import Driver, lines, member
from kevlarflow.recovery import events
from kevlarflow.recovery.events import StartNode
from kevlarflow.recovery.nodes import EARLY_SECONDS, GIVES_WAY_SECONDS

NODE = "node-0-1"


def next_start(driver, incarnation, within=200.0):
    """Let the donor take over, and wait for the next member to be started; returns how long that took."""
    begun = driver.now
    while driver.now - begun < within:
        for pipeline in driver.cluster.pipelines:
            if pipeline.forming:
                driver.formed(pipeline.id, pipeline.epoch)
        slot = driver.cluster.slots[NODE]
        if slot.incarnation == incarnation and slot.start_at is None:
            return driver.now - begun
        driver.tick(0.1)
    raise AssertionError(f"no {NODE}#{incarnation} within {within} s")


def live_and_die(driver, incarnation, seconds, *, from_outside=False):
    """A member gets ready, takes its lane, and dies so long after."""
    if incarnation > 1:
        driver.ready(NODE, incarnation)
    for pipeline in driver.cluster.pipelines:
        if pipeline.forming:
            driver.formed(pipeline.id, pipeline.epoch)
    driver.now += seconds
    return driver.do(events.NodeExited(member(NODE, incarnation), driver.now, from_outside=from_outside))


def test_the_third_early_death_in_a_row_and_each_further_one_is_replaced_later():
    driver = Driver().serve()
    said, waited = [], []
    for incarnation in range(1, 9):
        said += lines(live_and_die(driver, incarnation, 0.5))
        waited.append(next_start(driver, incarnation + 1))
    assert max(waited[:2]) <= GIVES_WAY_SECONDS
    assert [round(each) for each in waited[2:]] == [2, 4, 8, 16, 32, 60]
    assert sum("it is started again in" in line for line in said) == 6


@pytest.mark.parametrize(("seconds", "from_outside"), [(EARLY_SECONDS + 1, False), (0.5, True)])
def test_who_lived_for_long_or_was_killed_by_somebody_is_replaced_at_once(seconds, from_outside):
    driver = Driver().serve()
    for incarnation in range(1, 7):
        live_and_die(driver, incarnation, seconds, from_outside=from_outside)
        assert next_start(driver, incarnation + 1) <= GIVES_WAY_SECONDS


def test_a_long_life_makes_good_for_early_deaths():
    driver = Driver().serve()
    for incarnation in (1, 2, 3):
        live_and_die(driver, incarnation, 0.5)
        next_start(driver, incarnation + 1)
    live_and_die(driver, 4, EARLY_SECONDS + 1)
    assert next_start(driver, 5) <= GIVES_WAY_SECONDS


def test_a_stage_that_has_no_other_node_is_never_kept_waiting():
    driver = Driver(pipelines=1).serve()
    for incarnation in range(1, 7):
        live_and_die(driver, incarnation, 0.5)
        assert next_start(driver, incarnation + 1) <= GIVES_WAY_SECONDS


def test_one_that_is_kept_waiting_is_started_when_the_other_node_of_its_stage_dies():
    driver = Driver().serve()
    for incarnation in range(1, 7):
        live_and_die(driver, incarnation, 0.5)
        if incarnation < 6:
            next_start(driver, incarnation + 1)
    assert not any(isinstance(command, StartNode) for command in driver.tick(2.0))
    driver.exited("node-1-1")
    assert next_start(driver, 7) <= GIVES_WAY_SECONDS


def test_one_that_does_not_start_any_more_is_tried_later_and_later_all_the_same():
    driver = Driver(pipelines=1).serve()
    for incarnation in (1, 2, 3):
        live_and_die(driver, incarnation, 0.5)
        next_start(driver, incarnation + 1)
    for incarnation, pause in ((4, 0.5), (5, 1.0), (6, 2.0)):
        driver.do(events.NodeFailed(member(NODE, incarnation), "no memory"))
        assert next_start(driver, incarnation + 1) == pytest.approx(pause, abs=0.15)


def test_somebody_who_kills_one_that_has_died_early_before_does_not_keep_it_away():
    driver = Driver().serve()
    for incarnation in (1, 2, 3):
        live_and_die(driver, incarnation, 0.5)
        next_start(driver, incarnation + 1)
    said = lines(live_and_die(driver, 4, 0.5, from_outside=True))
    assert not any("by itself" in line for line in said)
    assert next_start(driver, 5) <= GIVES_WAY_SECONDS
