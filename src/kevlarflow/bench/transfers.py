"""Which way of moving a copy is the fastest, and what does it cost? The transfer of `kevlarflow.replication`, measured.

Two processes, as two nodes are: one sends blocks, the other takes them and answers each. A plain copy within one
process is the yardstick. NIXL is measured when it is installed (``pip install nixl-cu13``); it is no dependency.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import msgspec

from kevlarflow.bench.experiment import Say
from kevlarflow.bench.machine import cpu_seconds
from kevlarflow.bench.measure import percentile
from kevlarflow.bench.memory_copy import copy_seconds, fill
from kevlarflow.bench.nixl_transfer import Nixl, nixl_version
from kevlarflow.bench.replication_results import Transfers, TransferTime
from kevlarflow.bench.systems import SystemFailed
from kevlarflow.replication.memory import map_memory
from kevlarflow.replication.transfer import CHANNEL_PLACES
from kevlarflow.replication.zmq_transfer import ZmqTransfer

ZMQ, NIXL, COPY = "ZeroMQ", "NIXL", "plain copy"
TIMEOUT_SECONDS = 30.0
LAST = b"last"


class Plan(msgspec.Struct, frozen=True):
    """How much is measured."""

    sizes: tuple[int, ...] = (64 << 10, 1 << 20, 1_474_560, 4 << 20)
    """Bytes of a copy; 1,474,560 is a KV block of half of the default model."""
    copies: int = 200


def run(plan: Plan, result: Transfers, say: Say) -> None:
    """Measure every size with every transfer that is there."""
    if nixl_version() is None:
        result.notes.append("NIXL is not installed, so it was not measured: pip install nixl-cu13")
    try:
        for size in plan.sizes:
            seconds = copy_seconds(size, max(1, (64 << 20) // size)) / max(1, (64 << 20) // size)
            _add(result, TransferTime(COPY, size, seconds, seconds, size / seconds, seconds), say)
            _add(result, _measure_zmq(size, plan.copies), say)
            if nixl_version() is not None:
                _add(result, _measure_nixl(size, plan.copies), say)
    except SystemFailed as error:
        result.void = str(error)
        say(f"transfer: {error}")


def _add(result: Transfers, each: TransferTime, say: Say) -> None:
    result.times.append(each)
    say(
        f"  {each.transfer}, {each.size / 1024:.0f} KiB: {each.round_trip_p50 * 1e6:.0f} us, "
        f"{each.bytes_per_second / 2**30:.1f} GiB/s, {each.cpu_seconds * 1e6:.0f} us of CPU"
    )


@contextlib.contextmanager
def _peer(target: Callable[..., None], *arguments: object) -> Iterator[BaseProcess]:
    """Another process, for the length of a block."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _take_and_answer(address: str, size: int) -> None:
    """The standby's process."""
    transfer, arena = ZmqTransfer(address, size, 1), map_memory(size)
    while True:
        while (arrival := transfer.receive()) is not None:
            arena[:] = arrival.data
            transfer.answer(arrival.peer, arrival.header)
        transfer.wait(1.0)


def _measure_zmq(size: int, copies: int) -> TransferTime:
    with tempfile.TemporaryDirectory(prefix="kevlarflow-transfer-") as folder:
        address = f"ipc://{folder}/standby"
        with _peer(_take_and_answer, address, size) as process:
            transfer = ZmqTransfer(f"ipc://{folder}/source", size, 1)
            outlet, data = transfer.connect(address), map_memory(size)
            fill(data)

            def exchange(at_a_time: int) -> None:
                for _ in range(at_a_time):
                    outlet.send(LAST, data)
                deadline = time.monotonic() + TIMEOUT_SECONDS
                for _ in range(at_a_time):
                    while outlet.receive() is None:
                        transfer.wait(0.1)
                        if time.monotonic() > deadline:
                            raise SystemFailed("ZeroMQ: the other process does not answer")

            try:
                return _times(ZMQ, size, copies, exchange, process.pid)
            finally:
                outlet.close()
                transfer.close()


def _measure_nixl(size: int, copies: int) -> TransferTime:
    with Nixl(size) as nixl:
        return _times(NIXL, size, copies, nixl.exchange, nixl.peer_pid)


def _times(name: str, size: int, copies: int, exchange: Callable[[int], None], peer: int | None) -> TransferTime:
    """`exchange(n)` sends n copies at a time and returns when all are answered."""
    for _ in range(10):
        exchange(1)
    both = [os.getpid(), *([peer] if peer else ())]
    cpu = sum(map(cpu_seconds, both))
    trips = []
    for _ in range(copies):
        began = time.perf_counter()
        exchange(1)
        trips.append(time.perf_counter() - began)
    cpu = sum(map(cpu_seconds, both)) - cpu
    rounds = []
    for _ in range(max(5, copies // CHANNEL_PLACES // 2)):
        began = time.perf_counter()
        exchange(CHANNEL_PLACES)
        rounds.append(CHANNEL_PLACES * size / (time.perf_counter() - began))
    return TransferTime(
        transfer=name,
        size=size,
        round_trip_p50=percentile(trips, 0.5),
        round_trip_p99=percentile(trips, 0.99),
        bytes_per_second=statistics.median(rounds),
        cpu_seconds=cpu / copies,
    )
