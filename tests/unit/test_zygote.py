"""The zygote's forks, with stand-ins for what they run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec
import pytest

from kevlarflow.config import ServeConfig
from kevlarflow.errors import KevlarFlowError
from kevlarflow.kinship import adopt_orphans, die_with_parent
from kevlarflow.log_output import lose_what_cannot_be_written
from kevlarflow.node.zygote import Targets, Zygote, redirect_output, require_one_thread
from kevlarflow.types import NodeId, Stage
from kevlarflow.wire.messages import AnyMessage, AskStatus, StartApiServer, Started, StartNode, decode, encode
from standins import make_config, wait_until

PATIENCE_SECONDS = 30.0
NODE = StartNode(NodeId("node-0-1"), 3, Stage(1))


def report(config: ServeConfig, *what: object) -> None:
    """Write down what a forked process is like, then stay."""
    descriptors = sorted(int(name) for name in os.listdir("/proc/self/fd"))
    facts = {
        "what": [str(each) for each in what],
        "group": os.getpgrp(),
        "pid": os.getpid(),
        "sockets": [fd for fd in descriptors if is_socket(fd)],
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
    }
    path = Path(config.path("facts"))
    path.with_suffix(".new").write_bytes(msgspec.json.encode(facts))
    path.with_suffix(".new").rename(path)
    print("said to the log", flush=True)
    time.sleep(1000)


def is_socket(descriptor: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").startswith("socket:")
    except OSError:
        return False


def fail(_: ServeConfig) -> None:
    raise ValueError("no such template")


@pytest.fixture
def config() -> Iterator[ServeConfig]:
    base = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    made = make_config(base / "run", 8000)
    Path(made.run_folder).mkdir()
    Path(made.log_folder).mkdir()
    yield made
    subprocess.run(["rm", "-rf", str(base)], check=True)


@pytest.fixture
def zygote(config: ServeConfig, request: pytest.FixtureRequest) -> Iterator[int]:
    """The process id of a zygote, in a family as the supervisor makes it. A parameter is the path of its log."""
    told, tell = os.pipe()
    supervisor = os.fork()
    if supervisor == 0:
        try:
            adopt_orphans()
            pid = os.fork()
            if pid == 0:
                serve(config, getattr(request, "param", os.devnull))
            os.write(tell, str(pid).encode())
            while True:
                os.wait()
        finally:
            os._exit(1)
    yield int(os.read(told, 32))
    os.close(told)
    os.close(tell)
    os.kill(supervisor, signal.SIGKILL)  # What was forked dies with it.
    os.waitpid(supervisor, 0)


def serve(config: ServeConfig, log: str) -> NoReturn:
    """Be the zygote."""
    try:
        redirect_output(log)
        die_with_parent(os.getppid())
        # Other tests of this process may have left sockets open: they are not the zygote's.
        for descriptor in filter(is_socket, map(int, os.listdir("/proc/self/fd"))):
            os.close(descriptor)
        # Pytest has put its own files in their place.
        lose_what_cannot_be_written()
        running = Zygote(config, Targets(node=report, api_server=fail))
        running.listen()
        running.serve()
    finally:
        os._exit(1)


def connect(config: ServeConfig) -> socket.socket:
    launcher = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher.settimeout(PATIENCE_SECONDS)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            launcher.connect(config.launcher_path)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            return launcher


def siblings_of(pid: int) -> list[str]:
    """The other children of its parent: of a zygote, what it has forked."""
    parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [child for child in children if int(child) != pid]


def ask(launcher: socket.socket, message: AnyMessage) -> int:
    launcher.send(encode(message))
    answer = decode(launcher.recv(4096))
    assert isinstance(answer, Started)
    return answer.pid


@pytest.mark.usefixtures("zygote")
def test_a_node_gets_a_place_of_its_own(config: ServeConfig) -> None:
    with connect(config) as first, connect(config) as second:
        pid = ask(second, NODE)
        wait_until(lambda: Path(config.path("facts")).exists())
        facts = msgspec.json.decode(Path(config.path("facts")).read_bytes())
        assert facts["what"] == ["node-0-1#3", "1"]
        assert facts["pid"] == facts["group"] == pid
        # Neither the launcher's socket nor any connection to it: a node must not answer in the zygote's place.
        assert facts["sockets"] == []
        assert facts["sigterm"]
        assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"kevlarflow: node-0-1-3")
        wait_until(lambda: "said to the log" in Path(config.log_folder, "node-0-1-3.log").read_text())
        first.close()


@pytest.mark.parametrize("zygote", ["/dev/full"], indirect=True)
@pytest.mark.parametrize("log_exists", [True, False])
def test_a_full_disk_costs_the_logs_and_neither_zygote_nor_node(
    config: ServeConfig, zygote: int, log_exists: bool
) -> None:
    if log_exists:
        Path(config.log_folder, "node-0-1-3.log").symlink_to("/dev/full")
    else:
        Path(config.log_folder).rmdir()
    with connect(config) as launcher:
        pid = ask(launcher, NODE)
        wait_until(lambda: Path(config.path("facts")).exists())
        # What it said was lost; that it said it did not end it, nor the zygote.
        ask(launcher, StartApiServer())
        wait_until(lambda: siblings_of(zygote) == [str(pid)])


@pytest.mark.usefixtures("zygote")
def test_what_fails_leaves_a_traceback_in_its_log_and_is_reaped(config: ServeConfig) -> None:
    with connect(config) as launcher:
        pid = ask(launcher, StartApiServer())
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert "ValueError: no such template" in Path(config.log_folder, "api-server.log").read_text()


@pytest.mark.usefixtures("zygote")
@pytest.mark.parametrize("frame", [b"nonsense", encode(AskStatus())])
def test_nonsense_costs_the_sender_its_connection_only(config: ServeConfig, frame: bytes) -> None:
    with connect(config) as good, connect(config) as bad:
        bad.send(frame)
        assert bad.recv(4096) == b""
        assert ask(good, StartApiServer()) > 0


@pytest.mark.usefixtures("zygote")
def test_who_has_given_up_gets_no_process(config: ServeConfig, zygote: int) -> None:
    connect(config).close()
    os.kill(zygote, signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as launcher:
        wait_until(lambda: launcher.connect_ex(config.launcher_path) == 0)
        launcher.send(encode(NODE))
    os.kill(zygote, signal.SIGCONT)
    with connect(config) as launcher:
        ask(launcher, StartApiServer())  # So the request before this one has been dealt with.
    # What was forked for it would stay.
    wait_until(lambda: siblings_of(zygote) == [])


def test_a_predecessors_socket_is_replaced(config: ServeConfig) -> None:
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                Zygote(config, Targets(node=report, api_server=fail)).listen()
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_temporary_files_have_their_folder_while_the_disk_is_full(config: ServeConfig) -> None:
    Path(config.scratch_folder).mkdir()
    program = (
        "import resource, sys, tempfile, types; from kevlarflow.node.zygote import use_scratch_folder;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY));"
        "use_scratch_folder(types.SimpleNamespace(scratch_folder=sys.argv[1])); print(tempfile.gettempdir())"
    )
    command = [sys.executable, "-c", program, config.scratch_folder]
    assert subprocess.check_output(command, text=True).strip() == config.scratch_folder


def test_a_process_with_threads_is_refused() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(KevlarFlowError, match=r"the zygote has \d+ threads .* set OMP_NUM_THREADS=1"):
            require_one_thread()
    finally:
        stop.set()
        thread.join()
