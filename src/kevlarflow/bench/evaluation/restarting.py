"""A supervisor as operators have one: a server that exits is started again, at once, for ever.

What is left of the dead server is killed first, as systemd does with a unit's processes. Each of its lives is
written down: when it ended, when the next one answered on ``/health``, and when that one made its first token.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import threading
import time

import msgspec

from kevlarflow.bench.systems import HOST, ServerProcess, SystemFailed, is_healthy, wait_gone

POLL_SECONDS = 0.1
KILL_SECONDS = 10.0
GENERATED = re.compile(rb"^vllm:generation_tokens_total\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)


class Life(msgspec.Struct):
    """One restart. Times are `time.monotonic()`, in seconds."""

    server: str
    ended_at: float
    """When the supervisor saw that the server had exited."""
    ready_at: float | None = None
    first_token_at: float | None = None


class Restarting(threading.Thread):
    """Starts a server, and starts it again when it exits, until `stop`."""

    def __init__(self, server: ServerProcess) -> None:
        super().__init__(name=f"supervisor of {server.name}", daemon=True)
        self.server = server
        self.lives: list[Life] = []
        self.failure: str | None = None
        """Why it was not started again, if so."""
        self._tried = threading.Event()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        """Held while the server is started or stopped, so that nothing is started behind `stop`."""

    def start(self) -> None:
        """Start the server. Raises `SystemFailed` when that is not possible."""
        super().start()
        self._tried.wait()
        if self.failure is not None:
            raise SystemFailed(self.failure)

    def run(self) -> None:
        """The server is started by this very thread: the kernel ends a child with the thread that made it."""
        try:
            self.server.start()
            self._tried.set()
            while not self._stopping.wait(POLL_SECONDS):
                self._look()
        except (SystemFailed, OSError) as error:
            self.failure = str(error)
        finally:
            self._tried.set()

    def stop(self) -> list[str]:
        """End the server for good; returns what it left running."""
        self._stopping.set()
        with self._lock:
            return self.server.stop()

    def _look(self) -> None:
        if self.server.has_ended():
            self.lives.append(Life(self.server.name, time.monotonic()))
            with self._lock:
                if not self._stopping.is_set():
                    self._bury()
                    self.server.start()
        elif self.lives and self.lives[-1].first_token_at is None:
            self._follow(self.lives[-1])

    def _follow(self, life: Life) -> None:
        if life.ready_at is None:
            if is_healthy(self.server.address):
                life.ready_at = time.monotonic()
        elif generated_tokens(self.server.address.port) > 0:
            life.first_token_at = time.monotonic()

    def _bury(self) -> None:
        left = self.server.processes()
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        if not wait_gone(left, KILL_SECONDS):
            raise SystemFailed(f"{self.server.name} exited and its processes cannot be killed")


def generated_tokens(port: int) -> float:
    """Tokens that a vLLM server has generated since it was started, by its own count."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5.0)
    try:
        connection.request("GET", "/metrics")
        return sum(map(float, GENERATED.findall(connection.getresponse().read())))
    except (OSError, http.client.HTTPException):
        return 0.0
    finally:
        connection.close()
