"""Whom the supervisor takes for hung, and whom for starved, stopped together with it, or still starting."""

from __future__ import annotations

import pytest

from kevlarflow.control.silence import FIRST_WORD_FACTOR, LONG_PAUSE, Silence
from kevlarflow.recovery.detector import UNKNOWN_STARVATION_FACTOR

LIMIT = 10.0
TURN = 0.1


class Supervisor:
    """Looks ten times a second for as long as it is told to."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.silence = Silence(LIMIT)
        self.silence.begin(self.now)
        self.starved_before: float | None = 5.0
        self.starved_share = 0.0

    def starved(self) -> float | None:
        if self.starved_before is None:
            return None
        return self.starved_before + self.starved_share * (self.now - 1_000.0)

    def hear(self) -> None:
        self.silence.heard(self.now)

    def look(self) -> bool:
        return self.silence.is_too_long(self.now, self.starved)

    def too_long_after(self, at_most: float = 1_000.0) -> float | None:
        """The seconds after which it gives the process up."""
        begun = self.now
        while self.now < begun + at_most:
            self.now += TURN
            if self.look():
                return self.now - begun
        return None


@pytest.fixture
def supervisor() -> Supervisor:
    supervisor = Supervisor()
    supervisor.hear()
    return supervisor


def test_who_says_nothing_any_more_is_given_up_once(supervisor: Supervisor) -> None:
    assert supervisor.too_long_after() == pytest.approx(LIMIT, abs=2 * TURN)
    assert supervisor.too_long_after() is None, "its end may take long, and is not asked for again"


def test_who_speaks_now_and_then_is_not(supervisor: Supervisor) -> None:
    for _ in range(20):
        assert supervisor.too_long_after(LIMIT - 1.0) is None
        supervisor.hear()


def test_the_next_process_is_judged_anew(supervisor: Supervisor) -> None:
    supervisor.too_long_after()
    supervisor.silence.begin(supervisor.now)
    supervisor.hear()
    assert supervisor.too_long_after() == pytest.approx(LIMIT, abs=2 * TURN)


def test_who_has_not_spoken_yet_gets_longer() -> None:
    assert Supervisor().too_long_after() == pytest.approx(FIRST_WORD_FACTOR * LIMIT, abs=2 * TURN)


def test_waiting_for_a_cpu_is_no_silence(supervisor: Supervisor) -> None:
    supervisor.starved_share = 0.99
    assert supervisor.too_long_after(10 * LIMIT) is None


def test_what_it_was_starved_before_is_no_excuse(supervisor: Supervisor) -> None:
    supervisor.starved_before = 1_000.0
    assert supervisor.too_long_after() == pytest.approx(LIMIT, abs=2 * TURN)


def test_where_nobody_can_say_how_much_it_was_starved_it_gets_longer(supervisor: Supervisor) -> None:
    supervisor.starved_before = None
    assert supervisor.too_long_after() == pytest.approx(UNKNOWN_STARVATION_FACTOR * LIMIT, abs=2 * TURN)


def test_a_supervisor_that_was_stopped_itself_gives_nobody_up_for_it(supervisor: Supervisor) -> None:
    for pause in (LONG_PAUSE * LIMIT - TURN, LIMIT, 1_000 * LIMIT):
        supervisor.too_long_after(1.0)
        supervisor.now += pause
        assert not supervisor.look()
        supervisor.too_long_after(1.0)
        supervisor.hear()


def test_who_is_still_silent_after_that_is_given_up(supervisor: Supervisor) -> None:
    supervisor.now += 1_000 * LIMIT
    assert supervisor.too_long_after() == pytest.approx(LIMIT, abs=2 * TURN)
