"""The machine: who uses its cores."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

import psutil
import pytest

from kevlarflow.bench import machine
from kevlarflow.bench.machine import CpuMeter, describe, wait_quiet
from standins import wait_until


def burn() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "while True: pass"])


def test_a_busy_stranger_is_seen_and_our_own_process_is_not():
    child = burn()
    try:
        ours, strange = CpuMeter(lambda: [child.pid]), CpuMeter(list)
        began = time.monotonic()
        for meter in (ours, strange):
            meter.start()
        # It gets what the others leave it.
        wait_until(lambda: sum(psutil.Process(child.pid).cpu_times()[:2]) > 0.5)
        seen_as_ours, seen_as_strange = ours.strangers(), strange.strangers()
        seconds = time.monotonic() - began
    finally:
        child.kill()
        child.wait()
    assert (seen_as_strange - seen_as_ours) * seconds * (os.cpu_count() or 1) > 0.3


def test_what_a_process_used_before_does_not_count_when_it_has_ended(monkeypatch: pytest.MonkeyPatch):
    moments = iter([(0.0, 500.0), (10.0, 504.0)])
    monkeypatch.setattr(machine, "_now", lambda: next(moments))
    monkeypatch.setattr(machine, "cpu_seconds", lambda pid: 100.0)
    pids = [1]
    meter = CpuMeter(lambda: pids)
    meter.start()
    pids.clear()
    assert meter.strangers() == pytest.approx(4.0 / 10.0 / (os.cpu_count() or 1))


def test_waiting_for_a_quiet_moment(monkeypatch: pytest.MonkeyPatch):
    shares = iter([0.5, 0.3, 0.01])
    monkeypatch.setattr(machine, "LOOK_SECONDS", 0.0)
    meter = CpuMeter(list)
    monkeypatch.setattr(meter, "strangers", lambda: next(shares))
    assert asyncio.run(wait_quiet(meter, 10.0))
    assert list(shares) == []


def test_patience_ends(monkeypatch: pytest.MonkeyPatch):
    meter = CpuMeter(list)
    monkeypatch.setattr(meter, "strangers", lambda: 0.5)
    assert not asyncio.run(wait_quiet(meter, 0.0))


def test_the_machine_can_be_described():
    this = describe()
    assert this.cores >= 1
    assert this.memory_gib > 0
    assert this.vllm == "0.32.0"
