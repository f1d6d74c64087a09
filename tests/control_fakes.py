"""Nodes, engines and a launcher that speak the controller's messages and do nothing else.

Run as a program this file is a node: ``control_fakes.py RUN_FOLDER NODE INCARNATION STAGE``. Files in the run folder
bend it: ``fail-<node>`` makes it report a failure, ``hold-<node>`` makes it wait before it is ready, and
``hang-<member>`` makes it sleep in the middle of a step.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq
from setproctitle import setproctitle

from kevlarflow import config as configuration
from kevlarflow.config import ServeConfig, Timeouts
from kevlarflow.control.status import ask_status
from kevlarflow.kinship import TITLE
from kevlarflow.node.heartbeat import HeartbeatThread
from kevlarflow.node.pace import PaceMeter
from kevlarflow.node.progress import Progress
from kevlarflow.types import Epoch, Member, NodeId, NodeInfo, Phases, PipelineId, Stage
from kevlarflow.wire import messages
from kevlarflow.wire.messages import AnyMessage, decode, encode

FORMING = Phases(relink=0.001, restore=0.002, recompute=0.003, reissue=0.004)
"""What an engine says that its forming has taken."""


def connect(config: ServeConfig) -> zmq.Socket[bytes]:
    sock: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 500)
    sock.setsockopt(zmq.SNDHWM, 100)
    sock.setsockopt(zmq.RECONNECT_IVL, 20)
    sock.connect(config.controller_address)
    return sock


def environment_of(config: ServeConfig) -> dict[str, str]:
    run = {configuration.RUN_FOLDER_VARIABLE: config.run_folder, configuration.RUN_ID_VARIABLE: config.run_folder}
    # Without it a title would be written over the environment.
    return os.environ | run | {"SPT_NOENV": "1"}


def be_node(config: ServeConfig, member: Member, stage: Stage) -> None:
    """Start, beat as a node does, and leave when told to."""
    pids = (os.getpid(),)
    setproctitle(f"{TITLE}{member.node}-{member.incarnation}")
    progress = Progress(config.timeouts.step_floor_ms / 1_000)
    starting = messages.NodeStarting(member, stage, "here", pids)
    heartbeat = HeartbeatThread(config, starting, progress, PaceMeter(), dict)
    heartbeat.start()
    if os.path.exists(config.path(f"fail-{member.node}")):
        heartbeat.say_failed("no weights: use another --model")
        sys.exit(1)
    parent = os.getppid()
    while os.path.exists(config.path(f"hold-{member.node}")) and os.getppid() == parent:
        time.sleep(0.02)
    heartbeat.say_ready(NodeInfo(member, stage, "here", os.getpid(), pids, "ipc://steps", "ipc://activations", 2, 50))
    pipeline = PipelineId(int(member.node.split("-")[1]))
    # A test that is killed must not leave nodes behind.
    while os.getppid() == parent:
        progress.begin(pipeline)
        progress.measure(8)
        while os.path.exists(config.path(f"hang-{member}")) and os.getppid() == parent:
            time.sleep(60.0)
        progress.end()
        time.sleep(0.02)


class FakeEngine(threading.Thread):
    """Forms whatever it is told to form, at once. Its process is a `sleep`, so that it can be killed."""

    def __init__(self, config: ServeConfig, pipeline: int) -> None:
        super().__init__(daemon=True)
        self.config = config
        self.pipeline = PipelineId(pipeline)
        self.process = subprocess.Popen(["sleep", "600"])
        self.epoch = Epoch(0)
        self.members: tuple[Member, ...] = ()
        self.orders: list[messages.Form | messages.Suspend] = []
        self.running = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        sock = connect(self.config)
        self._attach(sock)
        while not self.stopping.is_set():
            with contextlib.suppress(zmq.Again):
                sock.send(encode(messages.EngineReport(self.pipeline, self.running, 0, 100, 0)), zmq.NOBLOCK)
            while sock.poll(50):
                self._take(sock, decode(sock.recv()))
        sock.close(linger=0)

    def _attach(self, sock: zmq.Socket[bytes]) -> None:
        attached = messages.EngineAttached(self.pipeline, self.process.pid, self.epoch, self.members)
        sock.send(encode(attached))

    def _take(self, sock: zmq.Socket[bytes], message: AnyMessage) -> None:
        match message:
            case messages.Introduce():
                self._attach(sock)
            case messages.Suspend():
                self.orders.append(message)
                self.epoch = message.epoch
            case messages.Form():
                self.orders.append(message)
                self.epoch = message.epoch
                self.members = tuple(info.member for info in message.nodes)
                sock.send(encode(messages.Formed(self.pipeline, self.epoch, FORMING, self.running, 0, 7)))
                if len(self.orders) == 1:
                    sock.send(encode(messages.EngineReady(self.pipeline, 100)))

    def stop(self) -> None:
        self.stopping.set()
        self.join(5)
        self.process.kill()
        self.process.wait()


class FakeLauncher(threading.Thread):
    """The zygote's socket; starts this file as a node."""

    def __init__(self, config: ServeConfig) -> None:
        super().__init__(daemon=True)
        self.config = config
        self.children: list[subprocess.Popen[bytes]] = []
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(config.launcher_path)
        self.listener.listen(8)
        self.listener.settimeout(0.05)
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            for child in list(self.children):
                child.poll()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while request := connection.recv(4096):
                order = decode(request)
                assert isinstance(order, messages.StartNode)
                arguments = [self.config.run_folder, order.node, str(order.incarnation), str(order.stage)]
                command = [sys.executable, __file__, *arguments]
                child = subprocess.Popen(command, env=environment_of(self.config))
                self.children.append(child)
                connection.send(encode(messages.Started(child.pid)))

    def stop(self) -> None:
        self.stopping.set()
        self.join(5)
        self.listener.close()
        for child in self.children:
            child.kill()
            child.wait()


class FakeCluster:
    """A real controller with the fakes above around it."""

    def __init__(self, folder: Path, *, stages: int = 2, pipelines: int = 2, timeouts: Timeouts | None = None) -> None:
        folder.chmod(0o700)
        self.config = ServeConfig(
            model="/models/none",
            served_model_name="none",
            host="127.0.0.1",
            port=1,
            stages=stages,
            pipelines=pipelines,
            kv_cache_memory_bytes=1,
            timeouts=timeouts or Timeouts(),
            run_folder=str(folder),
        )
        configuration.save(self.config)
        self.controller: subprocess.Popen[bytes] | None = None
        self.launcher: FakeLauncher | None = None
        self.engines: list[FakeEngine] = []

    def start_controller(self) -> None:
        environment = environment_of(self.config)
        command = [sys.executable, "-m", "kevlarflow.control.controller"]
        with open(self.config.path("controller.log"), "ab") as log:
            self.controller = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def start_launcher(self) -> None:
        self.launcher = FakeLauncher(self.config)
        self.launcher.start()

    def start_engines(self) -> None:
        self.engines = [FakeEngine(self.config, pipeline) for pipeline in range(self.config.pipelines)]
        for engine in self.engines:
            engine.start()

    def start(self) -> FakeCluster:
        self.start_controller()
        self.start_launcher()
        self.start_engines()
        return self

    def stop(self) -> None:
        for engine in self.engines:
            engine.stop()
        if self.controller is not None:
            self.controller.kill()
            self.controller.wait()
        if self.launcher is not None:
            self.launcher.stop()

    def status(self) -> dict:
        return ask_status(Path(self.config.run_folder))

    def node(self, name: str) -> dict:
        return next(node for node in self.status()["nodes"] if node["id"] == name)

    def wait(self, condition: Callable[[dict], bool], what: str, seconds: float = 60.0) -> dict:
        deadline = time.monotonic() + seconds
        document: dict = {}
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                document = self.status()
                if condition(document):
                    return document
            time.sleep(0.02)
        raise AssertionError(f"{what} did not happen in {seconds} s: {document}\n{self.log()}")

    def wait_serving(self) -> dict:
        return self.wait(all_serve, "that all pipelines serve")

    def log(self) -> str:
        return Path(self.config.path("controller.log")).read_text()


def all_serve(document: dict) -> bool:
    return all(pipeline["state"] == "serving" for pipeline in document["pipelines"])


@contextlib.contextmanager
def fake_cluster(folder: Path, **options: object) -> Iterator[FakeCluster]:
    cluster = FakeCluster(folder, **options)  # type: ignore[arg-type]
    try:
        yield cluster
    finally:
        cluster.stop()


if __name__ == "__main__":
    run_folder, node, incarnation, stage = sys.argv[1:]
    be_node(configuration.load(run_folder), Member(NodeId(node), int(incarnation)), Stage(int(stage)))
