"""The supervisor: what ``kevlarflow serve`` is. It starts the others, starts them again, and takes them along.

Four units are its own: the guardian, the zygote, the controller, and the API server with its engines, which the
zygote forks. Each is started as soon as what it needs is there, and again whenever it is missing; that is the whole
of `_start_missing`, and start-up is no special case of it. Nodes are the controller's business.

Before the cluster is ready, the death of a unit ends everything, with one line that says why. Afterwards only that
unit is started again; one that dies again and again is waited for longer each time, and in the end given up, which
ends the cluster. A controller that answers nothing any more is made to die (`kevlarflow.control.silence`).

It stays light: no vLLM, no torch, no thread. Everything it waits for is a file descriptor in one poll.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq

from kevlarflow.config import RUN_FOLDER_VARIABLE, RUN_ID_VARIABLE, ServeConfig
from kevlarflow.control import guardian, logs
from kevlarflow.control.awaited import awaited
from kevlarflow.control.process import Process, last_words, reap, reap_all, spawn
from kevlarflow.control.run_folder import RunFolder
from kevlarflow.control.silence import Silence
from kevlarflow.control.unit import FAILURES_IN_A_ROW, Unit
from kevlarflow.control.watcher import starved_seconds
from kevlarflow.errors import INTERRUPTED, StartupFailed, UsageError
from kevlarflow.kinship import adopt_orphans
from kevlarflow.wire.messages import (
    AskStatus,
    Availability,
    Fatal,
    Narration,
    StartApiServer,
    Started,
    Status,
    Subscribe,
    decode,
    encode,
)

TICK_MS = 100
"""How often the supervisor looks at what does not wake it: the clock and, before it is ready, ``/health``."""
SUBSCRIBE_SECONDS = 1.0
LOGS_SECONDS = 1.0
"""How often the supervisor looks how large the logs are."""
QUIET_SECONDS = 15.0
"""After so long without a line, a start-up says what it is waiting for."""
LAUNCH_TIMEOUT_SECONDS = 2.0
GUARDIAN_TIMEOUT_MS = 15_000
LAST_CHILD_SECONDS = 5.0

Say = Callable[[str], None]


class Programs(NamedTuple):
    """What is executed for the units that are programs of their own."""

    zygote: tuple[str, ...] = (sys.executable, "-m", "kevlarflow.node.zygote")
    controller: tuple[str, ...] = (sys.executable, "-m", "kevlarflow.control.controller")


DEFAULT_PROGRAMS = Programs()


class Supervisor:
    """See the module's text. `run` is all there is to do with one."""

    def __init__(
        self,
        config: ServeConfig,
        run_folder: RunFolder,
        environment: dict[str, str],
        say: Say,
        programs: Programs = DEFAULT_PROGRAMS,
    ) -> None:
        self.config = config
        self.programs = programs
        self.run_folder = run_folder
        self.say = say
        self.begun_at = self.said_at = time.monotonic()
        self.ready = False
        self.serving = False
        """Whether a pipeline can generate, as the controller said last."""
        self.environment = environment | {
            RUN_FOLDER_VARIABLE: config.run_folder,
            RUN_ID_VARIABLE: run_folder.run_id,
        }
        self.guardian = Unit("guardian", self._start_guardian)
        self.zygote = Unit("zygote", self._start_zygote)
        self.controller = Unit("controller", self._start_controller)
        self.api_server = Unit("API server", self._start_api_server)
        self.units = (self.guardian, self.zygote, self.controller, self.api_server)
        self.lifeline = -1
        self.report: int | None = None
        self.model: dict[str, Any] | None = None
        self.status: dict[str, Any] | None = None
        """The controller's newest status document, until the cluster is ready."""
        self.signals: list[int] = []
        self.incidents = 0
        """Processes that ended otherwise than with status 0, before anybody was asked to leave."""
        self.wakeup, self.wakeup_writer = socket.socketpair()
        self.observer: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self.observer.setsockopt(zmq.LINGER, 0)
        self.observer.setsockopt(zmq.IMMEDIATE, 1)
        self.observer.connect(config.controller_address)
        self.subscribe_at = self.bound_logs_at = 0.0
        self.silence = Silence(config.timeouts.controller_lost_after_ms / 1_000)

    def run(self) -> int:
        """Serve until a signal comes; return the exit status. Raises one of our errors, with nothing left behind."""
        adopt_orphans()
        self.take_signals()
        keeps_logs = True
        try:
            while not self.signals:
                now = time.monotonic()
                for unit in self.units:
                    self._ensure(unit, now)
                self._subscribe(now)
                self._bound_logs(now)
                self._wait()
                self._judge_silence()
                if not self.ready:
                    self._look_whether_ready()
            self.say("stopping")
            self._end_gently()
            keeps_logs = self.incidents > 0
        except UsageError:
            keeps_logs = False  # Nothing has failed: what was asked for cannot work.
            raise
        finally:
            self._sweep()
            if not keeps_logs:
                self.run_folder.remove_logs()
            self.run_folder.give_back()
        if keeps_logs:
            self.say(f"logs are kept in {self.run_folder.log_path}, because a process has failed")
        return 0 if self.ready else INTERRUPTED

    # ---- starting

    def _ensure(self, unit: Unit, now: float) -> None:
        try:
            unit.ensure(now)
        except OSError as error:
            # It may be that no process, memory or descriptor is to be had for a moment.
            what = f"the {unit.name} cannot be started ({error.strerror or error})"
            if not self.ready or unit.failures >= FAILURES_IN_A_ROW:
                raise StartupFailed(f"{what}; logs in {self.run_folder.log_path}") from error
            self.say(f"{time.strftime('%H:%M:%S')} {what}: trying again")

    def _start_guardian(self) -> Process:
        end, beginning = os.pipe()
        command = [sys.executable, "-I", "-S", guardian.__file__, *self.run_folder.guard_arguments(end)]
        log = self.run_folder.log_path / "guardian.log"
        try:
            process = spawn("guardian", command, self.environment, log, (end, self.run_folder.lock), outlives_us=True)
        except OSError:
            os.close(beginning)
            raise
        finally:
            os.close(end)
        if self.lifeline >= 0:
            os.close(self.lifeline)
        self.lifeline = beginning
        return process

    def _start_zygote(self) -> Process:
        report, written = os.pipe()
        command = [*self.programs.zygote, "--report-fd", str(written)]
        log = self.run_folder.log_path / "zygote.log"
        try:
            process = spawn("zygote", command, self.environment, log, (written,))
        except OSError:
            os.close(report)
            raise
        finally:
            os.close(written)
        self.report = report
        return process

    def _start_controller(self) -> Process | None:
        if self.model is None:
            return None
        log = self.run_folder.log_path / "controller.log"
        return spawn("controller", self.programs.controller, self.environment, log)

    def _start_api_server(self) -> Process | None:
        if self.zygote.process is None or self.report is not None or self.model is None:
            return None
        log = self.run_folder.log_path / "api-server.log"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as launcher:
            launcher.settimeout(LAUNCH_TIMEOUT_SECONDS)
            try:
                launcher.connect(self.config.launcher_path)
                launcher.send(encode(StartApiServer()))
                answer = decode(launcher.recv(4096))
                assert isinstance(answer, Started), answer
                return Process("API server", answer.pid, log)
            except (OSError, msgspec.MsgspecError):
                return None  # The zygote or what it forked is dead already, which is noticed elsewhere.

    # ---- waiting

    def _wait(self) -> None:
        """Wait for the next thing to happen, and see to everything that has."""
        # What a terminal did not take that was stopped (Ctrl-S).
        sys.stdout.flush()
        poller = zmq.Poller()
        poller.register(self.wakeup.fileno(), zmq.POLLIN)
        poller.register(self.observer, zmq.POLLIN)
        if self.report is not None:
            poller.register(self.report, zmq.POLLIN)
        for unit in self.units:
            if unit.process is not None:
                poller.register(unit.process.exit_fd, zmq.POLLIN)
        happened = dict(poller.poll(TICK_MS))
        if self.wakeup.fileno() in happened:
            self.wakeup.recv(4096)
        if self.report in happened:
            self._read_report()
        if self.observer in happened:
            self._listen()
        for unit in self.units:
            if unit.process is not None and unit.process.exit_fd in happened:
                self._mourn(unit)
        self._note_exits()

    def _note_exits(self) -> None:
        """Write down how each child ended, if the disk takes it; a zombie is all that knows it."""
        for pid, status in reap():
            self.incidents += status != 0
            with contextlib.suppress(OSError), (self.run_folder.log_path / "exits.log").open("a") as log:
                log.write(f"{time.strftime('%H:%M:%S')} process {pid}: status {status}\n")

    def _bound_logs(self, now: float) -> None:
        if now >= self.bound_logs_at:
            self.bound_logs_at = now + LOGS_SECONDS
            logs.cut(self.run_folder.log_path)

    def _read_report(self) -> None:
        assert self.report is not None
        with os.fdopen(self.report) as pipe:
            text = pipe.read()
        self.report = None
        if not text:
            return  # The zygote died; its pidfd tells.
        told = json.loads(text)
        if "model" not in told and self.ready:
            return  # It may be well the next time: its exit is seen, and it is started again.
        if "model" not in told:
            if told["exit_status"] == UsageError.exit_status:
                raise UsageError(told["error"])
            raise StartupFailed(f"{told['error']}; logs in {self.run_folder.log_path}")
        self.model = told["model"]
        if not self.ready:
            self._say_with_time(
                f"model checked: {self.model['layers']} layers, {self.model['dtype']}, KV memory for "
                f"{self.model['kv_tokens']:,} tokens a lane; starting nodes and engines"
            )

    def _listen(self) -> None:
        while self.observer.poll(0):
            try:
                message = decode(self.observer.recv())
            except msgspec.MsgspecError:
                continue
            self.silence.heard(time.monotonic())
            match message:
                case Narration(time=moment, text=text) if self.ready:
                    self.say(f"{time.strftime('%H:%M:%S', time.localtime(moment))} {text}")
                case Narration(text=text):
                    self._say_with_time(text)
                case Availability(serving=serving):
                    self.serving = serving
                case Status(document=document):
                    self.status = msgspec.json.decode(document)
                case Fatal(reason=reason):
                    raise StartupFailed(f"{reason}; logs in {self.run_folder.log_path}")

    def _judge_silence(self) -> None:
        """Kill a controller that hangs or stays stopped, since it misses what dies; its end is seen as any other."""
        process, now = self.controller.process, time.monotonic()
        if process is None or not self.ready:
            # A start has a limit of its own.
            self.silence.begin(now)
        elif self.silence.is_too_long(now, lambda: starved_seconds(process.pid)):
            limit = self.config.timeouts.controller_lost_after_ms / 1_000
            self.say(
                f"{time.strftime('%H:%M:%S')} the controller (process {process.pid}) has not answered for {limit:g} s: "
                "ending it"
            )
            process.send(signal.SIGKILL)

    def _mourn(self, unit: Unit) -> None:
        assert unit.process is not None
        process = unit.process
        unit.bury(time.monotonic())
        if unit is self.api_server:
            process.kill_group()  # Its engines: without their server nobody can reach them.
        what = f"the {unit.name} (process {process.pid}) died"
        if not self.ready or unit.failures >= FAILURES_IN_A_ROW:
            when = "during start-up" if not self.ready else f"{unit.failures} times in a row"
            words = last_words(process.log)
            raise StartupFailed(f"{what} {when}{': ' * bool(words)}{words}; its log is {process.log}")
        self.say(f"{time.strftime('%H:%M:%S')} {what}: starting it again")

    def _subscribe(self, now: float) -> None:
        if now >= self.subscribe_at:
            self.subscribe_at = now + SUBSCRIBE_SECONDS
            try:
                self.observer.send(encode(Subscribe(narration=True)), zmq.NOBLOCK)
                if not self.ready:
                    self.observer.send(encode(AskStatus()), zmq.NOBLOCK)
            except zmq.Again:
                return  # Not connected; the next time will do.

    # ---- getting ready

    def _look_whether_ready(self) -> None:
        scheme = health_scheme(self.config, serving=self.serving) if self.api_server.process is not None else ""
        if scheme:
            self.ready = True
            self.say(ready_line(self.config, scheme, time.monotonic() - self.begun_at))
        elif time.monotonic() - self.begun_at > self.config.timeouts.startup_timeout_s:
            raise StartupFailed(
                f"not ready after {self.config.timeouts.startup_timeout_s} s: {self._awaited()}; "
                f"logs in {self.run_folder.log_path}"
            )
        elif time.monotonic() - self.said_at > QUIET_SECONDS:
            self._say_with_time(self._awaited())

    def _awaited(self) -> str:
        return awaited(self.config, self.status, model_is_checked=self.model is not None)

    def _say_with_time(self, text: str) -> None:
        self.said_at = time.monotonic()
        self.say(f"[{time.monotonic() - self.begun_at:5.1f} s] {text}")

    # ---- leaving

    def take_signals(self) -> None:
        """From now on a signal is a wish to end; `run` takes them as well."""
        self.wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self.wakeup_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # By nohup: we are to outlive the terminal.
            signal.signal(number, lambda received, _: self.signals.append(received))

    def _end_gently(self) -> None:
        """Let the API server finish, which may have requests to complete, then the controller that they may need.

        A second signal cuts that short.
        """
        deadline = time.monotonic() + self.config.timeouts.stop_grace_s
        for process in [unit.process for unit in (self.api_server, self.controller) if unit.process]:
            process.send(signal.SIGTERM)
            poller = zmq.Poller()
            poller.register(process.exit_fd, zmq.POLLIN)
            while time.monotonic() < deadline and len(self.signals) < 2 and not poller.poll(TICK_MS):
                pass

    def _sweep(self) -> None:
        """Have the guardian do what it is for, while we watch; without it, do it ourselves."""
        self.observer.close()
        watcher = self.guardian.process
        if watcher is not None:
            os.close(self.lifeline)
            poller = zmq.Poller()
            poller.register(watcher.exit_fd, zmq.POLLIN)
            poller.poll(GUARDIAN_TIMEOUT_MS)
        if Path(self.config.run_folder).exists():
            self.run_folder.sweep()
        # Who ended by itself a moment ago may still be giving its memory and its sockets back.
        reap_all(LAST_CHILD_SECONDS)


def health_scheme(config: ServeConfig, *, serving: bool = False) -> str:
    """By what ``/health`` answers 200: http, https or nothing. `serving` counts where that needs a certificate."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    for scheme, connect in (("http", _plain), ("https", _encrypted)):
        connection = connect(host, config.port)
        try:
            connection.request("GET", "/health")
            return scheme if connection.getresponse().status == http.client.OK else ""
        except http.client.BadStatusLine:
            continue  # It speaks TLS.
        except ssl.SSLError:
            return scheme if serving else ""
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()
    return "https" if serving else ""


def _plain(host: str, port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(host, port, timeout=1.0)


def _encrypted(host: str, port: int) -> http.client.HTTPConnection:
    # The question is whether we serve, not who we are.
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=1.0, context=context)


def ready_line(config: ServeConfig, scheme: str, seconds: float) -> str:
    """What a person wants to know when it is done."""
    host = "localhost" if config.host in {"0.0.0.0", "::"} else config.host
    host = f"[{host}]" if ":" in host else host
    nodes = config.pipelines * config.stages
    return (
        f"ready in {seconds:.1f} s: {scheme}://{host}:{config.port}/v1 (model {config.served_model_name}, "
        f"{config.pipelines} pipeline{'s' * (config.pipelines > 1)} x {config.stages} "
        f"stage{'s' * (config.stages > 1)}, {nodes} node{'s' * (nodes > 1)})"
    )
