"""The supervisor and the guardian over stand-ins: start-up, restarts, and that nothing is left, ever."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kevlarflow.bench.systems import free_port
from kevlarflow.control.awaited import awaited
from kevlarflow.control.logs import MOST_LOG_BYTES
from kevlarflow.control.process import Process, last_words
from kevlarflow.control.run_folder import await_predecessor, owner_of
from kevlarflow.control.supervisor import health_scheme, ready_line
from kevlarflow.control.unit import FAILURES_IN_A_ROW, LONG_LIFE_SECONDS, LONGEST_PAUSE_SECONDS, Unit
from standins import make_config, members, start_cluster, wait_until


class Cluster:
    """A running supervisor over stand-ins."""

    def __init__(self, base: Path, **behaviour: Any) -> None:
        self.port = free_port()
        self.folder = base / f"kevlarflow-{os.getuid()}" / str(self.port)
        self.supervisor = start_cluster(base, self.port, **behaviour)
        self.said: list[str] = []

    def wait_for(self, pattern: str) -> str:
        """Read what the supervisor says until a line matches."""
        assert self.supervisor.stdout is not None
        for line in self.supervisor.stdout:
            self.said.append(line)
            if re.search(pattern, line):
                return line
        pytest.fail(f"{pattern!r} was never said: {self.said}, {self.errors()}")

    def pids(self, word: str) -> set[int]:
        return {pid for pid, command in members(self.folder).items() if word in command}

    def the(self, word: str) -> int:
        (pid,) = self.pids(word)
        return pid

    def end(self) -> int:
        return self.supervisor.wait(timeout=60)

    def errors(self) -> str:
        assert self.supervisor.stderr is not None
        return self.supervisor.stderr.read()

    def nothing_is_left(self) -> bool:
        lock = self.folder.with_suffix(".lock")
        return not members(self.folder) and not self.folder.exists() and not lock.exists()


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    # Short, because Unix sockets live below it.
    folder = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@pytest.fixture
def cluster(base: Path) -> Iterator[Cluster]:
    running = Cluster(base)
    running.wait_for("^ready")
    yield running
    running.supervisor.kill()
    running.supervisor.wait()
    wait_until(running.nothing_is_left)


def test_it_says_what_it_does_and_when_it_is_ready(cluster: Cluster) -> None:
    assert re.search(r"\[ +\d+\.\d s\] model checked: 4 layers, float32, KV memory for 1,000 tokens", cluster.said[0])
    assert re.match(
        rf"ready in \d+\.\d s: http://127.0.0.1:{cluster.port}/v1 \(model stand-in, 2 pipelines x 2 stages, 4 nodes\)$",
        cluster.said[-1],
    )


def test_a_start_that_takes_long_says_what_it_is_waiting_for(base: Path) -> None:
    cluster = Cluster(base, zygote="slow", controller="starting")
    cluster.wait_for(r"^\[ +\d+\.\d s\] waiting for vLLM: ")
    cluster.wait_for(r"^\[ +\d+\.\d s\] waiting for nodes: 1 of 4 ready \(compiling .*\), engines: 0 of 1 ready$")
    cluster.wait_for("^ready")
    cluster.supervisor.terminate()
    assert cluster.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_nothing_left(cluster: Cluster, number: signal.Signals) -> None:
    cluster.supervisor.send_signal(number)
    assert cluster.end() == 0
    assert cluster.nothing_is_left()
    assert cluster.errors() == ""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", cluster.port))


def test_a_terminal_that_is_closed_does_not_end_what_nohup_started(base: Path) -> None:
    cluster = Cluster(base, terminal="nohup")
    cluster.wait_for("^ready")
    cluster.supervisor.send_signal(signal.SIGHUP)
    os.kill(cluster.the("standins.py controller"), signal.SIGKILL)
    cluster.wait_for("the controller .* died: starting it again")
    cluster.supervisor.terminate()
    assert cluster.end() == 0
    assert cluster.nothing_is_left()


def test_ctrl_c_reaches_the_supervisor_alone(cluster: Cluster) -> None:
    groups = {os.getpgid(pid) for pid in members(cluster.folder)}
    assert os.getpgid(cluster.supervisor.pid) not in groups


def test_kill_9_leaves_nothing_even_of_a_stopped_process(cluster: Cluster) -> None:
    os.kill(cluster.the("standins.py controller"), signal.SIGSTOP)
    for pid in cluster.pids("kevlarflow: api-server"):
        os.kill(pid, signal.SIGSTOP)
    cluster.supervisor.kill()
    wait_until(cluster.nothing_is_left)


def test_no_process_survives_the_supervisor_even_without_a_guardian(base: Path) -> None:
    cluster = Cluster(base)
    cluster.wait_for("^ready")
    os.kill(cluster.the("standins.py controller"), signal.SIGSTOP)
    # So that it cannot start another one.
    cluster.supervisor.send_signal(signal.SIGSTOP)
    os.kill(cluster.the("guardian.py"), signal.SIGKILL)
    cluster.supervisor.kill()
    wait_until(lambda: not members(cluster.folder))


def test_the_controller_is_there_while_the_api_server_finishes(base: Path) -> None:
    cluster = Cluster(base, zygote="api-server-finishes")
    cluster.wait_for("^ready")
    cluster.supervisor.terminate()
    assert cluster.end() == 0
    assert "standins.py controller" in (cluster.folder.parent / "witnesses").read_text()
    assert cluster.nothing_is_left()


def test_who_ignores_sigterm_is_killed_after_the_grace(base: Path) -> None:
    cluster = Cluster(base, controller="deaf")
    cluster.wait_for("^ready")
    cluster.supervisor.terminate()
    assert cluster.end() == 0
    assert cluster.nothing_is_left()


@pytest.mark.parametrize("word", ["guardian.py", "standins.py controller", "standins.py zygote"])
def test_a_unit_that_dies_is_started_again_alone(cluster: Cluster, word: str) -> None:
    before = members(cluster.folder)
    victim = cluster.the(word)
    os.kill(victim, signal.SIGKILL)
    cluster.wait_for(rf"\(process {victim}\) died: starting it again")
    wait_until(lambda: len(members(cluster.folder)) == len(before))
    assert set(before) - set(members(cluster.folder)) == {victim}


def test_a_controller_that_stays_stopped_is_ended_and_started_again(base: Path) -> None:
    cluster = Cluster(base, patience_ms=3_000)
    cluster.wait_for("^ready")
    victim = cluster.the("standins.py controller")
    os.kill(victim, signal.SIGSTOP)
    cluster.wait_for(rf"the controller \(process {victim}\) has not answered for 3 s: ending it$")
    cluster.wait_for(rf"the controller \(process {victim}\) died: starting it again$")
    wait_until(lambda: cluster.pids("standins.py controller") - {victim})
    cluster.supervisor.terminate()
    assert cluster.end() == 0


def test_a_zygote_that_cannot_start_again_at_once_is_given_time(base: Path) -> None:
    cluster = Cluster(base, zygote="refuses-once-again")
    cluster.wait_for("^ready")
    os.kill(cluster.the("standins.py zygote"), signal.SIGKILL)
    for _ in range(2):
        cluster.wait_for(r"the zygote \(process \d+\) died: starting it again")
    wait_until((cluster.folder / "launcher.sock").exists)
    cluster.supervisor.terminate()
    assert cluster.end() == 0


@pytest.mark.parametrize("word", ["guardian.py", "standins.py controller", "standins.py zygote"])
def test_a_unit_that_cannot_be_started_for_a_moment_is_started_later(cluster: Cluster, word: str) -> None:
    supervisor = cluster.supervisor.pid
    before, highest = resource.prlimit(supervisor, resource.RLIMIT_NOFILE), max(map(int, descriptors(supervisor)))
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    os.kill(cluster.the(word), signal.SIGKILL)
    cluster.wait_for(r"cannot be started \(Too many open files\): trying again")
    resource.prlimit(supervisor, resource.RLIMIT_NOFILE, before)
    wait_until(lambda: len(cluster.pids(word)) == 1)
    cluster.supervisor.terminate()
    assert cluster.end() == 0


def descriptors(pid: int) -> list[str]:
    return os.listdir(f"/proc/{pid}/fd")


class Terminal:
    """A terminal with a cluster in it."""

    def __init__(self, base: Path) -> None:
        self.side, theirs = pty.openpty()
        port = free_port()
        self.folder = base / f"kevlarflow-{os.getuid()}" / str(port)
        self.supervisor = start_cluster(base, port, output=theirs)
        os.close(theirs)
        self.said = ""

    def shows(self, words: str) -> bool:
        while select.select([self.side], [], [], 0.01)[0]:
            self.said += os.read(self.side, 4096).decode()
        return words in self.said

    def controllers(self) -> set[int]:
        return {pid for pid, command in members(self.folder).items() if "standins.py controller" in command}


@pytest.fixture
def terminal(base: Path) -> Iterator[Terminal]:
    terminal = Terminal(base)
    wait_until(lambda: terminal.shows("ready in"))
    yield terminal
    terminal.supervisor.kill()
    terminal.supervisor.wait()
    wait_until(lambda: not members(terminal.folder))
    os.close(terminal.side)


CTRL_S, CTRL_Q = b"\x13", b"\x11"


def test_a_terminal_that_is_stopped_does_not_stop_the_supervisor(terminal: Terminal) -> None:
    os.write(terminal.side, CTRL_S)
    (controller,) = terminal.controllers()
    os.kill(controller, signal.SIGKILL)
    wait_until(lambda: terminal.controllers() - {controller})
    assert not terminal.shows("starting it again")
    os.write(terminal.side, CTRL_Q)
    wait_until(lambda: terminal.shows(f"(process {controller}) died: starting it again"))


def test_a_terminal_that_is_stopped_does_not_keep_a_cluster_from_ending(terminal: Terminal) -> None:
    os.write(terminal.side, CTRL_S)
    terminal.supervisor.terminate()
    assert terminal.supervisor.wait(timeout=60) == 0


def test_the_api_server_takes_its_engines_along(cluster: Cluster) -> None:
    servers = cluster.pids("kevlarflow: api-server")
    assert len(servers) == 2  # The server and its engine.
    os.kill(min(servers), signal.SIGKILL)
    cluster.wait_for("the API server .* died: starting it again")
    wait_until(lambda: len(cluster.pids("kevlarflow: api-server")) == 2)
    assert not servers & cluster.pids("kevlarflow: api-server")


def test_who_was_killed_and_is_not_reaped_yet_does_not_own_its_port(base: Path) -> None:
    cluster = Cluster(base)
    cluster.wait_for("^ready")
    os.kill(cluster.supervisor.pid, signal.SIGKILL)
    os.waitid(os.P_PID, cluster.supervisor.pid, os.WEXITED | os.WNOWAIT)
    assert owner_of(cluster.folder) is None
    await_predecessor(cluster.folder)
    # The guardian itself, which was done, may be on its way out.
    assert not [command for command in members(cluster.folder).values() if "guardian.py" not in command]
    second = start_cluster(base, cluster.port)
    try:
        assert second.stdout is not None
        assert any(line.startswith("ready") for line in second.stdout)
    finally:
        second.terminate()
        second.wait(timeout=60)
        cluster.supervisor.wait()


def test_a_second_cluster_on_the_port_is_refused(cluster: Cluster, base: Path) -> None:
    second = start_cluster(base, cluster.port)
    assert second.wait(timeout=60) == 2
    assert second.stderr is not None
    assert second.stderr.read() == (
        f"kevlarflow: port {cluster.port} is taken by another kevlarflow (main process {cluster.supervisor.pid}): "
        "end that one, or choose another port with --port\n"
    )


@pytest.mark.parametrize(
    ("behaviour", "status", "line"),
    [
        ({"zygote": "refuses"}, 2, r"^kevlarflow: --enable-lora is not supported yet$"),
        (
            {"zygote": "dies"},
            1,
            r"^kevlarflow: the zygote \(process \d+\) died during start-up: "
            r"RuntimeError: the zygote had a bad day; its log is \S+zygote\.log$",
        ),
        (
            {"zygote": "api-server-dies"},
            1,
            r"^kevlarflow: the API server \(process \d+\) died during start-up: "
            r"ValueError: no such chat template; its log is \S+api-server\.log$",
        ),
        ({"controller": "gives-up"}, 1, r"^kevlarflow: node-0-1 died during start-up; logs in \S+$"),
    ],
)
def test_a_failed_start_is_one_line_and_leaves_nothing(
    base: Path, behaviour: dict[str, str], status: int, line: str
) -> None:
    cluster = Cluster(base, **behaviour)
    assert cluster.end() == status
    errors = cluster.errors()
    assert errors.count("\n") == 1
    assert re.match(line, errors)
    assert cluster.nothing_is_left()


def test_logs_outlive_the_run(base: Path) -> None:
    cluster = Cluster(base, zygote="api-server-dies")
    cluster.end()
    log = cluster.folder.with_suffix(".logs") / "api-server.log"
    assert "ValueError: no such chat template" in log.read_text()


def test_a_run_without_incident_takes_its_logs_along(base: Path) -> None:
    cluster = Cluster(base)
    cluster.wait_for("^ready")
    assert cluster.folder.with_suffix(".logs").exists()
    cluster.supervisor.terminate()
    assert cluster.end() == 0
    assert list(cluster.folder.parent.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_is_interrupted_before_it_is_ready_takes_its_logs_along_too(base: Path, number: signal.Signals) -> None:
    cluster = Cluster(base, zygote="slow")
    cluster.wait_for("model checked")
    cluster.supervisor.send_signal(number)
    assert cluster.end() == 130
    assert cluster.errors() == ""
    assert list(cluster.folder.parent.iterdir()) == []


def test_what_is_refused_leaves_no_logs(base: Path) -> None:
    cluster = Cluster(base, zygote="refuses")
    assert cluster.end() == 2
    assert list(cluster.folder.parent.iterdir()) == []


def test_a_run_that_lost_a_process_keeps_its_logs(cluster: Cluster) -> None:
    victim = cluster.the("standins.py controller")
    os.kill(victim, signal.SIGKILL)
    cluster.wait_for(r"died: starting it again")
    cluster.supervisor.terminate()
    assert cluster.end() == 0
    cluster.wait_for(rf"^logs are kept in {cluster.folder}\.logs, because a process has failed$")
    assert f"process {victim}: status -9" in (cluster.folder.with_suffix(".logs") / "exits.log").read_text()


def test_a_full_disk_costs_the_log_and_not_the_cluster(cluster: Cluster) -> None:
    logs = cluster.folder.with_suffix(".logs")
    (logs / "exits.log").symlink_to("/dev/full")
    (logs / "controller.log").unlink()
    (logs / "controller.log").mkdir()  # It cannot be opened, as when there is no room for another file.
    for _ in range(2):
        victim = cluster.the("standins.py controller")
        os.kill(victim, signal.SIGKILL)
        cluster.wait_for(rf"\(process {victim}\) died: starting it again")
        wait_until(lambda: cluster.pids("standins.py controller"))
    cluster.supervisor.terminate()
    assert cluster.end() == 0
    assert cluster.errors() == ""


def test_a_log_does_not_grow_for_ever(cluster: Cluster) -> None:
    log = cluster.folder.with_suffix(".logs") / "api-server.log"
    with log.open("ab") as writer:
        writer.write(b"\0" * (MOST_LOG_BYTES + 1))
    wait_until(lambda: log.stat().st_size < MOST_LOG_BYTES)
    assert log.with_name("api-server.log.1").stat().st_size == MOST_LOG_BYTES


@pytest.mark.parametrize(
    ("arguments", "states", "line"),
    [
        ((), None, "waiting for the controller: it has not answered yet"),
        (
            (),
            ("starting", "starting", "waiting"),
            "waiting for nodes: 0 of 2 ready (compiling takes a minute or two the first time), "
            "engines: 0 of 2 ready, pipelines: 0 of 2 serving",
        ),
        (("--enforce-eager",), ("starting", "ready", "serving"), "waiting for nodes: 0 of 2 ready"),
        ((), ("ready", "starting", "serving"), "waiting for engines: 0 of 2 ready"),
        ((), ("ready", "ready", "serving"), "waiting for the API server: it does not answer yet"),
    ],
)
def test_what_is_awaited(tmp_path: Path, arguments: tuple[str, ...], states: tuple[str, ...] | None, line: str) -> None:
    config = msgspec.structs.replace(make_config(tmp_path, 8000), vllm_args=arguments)
    kinds = ("nodes", "engines", "pipelines")
    status = {kind: [{"state": state}] * 2 for kind, state in zip(kinds, states, strict=True)} if states else None
    assert awaited(config, status, model_is_checked=True) == line


def dead_process() -> Process:
    child = subprocess.Popen(["sleep", "1000"])
    process = Process("sleeper", child.pid, Path("/dev/null"))
    child.kill()
    child.wait()
    return process


def tls_context(folder: Path) -> ssl.SSLContext:
    """Of a server, with a certificate of its own making."""
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(certificate)
    return context


async def is_well(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()
    writer.close()


def schemes_found(folder: Path, context: ssl.SSLContext | None) -> list[str]:
    """By what a server is found to answer that is not known to serve, and that is."""

    async def ask() -> list[str]:
        server = await asyncio.start_server(is_well, "127.0.0.1", 0, ssl=context)
        config = make_config(folder, server.sockets[0].getsockname()[1])
        found = [await asyncio.to_thread(health_scheme, config, serving=serving) for serving in (False, True)]
        server.close()
        return found

    return asyncio.run(ask())


def test_a_server_without_certificates_answers_in_the_open(tmp_path: Path) -> None:
    assert schemes_found(tmp_path, None) == ["http", "http"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_server_with_a_certificate_answers_encrypted(tmp_path: Path) -> None:
    assert schemes_found(tmp_path, tls_context(tmp_path)) == ["https", "https"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_server_that_wants_certificates_of_its_clients_is_ready_when_the_controller_says_so(tmp_path: Path) -> None:
    context = tls_context(tmp_path)
    context.verify_mode = ssl.CERT_REQUIRED
    assert schemes_found(tmp_path, context) == ["", "https"]


@pytest.mark.parametrize(
    ("host", "scheme", "url"),
    [
        ("0.0.0.0", "http", "http://localhost:8000/v1"),
        ("::", "http", "http://localhost:8000/v1"),
        ("::1", "http", "http://[::1]:8000/v1"),
        ("example.org", "https", "https://example.org:8000/v1"),
        ("fe80::1", "https", "https://[fe80::1]:8000/v1"),
    ],
)
def test_the_address_of_a_server_that_is_ready_can_be_used(host: str, scheme: str, url: str, tmp_path: Path) -> None:
    config = msgspec.structs.replace(make_config(tmp_path, 8000), host=host)
    assert f" {url} (model stand-in, " in ready_line(config, scheme, 1.0)


def test_a_unit_that_keeps_dying_is_started_again_later_and_later() -> None:
    unit = Unit("sleeper", dead_process)
    pauses = []
    now = 100.0
    for _ in range(FAILURES_IN_A_ROW):
        unit.ensure(now)
        unit.bury(now)
        pauses.append(unit.due_at - now)
        now = unit.due_at
    assert pauses[0] == 0.0
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_SECONDS
    unit.ensure(now)
    unit.bury(now + LONG_LIFE_SECONDS + 1)
    assert (unit.failures, unit.due_at) == (1, now + LONG_LIFE_SECONDS + 1)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", ""),
        ("all is well\n\n", "all is well"),
        ("Traceback\n  File\nValueError: too small\nbye\n", "ValueError: too small"),
    ],
)
def test_last_words(tmp_path: Path, log: str, words: str) -> None:
    path = tmp_path / "log"
    path.write_text(log)
    assert last_words(path) == words
    assert last_words(tmp_path / "none") == ""
