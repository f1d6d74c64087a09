"""Whether large memory is in huge pages, as the kernel counts them."""

from __future__ import annotations

import errno
import mmap
from pathlib import Path

import pytest

from kevlarflow.replication.memory import map_memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in rollup if line.startswith("AnonHugePages:"))


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="the kernel has none")
def test_large_memory_is_in_huge_pages() -> None:
    before = huge_bytes()
    memory = map_memory(64 << 20)
    assert huge_bytes() - before < 4 << 20, "it costs nothing until it is written"
    memory[:] = bytes(len(memory))
    assert huge_bytes() - before >= 32 << 20


def test_small_memory_has_the_size_that_was_asked_for() -> None:
    assert [len(map_memory(size)) for size in (0, 1, 5_000)] == [0, 1, 5_000]


def test_a_kernel_without_huge_pages_gives_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Mapping(mmap.mmap):
        def madvise(self, option: int, *_: object) -> None:
            asked.append(option)
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    memory = map_memory(4 << 20)
    assert asked == [mmap.MADV_HUGEPAGE]
    memory[-3:] = b"abc"
    assert bytes(memory[-4:]) == b"\0abc"
