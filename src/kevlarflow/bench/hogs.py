"""Hogs: processes that compute for nothing, beside a system that has to bear it.

They are what `stress` would be, without asking for it: plain Python and NumPy in turns, one thread each, at the
niceness of whoever starts them. They die with that process, however it ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import NoReturn, Self

from kevlarflow.bench.machine import cpu_seconds
from kevlarflow.kinship import die_with_parent

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
MATRIX_SIZE = 512
"""Two MiB of doubles: more than a core has to itself, so that hogs take memory's time as well."""
NUMBERS = 100_000


class Hogs:
    """So many of them, for the length of a block. Enter it on the main thread: they die with the thread that forks."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        us = os.getpid()
        for _ in range(self._count):
            child = subprocess.Popen(
                [sys.executable, "-m", "kevlarflow.bench.hogs"],
                stdin=subprocess.DEVNULL,
                env=os.environ | ONE_THREAD,
                preexec_fn=lambda: die_with_parent(us),  # noqa: PLW1509 - two system calls.
            )
            self._children.append(child)
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait()

    @property
    def pids(self) -> list[int]:
        """Their process ids."""
        return [child.pid for child in self._children]

    def cpu_seconds(self) -> float:
        """CPU time that all of them have used so far."""
        return sum(map(cpu_seconds, self.pids))


def compute() -> NoReturn:
    """What a hog does."""
    import numpy

    matrix = numpy.random.default_rng(0).random((MATRIX_SIZE, MATRIX_SIZE))
    while True:
        matrix = matrix @ matrix
        matrix /= matrix.max()
        sum(number * number for number in range(NUMBERS))


if __name__ == "__main__":
    compute()
