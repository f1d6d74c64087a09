"""Silence, standstill, deafness, and what excuses them."""

from __future__ import annotations

import pytest

from kevlarflow.config import Timeouts
from kevlarflow.recovery.detector import UNKNOWN_STARVATION_FACTOR, Beat, Detector
from kevlarflow.recovery.events import NodeCleared, NodeSilent, NodeSuspected
from kevlarflow.types import Member, NodeId, PipelineId

A = Member(NodeId("node-0-0"), 1)
B = Member(NodeId("node-0-1"), 1)
P = PipelineId(0)
TIMEOUTS = Timeouts(heartbeat_interval_ms=100, suspect_after_ms=1_000, confirm_after_ms=3_000, deaf_after_ms=5_000)


class World:
    """Both members form pipeline 0; nobody waits for a CPU unless a test says so."""

    def __init__(self) -> None:
        self.starved: dict[Member, float] | None = {A: 0.0, B: 0.0}

    def starved_seconds(self, member):
        return self.starved.get(member, 0.0) if self.starved is not None else None

    def companions(self, member, pipeline):
        return [each for each in (A, B) if each != member]


class Watched:
    """A detector that watches both, and a clock."""

    def __init__(self) -> None:
        self.world = World()
        self.detector = Detector(TIMEOUTS, self.world)
        self.now = 0.0
        self.detector.watch(A, 0.0)
        self.detector.watch(B, 0.0)

    def until(self, end, *, a=None, b=Beat()):  # noqa: B008
        """Verdicts until `end`, if A and B beat like this all the time; None: not at all."""
        verdicts = []
        while self.now < end - 0.01:
            self.now += 0.05
            for member, beat in ((A, a), (B, b)):
                if beat is not None:
                    verdicts += self.detector.beat(member, self.now, beat)
            verdicts += self.detector.check(self.now)
        return verdicts


@pytest.fixture
def watched():
    return Watched()


def whom(verdicts):
    return [(type(each), each.member) for each in verdicts]


def test_silence_leads_to_suspicion_then_to_a_verdict_once(watched):
    assert watched.until(0.9) == []
    assert watched.until(2.9) == [NodeSuspected(A, 0.0)]
    assert watched.until(9.0) == [NodeSilent(A, 0.0, "did not answer")]


def test_a_suspect_that_beats_is_cleared(watched):
    assert watched.until(2.0) == [NodeSuspected(A, 0.0)]
    assert watched.until(2.1, a=Beat()) == [NodeCleared(A)]
    assert watched.until(3.0) == []


def test_a_verdict_is_final(watched):
    watched.until(4.0)
    assert watched.until(5.0, a=Beat()) == []


def test_a_pause_of_its_own_is_nobodys_silence(watched):
    watched.until(0.5, a=Beat())
    watched.now += 60.0
    assert watched.detector.check(watched.now) == []
    assert watched.until(watched.now + 0.8) == []
    assert whom(watched.until(watched.now + 1.0)) == [(NodeSuspected, A)]


def test_nor_does_anybody_count_as_stopped_meanwhile(watched):
    watched.until(0.5, a=Beat())
    watched.detector.stopped({A: 0.5}, watched.now)
    watched.detector.check(watched.now)
    watched.now += 60.0
    verdicts = []
    for _ in range(3):
        # The kernel says so again each time, and still since then.
        watched.detector.stopped({A: 0.5}, watched.now)
        verdicts += watched.detector.check(watched.now)
        watched.now += 0.02
    assert whom(verdicts) in ([(NodeSuspected, A)], [])


def test_strangers_and_the_forgotten_are_not_expected(watched):
    watched.detector.forget(A)
    assert watched.until(9.0) == []
    assert watched.detector.beat(A, 10.0) == []
    assert watched.detector.beat_at(A) == 0.0


def test_who_waits_for_a_cpu_is_not_silent(watched):
    watched.until(0.2)
    for _ in range(400):
        watched.world.starved[A] += 0.049
        assert watched.until(watched.now + 0.05) == []
    # Now it has a CPU, and is silent still.
    assert whom(watched.until(watched.now + 3.2)) == [(NodeSuspected, A), (NodeSilent, A)]


def test_where_waiting_is_not_known_silence_has_to_last_longer(watched):
    watched.world.starved = None
    assert watched.until(UNKNOWN_STARVATION_FACTOR * 1.0 - 0.1) == []
    assert whom(watched.until(UNKNOWN_STARVATION_FACTOR * 3.0 - 0.1)) == [(NodeSuspected, A)]
    assert whom(watched.until(UNKNOWN_STARVATION_FACTOR * 3.0 + 0.1)) == [(NodeSilent, A)]


def test_a_stopped_process_is_suspect_at_once_and_confirmed_soon(watched):
    watched.until(1.0, a=Beat())
    watched.detector.stopped({A: 1.0}, watched.now)
    assert watched.until(1.05) == [NodeSuspected(A, 1.0)]
    assert watched.until(1.25) == []
    assert watched.until(1.35) == [NodeSilent(A, 1.0, "was stopped", from_outside=True)]


def test_a_process_that_goes_on_soon_is_cleared(watched):
    watched.until(1.0, a=Beat())
    watched.detector.stopped({A: 1.0}, watched.now)
    assert watched.until(1.2) == [NodeSuspected(A, 1.0)]
    watched.detector.stopped({}, watched.now)
    assert watched.until(1.25, a=Beat()) == [NodeCleared(A)]


def test_a_process_that_is_stopped_while_it_loads_is_found_though_no_beat_is_expected(watched):
    loading = Member(NodeId("node-1-0"), 1)
    watched.until(5.0, a=Beat())
    watched.detector.stopped({loading: 5.0}, watched.now)
    verdicts = watched.until(5.4, a=Beat())
    assert verdicts == [NodeSuspected(loading, 5.0), NodeSilent(loading, 5.0, "was stopped", from_outside=True)]


def test_a_process_that_goes_on_loading_is_not_silent_before_it_is_ready(watched):
    loading = Member(NodeId("node-1-0"), 1)
    watched.until(1.0, a=Beat())
    watched.detector.stopped({loading: 1.0}, watched.now)
    watched.until(1.2, a=Beat())
    watched.detector.stopped({}, watched.now)
    assert whom(watched.until(60.0, a=Beat())) == [(NodeCleared, loading)]
    watched.detector.watch(loading, watched.now)
    assert whom(watched.until(64.0, a=Beat())) == [(NodeSuspected, loading), (NodeSilent, loading)]


def test_one_that_was_given_up_as_it_loaded_stays_so(watched):
    loading = Member(NodeId("node-1-0"), 1)
    watched.detector.stopped({loading: 0.0}, 0.0)
    watched.until(1.0, a=Beat())
    watched.detector.watch(loading, watched.now)
    watched.detector.stopped({}, watched.now)
    assert watched.detector.beat(loading, watched.now, Beat()) == []
    assert watched.until(9.0, a=Beat()) == []


STUCK = Beat(running_seconds=0.9, pipeline=P, is_overdue=True)


def test_a_step_that_is_overdue_while_its_peers_are_idle_is_a_hang(watched):
    watched.until(1.0, a=Beat())
    assert whom(watched.until(1.05, a=STUCK)) == [(NodeSuspected, A)]
    (verdict,) = watched.until(1.25, a=STUCK)
    assert verdict == NodeSilent(A, pytest.approx(watched.now - 0.9, abs=0.2), "was stuck in a step")


def test_a_step_that_is_overdue_while_a_peer_is_at_work_on_it_is_not(watched):
    assert watched.until(9.0, a=STUCK, b=Beat(running_seconds=0.1, pipeline=P)) == []


def test_a_thread_that_is_stuck_between_two_steps_waits_for_no_peer(watched):
    between = STUCK._replace(pipeline=None)
    assert whom(watched.until(0.05, a=between, b=Beat(running_seconds=0.1, pipeline=P))) == [(NodeSuspected, A)]
    (verdict,) = watched.until(0.25, a=between, b=Beat(running_seconds=0.1, pipeline=P))
    assert verdict == NodeSilent(A, pytest.approx(watched.now - 0.9, abs=0.2), "was stuck between two steps")


def test_of_peers_that_are_all_stuck_the_first_is_found_first_and_then_the_other(watched):
    later = STUCK._replace(running_seconds=0.5)
    assert whom(watched.until(1.0, a=STUCK, b=later)) == [(NodeSuspected, A), (NodeSilent, A)]
    watched.detector.forget(A)
    assert whom(watched.until(2.0, b=later)) == [(NodeSuspected, B), (NodeSilent, B)]


def test_a_peer_that_works_for_another_pipeline_explains_nothing(watched):
    other = Beat(running_seconds=0.1, pipeline=PipelineId(1))
    assert whom(watched.until(0.5, a=STUCK, b=other)) == [(NodeSuspected, A), (NodeSilent, A)]


def test_a_step_that_ends_after_all_is_no_hang(watched):
    watched.until(1.0, a=Beat())
    assert whom(watched.until(1.1, a=STUCK)) == [(NodeSuspected, A)]
    assert watched.until(9.0, a=Beat()) == [NodeCleared(A)]


def test_a_node_that_does_not_hear_answers_is_deaf(watched):
    watched.detector.answered(A, 1, 0.0)
    assert watched.until(2.9, a=Beat(heard=0)) == []
    assert whom(watched.until(4.9, a=Beat(heard=0))) == [(NodeSuspected, A)]
    assert watched.until(5.2, a=Beat(heard=0)) == [NodeSilent(A, pytest.approx(0.0, abs=0.01), "did not hear us")]


def test_a_node_that_hears_late_is_not_deaf(watched):
    for number in range(1, 10):
        watched.detector.answered(A, number, watched.now)
        assert watched.until(number * 1.0, a=Beat(heard=number - 1)) == []


def test_an_old_answer_that_nobody_could_send_on_is_no_deafness(watched):
    watched.detector.answered(A, 1, 0.0)
    watched.until(0.5, a=Beat(heard=0))
    watched.now += 60.0
    watched.detector.check(watched.now)
    assert watched.until(watched.now + 1.0, a=Beat(heard=0)) == []


def test_a_node_that_gets_deaf_in_a_pause_of_the_controller_is_found_in_time(watched):
    watched.until(0.5, a=Beat())
    watched.now += 60.0
    watched.detector.beat(A, watched.now, Beat())
    watched.detector.answered(A, 1, watched.now)
    watched.detector.check(watched.now)
    assert watched.until(watched.now + 4.9, a=Beat(heard=0))[1:] == []
    assert [type(each) for each in watched.until(watched.now + 0.3, a=Beat(heard=0))] == [NodeSilent]
