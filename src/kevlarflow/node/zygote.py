"""The zygote: imports torch and vLLM once, checks the configuration, and forks every process that needs them.

Importing costs 8 s and 600 MB. A fork shares all of it and takes 20 ms, so a node that replaces a dead one is
loading weights while a fresh interpreter would still be importing.

Forking is safe here because the zygote has one thread, which is checked before it listens: no lock can be held by
a thread that the child does not have. It opens nothing, computes nothing, and answers one question at a time on a
Unix socket in the run folder: `StartNode` or `StartApiServer`, answered by `Started`.

What it forks are the supervisor's children, not its own: they die with the supervisor, in the same moment, and live on
when the zygote dies.

To the supervisor it reports once, through an inherited pipe: what the check of the configuration found out about
the model, or the one line that says why the cluster cannot start.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
from setproctitle import setproctitle

from kevlarflow import config as configuration
from kevlarflow.config import ServeConfig
from kevlarflow.errors import KevlarFlowError
from kevlarflow.kinship import TITLE, fork_for_parent
from kevlarflow.log_output import STANDARD_ERROR, STANDARD_OUTPUT, lose_what_cannot_be_written
from kevlarflow.types import Member, Stage
from kevlarflow.wire.messages import StartApiServer, Started, StartNode, decode, encode

# Named by strings, because engines and nodes know each other only through wire/.
CHECK = "kevlarflow.engine.arguments:inspect"
RUN_NODE = "kevlarflow.node.main:run"
REGISTER_KERNELS = "kevlarflow.node.cpu:register_kernels"
STAGE_CONFIG = "kevlarflow.engine.arguments:stage_config"
RUN_API_SERVER = "kevlarflow.engine.api_server:run"

PRELOADED = (
    "kevlarflow.node.main",
    "kevlarflow.engine.api_server",
    "kevlarflow.engine.executor",
    "kevlarflow.engine.scheduler",
    # What nodes import while they load.
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.online.base",
    # What the API server and its engines import while they start.
    "model_hosting_container_standards.sagemaker",
    "uvicorn.protocols.http.httptools_impl",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.serve.instrumentator.metrics",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.v1.engine.coordinator",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.structured_output.backend_xgrammar",
)
"""Modules that vLLM imports where it first needs them. Found by listing the imports of forked processes."""
LARGEST_REQUEST = 4096
BACKLOG = 16


@dataclass(frozen=True)
class Targets:
    """What the forked processes run."""

    node: Callable[[ServeConfig, Member, Stage], object]
    api_server: Callable[[ServeConfig], object]


class Zygote:
    """Serves fork requests until it is killed."""

    def __init__(self, config: ServeConfig, targets: Targets) -> None:
        self.config = config
        self.targets = targets
        self.selector = selectors.DefaultSelector()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.selector.register(self.listener, selectors.EVENT_READ)

    def listen(self) -> None:
        """From now on whoever asks is answered, though perhaps later."""
        if os.path.exists(self.config.launcher_path):
            os.unlink(self.config.launcher_path)  # A predecessor that was killed left it.
        self.listener.bind(self.config.launcher_path)
        self.listener.listen(BACKLOG)

    def serve(self) -> None:
        """Fork, forever."""
        while True:
            for key, _ in self.selector.select():
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if ready is self.listener:
                    connection, _ = self.listener.accept()
                    self.selector.register(connection, selectors.EVENT_READ)
                else:
                    self._answer(ready)

    def _answer(self, connection: socket.socket) -> None:
        try:
            request = connection.recv(LARGEST_REQUEST)
            if request:
                self._tell(connection, self._start(request))
                return
        except (OSError, msgspec.MsgspecError) as error:
            print(f"zygote: dropped a connection: {error}", file=sys.stderr, flush=True)
        self.selector.unregister(connection)
        connection.close()

    def _tell(self, connection: socket.socket, pid: int) -> None:
        try:
            connection.send(encode(Started(pid=pid)))
        except OSError:
            os.kill(pid, signal.SIGKILL)  # Whoever asked has given up, and would ask for another one.
            raise

    def _start(self, request: bytes) -> int:
        match decode(request):
            case StartNode(node=node, incarnation=incarnation, stage=stage):
                member = Member(node, incarnation)
                return self._fork(f"{node}-{incarnation}", lambda: self.targets.node(self.config, member, stage))
            case StartApiServer():
                return self._fork("api-server", lambda: self.targets.api_server(self.config))
            case other:
                raise msgspec.ValidationError(f"{type(other).__name__} is not for the zygote")

    def _fork(self, name: str, body: Callable[[], object]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = fork_for_parent(lambda: self._run_child(name, body))
        print(f"zygote: started {name} (process {pid})", file=sys.stderr, flush=True)
        return pid

    def _run_child(self, name: str, body: Callable[[], object]) -> NoReturn:
        status = 1
        try:
            self._leave_zygote(name)
            body()
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _leave_zygote(self, name: str) -> None:
        """Give the child a place of its own: process group, signals, log, title; and close what is the zygote's."""
        # A group of its own: Ctrl-C in the terminal is for the supervisor, which ends the others in order.
        os.setpgid(0, 0)
        for key in list(self.selector.get_map().values()):
            assert isinstance(key.fileobj, socket.socket)
            key.fileobj.close()
        self.selector.close()
        redirect_output(os.path.join(self.config.log_folder, f"{name}.log"))
        setproctitle(f"{TITLE}{name}")


def redirect_output(path: str) -> None:
    """Append what this process writes to a log from now on. Where that cannot be made, it goes where it went before."""
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): this is the log", file=sys.stderr)
        return
    os.dup2(log, STANDARD_OUTPUT)
    os.dup2(log, STANDARD_ERROR)
    os.close(log)


def use_scratch_folder(config: ServeConfig) -> None:
    """Have temporary files in our own folder without a try: Python's own choice finds none while the disk is full."""
    tempfile.tempdir = config.scratch_folder


def load(target: str) -> Any:
    """Return the object that ``module:name`` stands for."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def require_one_thread() -> None:
    """Refuse to fork from a process with threads, Python's or others': a fork keeps their locks, not them."""
    tasks = len(os.listdir("/proc/self/task"))
    if tasks != 1 or threading.active_count() != 1:
        raise KevlarFlowError(
            f"the zygote has {tasks} threads after its imports and cannot fork: "
            "set OMP_NUM_THREADS=1, or unset VLLM_PLUGINS to leave out a plugin that starts threads"
        )


def prepare(config: ServeConfig) -> dict[str, Any]:
    """Import everything, check the configuration, and return what is now known about the model."""
    started = time.monotonic()
    check = load(CHECK)
    facts: dict[str, Any] = msgspec.to_builtins(check(config))
    for module in PRELOADED:
        with contextlib.suppress(ModuleNotFoundError):  # An optional part; whoever needs it will say so.
            importlib.import_module(module)
    # Once here, or 0.75 s in every node.
    load(REGISTER_KERNELS)()
    require_one_thread()
    gc.collect()
    # The collector writes into every object it looks at, and would unshare the pages that forks share.
    gc.freeze()
    return facts | {"seconds": time.monotonic() - started}


def main(arguments: list[str] | None = None) -> int:
    """Prepare, report to the supervisor, serve."""
    parser = argparse.ArgumentParser(prog="python -m kevlarflow.node.zygote", description=main.__doc__)
    parser.add_argument("--report-fd", type=int, required=True, help="pipe to the supervisor")
    options = parser.parse_args(arguments)
    os.set_inheritable(options.report_fd, False)
    # Before vLLM is imported, whose loggers keep the streams that they find.
    lose_what_cannot_be_written()
    with os.fdopen(options.report_fd, "w") as supervisor:
        try:
            config = configuration.load()
            use_scratch_folder(config)
            facts = prepare(config)
            zygote = Zygote(
                config, Targets(functools.partial(load(RUN_NODE), configure=load(STAGE_CONFIG)), load(RUN_API_SERVER))
            )
            # Listening comes first, so that whoever hears of it can connect at once.
            zygote.listen()
        except Exception as error:
            traceback.print_exc()
            json.dump(_reason(error), supervisor)
            return 1
        json.dump({"model": facts}, supervisor)
    zygote.serve()
    return 0


def _reason(error: Exception) -> dict[str, Any]:
    if isinstance(error, KevlarFlowError):
        return {"error": str(error), "exit_status": error.exit_status}
    return {"error": " ".join(f"{type(error).__name__}: {error}".split()), "exit_status": 1}


if __name__ == "__main__":
    sys.exit(main())
