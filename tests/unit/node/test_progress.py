"""A step that sleeps or computes for too long is overdue; one that is only starved is not."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import pytest

from kevlarflow.node.progress import OVERRUN_FACTOR, UNKNOWN_FACTOR, UNSEEN_FACTOR, Progress, Step
from kevlarflow.node.thread_clock import Spent
from kevlarflow.types import PipelineId

P = PipelineId(3)
FLOOR = 0.05
ALL_CPUS = os.sched_getaffinity(0)


def compute(seconds: float) -> None:
    """Use so much CPU time of this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(1_000))


def run_step(progress: Progress, tokens: int, seconds: float) -> None:
    progress.begin(P)
    progress.measure(tokens)
    compute(seconds)
    progress.end()


def test_an_idle_loop_is_not_overdue():
    progress = Progress(FLOOR)
    run_step(progress, 4, 0.0)
    progress.rest()
    time.sleep(2 * FLOOR)
    step = progress.look()
    assert (step.running_seconds, step.pipeline, step.is_overdue) == (0.0, None, False)


def seen_while(progress: Progress, work, seconds: float) -> bool:
    """Whether another thread sees the step overdue within `seconds` while this one is at `work`."""
    ended = threading.Event()
    seen: list[tuple[float, Step]] = []

    def look() -> None:
        # Not where this one may be starved: who waits for the interpreter's lock sleeps.
        os.sched_setaffinity(0, ALL_CPUS)
        while not ended.is_set() and not (seen and seen[-1][1].is_overdue):
            seen.append((time.monotonic(), progress.look()))
            time.sleep(0.005)

    looker = threading.Thread(target=look)
    progress.begin(P)
    progress.measure(4)
    begun = time.monotonic()
    looker.start()
    work(seconds)
    done = time.monotonic()
    ended.set()
    looker.join()
    progress.end()
    assert {step.pipeline for _, step in seen} == {P}
    last, step = seen[-1]
    assert step.is_overdue or last - begun > (done - begun) / 2, "nobody has looked when it mattered"
    return step.is_overdue


def test_a_step_that_sleeps_is_overdue_after_the_floor():
    progress = Progress(FLOOR)
    run_step(progress, 4, 0.0)
    assert seen_while(progress, time.sleep, 10 * FLOOR)


def test_a_step_of_a_size_that_was_never_seen_has_more_time():
    progress = Progress(FLOOR)
    run_step(progress, 1_000, 0.0)
    assert not seen_while(progress, time.sleep, 3 * FLOOR)
    assert UNSEEN_FACTOR > 3


def test_a_step_that_computes_far_longer_than_its_like_is_overdue():
    progress = Progress(FLOOR)
    run_step(progress, 4, 0.02)
    assert not seen_while(progress, compute, OVERRUN_FACTOR * 0.02 * 0.7)
    assert seen_while(progress, compute, 10.0 * OVERRUN_FACTOR * 0.02)


class Endless:
    """The clock of a thread that has computed for so long since it was made."""

    counts_waits = True
    computing = 0.0

    def spent(self) -> Spent:
        return Spent(self.computing, self.computing, 0.0)

    def wants_to_run(self) -> bool:
        return True


def test_work_without_a_size_and_a_first_step_end_some_time():
    for tokens in (None, 4):
        clock = Endless()
        progress = Progress(FLOOR, clock)
        progress.begin(P)
        if tokens is not None:
            progress.measure(tokens)
        clock.computing = 0.9 * UNKNOWN_FACTOR * FLOOR
        assert not progress.look().is_overdue
        clock.computing = 1.1 * UNKNOWN_FACTOR * FLOOR
        assert progress.look().is_overdue


def test_a_first_step_may_compute_for_longer_if_it_is_large():
    clock = Endless()
    progress = Progress(FLOOR, clock)
    progress.begin(P)
    progress.measure(8192)
    clock.computing = 0.9 * 64 * UNKNOWN_FACTOR * FLOOR
    assert not progress.look().is_overdue
    clock.computing = 1.1 * 64 * UNKNOWN_FACTOR * FLOOR
    assert progress.look().is_overdue


class Asleep(Endless):
    """The clock of a thread that has slept since it was made."""

    asleep = 0.0

    def spent(self) -> Spent:
        return Spent(self.asleep, 0.0, 0.0)

    def wants_to_run(self) -> bool:
        return False


def test_a_step_that_stood_still_for_long_and_went_on_allows_the_next_ones_little_more():
    clock = Asleep()
    progress = Progress(FLOOR, clock)
    for seconds in (0.0, 600.0):
        progress.begin(P)
        progress.measure(4)
        clock.asleep += seconds
        progress.end()
    progress.begin(P)
    progress.measure(4)
    clock.asleep += 0.9 * OVERRUN_FACTOR * FLOOR
    assert not progress.look().is_overdue
    clock.asleep += 0.3 * OVERRUN_FACTOR * FLOOR
    assert progress.look().is_overdue


@pytest.mark.parametrize("before", ["a message", "a step"])
def test_a_loop_that_neither_rests_nor_works_for_long_is_overdue(before):
    clock = Asleep()
    progress = Progress(FLOOR, clock)
    progress.wake()
    if before == "a step":
        progress.begin(P)
        progress.measure(4)
        progress.end()
    clock.asleep = 0.9 * UNSEEN_FACTOR * FLOOR
    assert progress.look() == (clock.asleep, None, False)
    clock.asleep = 1.1 * UNSEEN_FACTOR * FLOOR
    assert progress.look() == (clock.asleep, None, True)
    progress.rest()
    assert progress.look() == (0.0, None, False)
    assert progress.done == ({P: 1} if before == "a step" else {}), "what it does in between is nobody's work"


def test_larger_steps_may_take_longer():
    progress = Progress(FLOOR)
    run_step(progress, 4, 0.02)
    progress.begin(P)
    progress.measure(4_096)
    compute(OVERRUN_FACTOR * 0.02 * 1.5)
    assert not progress.look().is_overdue
    progress.end()


def test_a_step_that_gets_no_cpu_is_not_overdue():
    """Many share one CPU: wall time passes, while the step neither computes nor sleeps."""
    cpus = os.sched_getaffinity(0)
    hogs: list[subprocess.Popen[bytes]] = []
    try:
        os.sched_setaffinity(0, {min(cpus)})
        progress = Progress(FLOOR)
        run_step(progress, 4, 0.05)
        hogs += [subprocess.Popen(["timeout", "20", "sh", "-c", "while :; do :; done"]) for _ in range(4)]
        began = time.monotonic()
        assert not seen_while(progress, compute, 0.2)
        assert time.monotonic() - began > 0.2 + 2 * FLOOR, "it was to be starved"
    finally:
        os.sched_setaffinity(0, cpus)
        for hog in hogs:
            hog.terminate()
            hog.wait()
