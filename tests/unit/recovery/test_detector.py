"""Silence, suspicion and excuses."""

from __future__ import annotations

from kevlarflow.config import Timeouts
from kevlarflow.recovery.detector import Detector
from kevlarflow.recovery.events import NodeCleared, NodeSilent, NodeSuspected
from kevlarflow.types import Member, NodeId

A = Member(NodeId("node-0-0"), 1)
B = Member(NodeId("node-0-1"), 1)
TIMEOUTS = Timeouts(heartbeat_interval_ms=100, suspect_after_ms=1_000, confirm_after_ms=3_000)


def check_until(detector: Detector, start: float, end: float, beating: Member | None = None) -> list:
    verdicts = []
    for step in range(round((end - start) / 0.05)):
        now = start + (step + 1) * 0.05
        if beating is not None:
            verdicts += detector.beat(beating, now)
        verdicts += detector.check(now)
    return verdicts


def test_silence_leads_to_suspicion_then_to_a_verdict_once():
    detector = Detector(TIMEOUTS)
    detector.watch(A, 0.0)
    detector.watch(B, 0.0)
    assert check_until(detector, 0.0, 0.9, beating=B) == []
    assert check_until(detector, 0.9, 2.9, beating=B) == [NodeSuspected(A, 0.0)]
    assert check_until(detector, 2.9, 9.0, beating=B) == [NodeSilent(A, 0.0)]


def test_a_suspect_that_beats_is_cleared():
    detector = Detector(TIMEOUTS)
    detector.watch(A, 0.0)
    assert check_until(detector, 0.0, 1.5) == [NodeSuspected(A, 0.0)]
    assert detector.beat(A, 1.5) == [NodeCleared(A)]
    assert check_until(detector, 1.5, 2.4) == []
    assert check_until(detector, 2.4, 3.0) == [NodeSuspected(A, 1.5)]


def test_a_verdict_is_final():
    detector = Detector(TIMEOUTS)
    detector.watch(A, 0.0)
    check_until(detector, 0.0, 4.0)
    assert detector.beat(A, 4.0) == []
    assert check_until(detector, 4.0, 20.0) == []


def test_a_pause_of_its_own_is_nobodys_silence():
    detector = Detector(TIMEOUTS)
    detector.watch(A, 0.0)
    check_until(detector, 0.0, 0.5)
    assert detector.check(60.0) == []
    assert check_until(detector, 60.0, 60.4) == []
    assert check_until(detector, 60.4, 60.7) == [NodeSuspected(A, 0.0)]


def test_strangers_and_the_forgotten_are_not_expected():
    detector = Detector(TIMEOUTS)
    assert detector.beat(A, 0.0) == []
    detector.watch(A, 0.0)
    detector.forget(A)
    assert check_until(detector, 0.0, 9.0) == []
    assert detector.beat_at(A) == 0.0
