"""Systems under test: a server that is started, becomes ready or does not, and has to leave nothing behind.

A `System` is all that an experiment knows of a server, so that a further one (another engine, a replay on other
replicas) is a further class. `ServerProcess` is the part that every server on this machine shares: a child in a
session of its own, whose processes are known by an environment variable that they all inherit.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import psutil

from kevlarflow.bench.streams import HTTP_OK, Address
from kevlarflow.control.process import last_words
from kevlarflow.errors import KevlarFlowError
from kevlarflow.faults.processes import ProcessIdentity, command_line, identify, is_alive, with_environment
from kevlarflow.kinship import die_with_parent

MARK = "KEVLARFLOW_BENCH_SERVER"
"""Environment variable by which the processes of one server are known."""
HOST = "127.0.0.1"
READY_POLL_SECONDS = 0.05
START_TIMEOUT_SECONDS = 600.0
STOP_TIMEOUT_SECONDS = 40.0
LINGER_SECONDS = 5.0
"""How long processes may outlive the one that was told to stop."""
KILL_SECONDS = 5.0
LONGEST_COMMAND = 90
LOWEST_PORT = 10_000

SAME_FOR_ALL = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Process titles must not overwrite the environment that `MARK` is read from.
    "SPT_NOENV": "1",
}
"""The environment that every system gets."""


class SystemFailed(KevlarFlowError):
    """A system under test died, or never became ready."""


class System(Protocol):
    """A server that can be measured."""

    name: str
    model: str
    """The name that requests ask for."""

    @property
    def address(self) -> Address:
        """Where it listens; valid after `start`."""

    def start(self) -> None:
        """Start it; returns at once."""

    def wait_ready(self) -> float:
        """Seconds from `start` to the first 200 of /health. Raises `SystemFailed`."""

    def require_alive(self) -> None:
        """Raise `SystemFailed` when it has ended."""

    def processes(self) -> list[ProcessIdentity]:
        """Every living process that belongs to it."""

    def stop(self) -> list[str]:
        """Stop it and return what it left running (and was killed then); safe to call at any time, again too."""


class ServerProcess:
    """A server that is one command. `make_command` gets the port: `port`, or one that was free."""

    def __init__(
        self,
        name: str,
        model: str,
        make_command: Callable[[int], Sequence[str]],
        environment: Mapping[str, str],
        log: Path,
        port: int | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.log = log
        self._make_command = make_command
        self._environment = environment
        self._mark = ""
        self._fixed_port = port
        self._port = port or 0
        self._child: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0

    @property
    def address(self) -> Address:
        """Where it listens; valid after `start`."""
        return Address(HOST, self._port)

    def start(self) -> None:
        """Start it; returns at once. Its output goes to `log`. Raises `SystemFailed` when its port is taken."""
        self._port = self._fixed_port or free_port()
        require_free(self.name, self._port)
        self._mark = uuid.uuid4().hex
        us = os.getpid()
        with self.log.open("ab") as output:
            self._started_at = time.monotonic()
            self._child = subprocess.Popen(
                self._make_command(self._port),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment, MARK: self._mark},
                # Ctrl-C is for us alone; but our end, however it comes, is the server's.
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(us, signal.SIGTERM),  # noqa: PLW1509 - two system calls.
            )

    def wait_ready(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> float:
        """Seconds from `start` to the first 200 of /health."""
        while not is_healthy(self.address):
            self.require_alive()
            if time.monotonic() - self._started_at > timeout_seconds:
                raise SystemFailed(f"{self.name} was not ready after {timeout_seconds:.0f} s: see {self.log}")
            time.sleep(READY_POLL_SECONDS)
        return time.monotonic() - self._started_at

    def require_alive(self) -> None:
        """Raise `SystemFailed` when it has ended."""
        if self._child is not None and self._child.poll() is not None:
            words = last_words(self.log).removeprefix("kevlarflow: ")
            ended = f"{self.name} ended with exit status {self._child.returncode}"
            raise SystemFailed(f"{ended}{': ' * bool(words)}{words} (log: {self.log})")

    def has_ended(self) -> bool:
        """Whether its command has ended, by itself or by a signal."""
        return self._child is not None and self._child.poll() is not None

    def processes(self) -> list[ProcessIdentity]:
        """Every living process that belongs to it."""
        if self._child is None:
            return []
        pids = {self._child.pid, *with_environment(MARK, self._mark)}
        with contextlib.suppress(psutil.NoSuchProcess):
            pids |= {child.pid for child in psutil.Process(self._child.pid).children(recursive=True)}
        return [process for pid in sorted(pids) if (process := identify(pid)) is not None]

    def stop(self) -> list[str]:
        """Ask it to end, kill what does not; return what was left running when the command itself had ended."""
        if self._child is None:
            return []
        known = self.processes()
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(STOP_TIMEOUT_SECONDS)
        wait_gone(known, LINGER_SECONDS)
        left = {process for process in {*known, *self.processes()} if is_alive(process)}
        leftovers = [command_line(process.pid)[:LONGEST_COMMAND] for process in left]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if not wait_gone(left, KILL_SECONDS):
            raise SystemFailed(f"{self.name} cannot be stopped: {', '.join(leftovers)}")
        self._child.wait()
        self._child = None
        return leftovers


def require_free(name: str, port: int) -> None:
    """Raise `SystemFailed` when somebody listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise SystemFailed(f"{name} cannot start: port {port} is in use") from error


def wait_gone(processes: Sequence[ProcessIdentity] | set[ProcessIdentity], seconds: float) -> bool:
    """Wait until none of the processes lives; says whether that has happened."""
    deadline = time.monotonic() + seconds
    while any(is_alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(READY_POLL_SECONDS)
    return True


def is_healthy(address: Address) -> bool:
    """Whether ``/health`` answers 200."""
    connection = http.client.HTTPConnection(*address, timeout=5.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == HTTP_OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    """A TCP port that nobody listens on now, and that the kernel gives to no outgoing connection before it is used."""
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(LOWEST_PORT, max(ephemeral, LOWEST_PORT + 1_000))
        with contextlib.suppress(SystemFailed):
            require_free("a server", port)
            return port
