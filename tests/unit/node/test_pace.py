"""The time of decode steps, by size; what a thread waits for a CPU does not count."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from kevlarflow.node.pace import MOST_SIZES, PaceMeter, size_of


def step(contexts, new=(), tokens=None):
    """vLLM's step of requests that go on, with these contexts, and of new ones."""
    names = [f"r{index}" for index in range(len(contexts) + len(new))]
    made = SchedulerOutput.make_empty()
    made.num_scheduled_tokens = dict.fromkeys(names, 1)
    made.total_num_scheduled_tokens = len(names) if tokens is None else tokens
    made.scheduled_cached_reqs.num_computed_tokens = list(contexts)
    made.scheduled_new_reqs = [
        NewRequestData(name, [1], [], SamplingParams(), None, ([],), context, None)
        for name, context in zip(names[len(contexts) :], new, strict=True)
    ]
    return made


@pytest.mark.parametrize(
    ("a_step", "size"),
    [
        (step([100, 27]), (2, 7)),
        (step([100, 28]), (2, 8)),
        (step([100], new=[28]), (2, 8)),
        (step([1] * 8), (4, 4)),
        (step([]), None),
        (step([100], tokens=17), None),
    ],
)
def test_decode_steps_have_a_size(a_step, size):
    assert size_of(a_step) == size


def test_steps_are_reported_once_by_size():
    meter = PaceMeter()
    for contexts in ([10], [11], [10, 11]):
        meter.begin(step(contexts))
        time.sleep(0.01)
        meter.end()
        # What is sampled afterwards does not count.
        time.sleep(0.2)
    first, second = meter.report()
    assert (first.size, first.steps, second.size, second.steps) == ((1, 4), 2, (2, 5), 1)
    assert 0.02 <= first.seconds < 0.2
    assert meter.report() == ()


def test_other_steps_are_left_out():
    meter = PaceMeter()
    meter.begin(step([100], tokens=64))
    meter.end()
    meter.begin(step([100]))
    meter.begin(step([], tokens=0))
    meter.end()
    assert meter.report() == ()


def test_a_report_holds_the_most_frequent_sizes():
    meter = PaceMeter()
    for exponent in range(2 * MOST_SIZES):
        for _ in range(exponent + 1):
            meter.begin(step([2**exponent]))
            meter.end()
    sizes = [row.context_log2 for row in meter.report()]
    assert sizes == list(range(2 * MOST_SIZES, MOST_SIZES, -1))


def test_waits_for_a_cpu_do_not_count():
    """Hogs crowd the one CPU on which this thread is to compute."""
    cpu = {min(os.sched_getaffinity(0))}
    spin = f"import os; os.sched_setaffinity(0, {cpu}); print('ready', flush=True)\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) for _ in range(4)]
    found = []

    def compute() -> None:
        os.sched_setaffinity(0, cpu)
        meter = PaceMeter()
        began = time.monotonic()
        for _ in range(10):
            meter.begin(step([100]))
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
            meter.end()
        found.append((meter.report()[0].seconds, time.monotonic() - began))

    try:
        for hog in hogs:
            assert hog.stdout.readline() == b"ready\n"
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
    finally:
        for hog in hogs:
            hog.kill()
            hog.communicate()
    ((seconds, wall),) = found
    assert wall > 0.4, "it was to wait"
    assert 0.19 < seconds < wall / 2
