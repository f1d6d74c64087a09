"""A stand-in for controller and supervisor, so that a test can say itself who starts when, and who forms a pipeline.

It speaks the control messages with real nodes and a real engine. Nodes are started one at a time, in any order, and
know nothing of each other; a pipeline is whatever `form` says it is.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import httpx

from integration.cluster import BYTES_PER_TOKEN_AND_LAYER, FLAGS, LAYERS_PER_STAGE
from kevlarflow import config as configuration
from kevlarflow.bench.systems import free_port
from kevlarflow.cli.serve import child_environment
from kevlarflow.config import RUN_FOLDER_VARIABLE, RUN_ID_VARIABLE, ServeConfig
from kevlarflow.default_model import ensure_default_model
from kevlarflow.faults.processes import with_environment
from kevlarflow.kinship import adopt_orphans
from kevlarflow.types import Cause, Epoch, Member, NodeId, NodeInfo, PipelineId, Stage
from kevlarflow.wire import messages
from kevlarflow.wire.channel import ZmqHub
from parity.workload import MODEL

M = TypeVar("M")

STEP_TIMEOUT_SECONDS = 120.0
PIPELINE = PipelineId(0)
KV_TOKENS = 1408


class StandIn:
    """See the module's text."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        self.hub = ZmqHub(config.controller_address)
        self.inbox: list[tuple[bytes, messages.AnyMessage]] = []
        self.serving = False
        self.epoch = 0
        self.base_url = f"http://127.0.0.1:{config.port}"

    # ---- the launcher's side

    def fork(self, order: messages.StartNode | messages.StartApiServer) -> int:
        """Have the zygote start a process."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as launcher:
            launcher.settimeout(STEP_TIMEOUT_SECONDS)
            launcher.connect(self.config.launcher_path)
            launcher.send(messages.encode(order))
            answer = messages.decode(launcher.recv(4096))
        assert isinstance(answer, messages.Started), answer
        return answer.pid

    def start_node(self, name: str, stage: int) -> NodeInfo:
        """Start one node and wait until it holds its weights and KV memory."""
        pid = self.fork(messages.StartNode(NodeId(name), 1, Stage(stage)))
        ready = self.wait_for(messages.NodeReady, lambda message: message.info.pid == pid)
        assert ready.info.member == Member(NodeId(name), 1)
        assert ready.info.stage == stage
        return ready.info

    # ---- the controller's side

    def form(self, *nodes: NodeInfo, released: tuple[NodeInfo, ...] = (), lost: tuple[int, ...] = ()) -> None:
        """Make these nodes the pipeline, and wait until it generates."""
        self.epoch += 1
        order = messages.Form(
            pipeline=PIPELINE,
            epoch=Epoch(self.epoch),
            nodes=nodes,
            released=released,
            cause=Cause.START if self.epoch == 1 else Cause.CRASH,
            lost_stages=tuple(Stage(stage) for stage in lost),
        )
        assert self.hub.send(self.engine, messages.encode(order))
        self.wait_for(messages.Formed, lambda message: message.epoch == self.epoch)

    def attach_engine(self) -> None:
        """Wait for an engine."""
        self.wait_for(messages.EngineAttached)
        self.engine = next(peer for peer, message in self.inbox if isinstance(message, messages.EngineAttached))

    def wait_for(self, kind: type[M], wanted: Callable[[M], bool] = lambda message: True) -> M:
        """The first message of a kind that came, or comes within the deadline; everybody else is served meanwhile."""
        deadline = time.monotonic() + STEP_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            for _, message in self.inbox:
                if isinstance(message, messages.NodeFailed):
                    raise AssertionError(f"{message.member} failed: {message.reason}")
                if isinstance(message, kind) and wanted(message):
                    return message
            self.pump(50)
        raise AssertionError(f"no {kind.__name__} within {STEP_TIMEOUT_SECONDS:.0f} s")

    def pump(self, timeout_ms: int) -> None:
        """Take what waits, and answer those who ask."""
        self.hub.socket.poll(timeout_ms)
        while (received := self.hub.receive()) is not None:
            peer, frame = received
            message = messages.decode(frame)
            if isinstance(message, messages.Subscribe):
                word = messages.Availability(self.serving, self.serving, "a test says so", 1)
                self.hub.send(peer, messages.encode(word))
            elif isinstance(message, messages.AskMetrics):
                self.hub.send(peer, messages.encode(messages.Metrics(b"")))
            elif not isinstance(message, messages.Heartbeat | messages.EngineReport):
                self.inbox.append((peer, message))

    def wait_healthy(self) -> None:
        """Say that the cluster serves, and wait until /health agrees."""
        self.serving = True
        deadline = time.monotonic() + STEP_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            self.pump(100)
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.base_url}/health", timeout=5.0).status_code == httpx.codes.OK:
                    return
        raise AssertionError("/health never became 200")


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A zygote and a stand-in controller, for one pipeline of two stages; nothing of it is left afterwards."""
    with tempfile.TemporaryDirectory(prefix="kf-", ignore_cleanup_errors=True) as base:
        config = _config(Path(base) / "run")
        for folder in (config.run_folder, config.path("tmp"), config.log_folder):
            os.mkdir(folder, 0o700)
        configuration.save(config)
        zygote = _start_zygote(config)
        controller = StandIn(config)
        try:
            yield controller
        except BaseException:
            for log in sorted(Path(config.log_folder).glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
            raise
        finally:
            controller.hub.close()
            zygote.kill()
            zygote.wait()
            for pid in with_environment(RUN_FOLDER_VARIABLE, config.run_folder):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _config(run_folder: Path) -> ServeConfig:
    return ServeConfig(
        model=str(ensure_default_model()),
        served_model_name=MODEL,
        host="127.0.0.1",
        port=free_port(),
        stages=2,
        pipelines=1,
        kv_cache_memory_bytes=KV_TOKENS * LAYERS_PER_STAGE * BYTES_PER_TOKEN_AND_LAYER,
        vllm_args=tuple(flag for flag in FLAGS if not flag.startswith("--kv-cache-memory-bytes")),
        run_folder=str(run_folder),
    )


def _start_zygote(config: ServeConfig) -> subprocess.Popen[bytes]:
    adopt_orphans()  # As a supervisor does: what a zygote forks becomes its parent's.
    reading, writing = os.pipe()
    environment = child_environment(config) | {RUN_FOLDER_VARIABLE: config.run_folder, RUN_ID_VARIABLE: "test"}
    with (Path(config.log_folder) / "zygote.log").open("wb") as log:
        zygote = subprocess.Popen(
            [sys.executable, "-m", "kevlarflow.node.zygote", "--report-fd", str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=(writing,),
        )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        report = json.loads(pipe.read() or '{"error": "the zygote died"}')
    if "model" not in report:
        zygote.kill()
        zygote.wait()
        raise AssertionError(report["error"])
    return zygote
