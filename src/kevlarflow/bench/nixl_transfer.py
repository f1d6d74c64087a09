"""NIXL as a way to move a copy, for comparison: one-sided writes into the other process's memory, and a polling peer.

Without its progress thread, which is slower here by orders of magnitude, NIXL moves nothing unless both sides poll.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from typing import Any

from kevlarflow.bench.memory_copy import fill
from kevlarflow.bench.systems import SystemFailed
from kevlarflow.replication.memory import map_memory

TIMEOUT_SECONDS = 30.0
STORED = b"stored"


def nixl_version() -> str | None:
    """The installed version of NIXL, or None."""
    for name in ("nixl-cu13", "nixl-cu12"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _agent(name: str) -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    try:
        import nixl_cu13 as nixl
    except ImportError:
        import nixl_cu12 as nixl
    return nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def _register(agent: Any, memory: memoryview) -> Any:
    """The descriptors of a piece of host memory, registered."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    agent.register_memory([(address, len(memory), 0, "")], mem_type="DRAM")
    return agent.get_xfer_descs([(address, len(memory), 0)], mem_type="DRAM")


def _take_and_answer(pipe: Connection, size: int) -> None:
    """The standby's process: answers each write that it is told of."""
    agent, memory = _agent("standby"), map_memory(size)
    fill(memory)
    pipe.send((agent.get_serialized_descs(_register(agent, memory)), agent.get_agent_metadata()))
    source = agent.add_remote_agent(pipe.recv())
    pipe.send("ready")
    while True:
        for messages in agent.get_new_notifs().values():
            for _ in messages:
                agent.send_notif(source, STORED)


class Nixl:
    """Two processes with an agent each, for the length of a block; `exchange` writes and waits for the answers."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_take_and_answer, args=(other, size), daemon=True)
        self._memory = map_memory(size)
        self._handles: list[Any] = []

    def __enter__(self) -> Nixl:
        self._process.start()
        fill(self._memory)
        self._agent = _agent("source")
        self._local = _register(self._agent, self._memory)
        if not self._pipe.poll(TIMEOUT_SECONDS):
            raise SystemFailed("NIXL: the other process does not start")
        remote, metadata = self._pipe.recv()
        self._standby = self._agent.add_remote_agent(metadata)
        self._remote = self._agent.deserialize_descs(remote)
        self._pipe.send(self._agent.get_agent_metadata())
        self._pipe.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    @property
    def peer_pid(self) -> int | None:
        """The other process."""
        return self._process.pid

    def exchange(self, at_a_time: int) -> None:
        """Write the memory so many times at once, and return when each write was answered."""
        while len(self._handles) < at_a_time:
            self._handles.append(
                self._agent.initialize_xfer("WRITE", self._local, self._remote, self._standby, b"copy")
            )
        for handle in self._handles[:at_a_time]:
            self._agent.transfer(handle)
        answers, deadline = 0, time.monotonic() + TIMEOUT_SECONDS
        while answers < at_a_time:
            for handle in self._handles[:at_a_time]:
                self._agent.check_xfer_state(handle)
            answers += sum(len(messages) for messages in self._agent.get_new_notifs().values())
            if time.monotonic() > deadline:
                raise SystemFailed("NIXL: the other process does not answer")
