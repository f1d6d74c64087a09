"""A cluster whose parts are real where processes are concerned, and do nothing else.

Guardian, supervisor and zygote are the real ones. In place of the controller, the API server and the nodes stand
processes that sleep, so that a whole cluster starts in a second. Run as a program, this file is one of the parts.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import msgspec

from kevlarflow import config as configuration
from kevlarflow.config import RUN_FOLDER_VARIABLE, ServeConfig, Timeouts
from kevlarflow.kinship import forks_die_with_us

HERE = str(Path(__file__).resolve())


def make_config(folder: Path, port: int) -> ServeConfig:
    return ServeConfig(
        model="/model",
        served_model_name="stand-in",
        host="127.0.0.1",
        port=port,
        stages=2,
        pipelines=2,
        kv_cache_memory_bytes=2**20,
        timeouts=Timeouts(stop_grace_s=2, startup_timeout_s=120),
        run_folder=str(folder),
    )


def start_cluster(
    base: Path,
    port: int,
    *,
    zygote: str = "works",
    controller: str = "works",
    terminal: str = "open",
    patience_ms: int = Timeouts().controller_lost_after_ms,
    output: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start a supervisor over stand-ins. `zygote` and `controller` say how those behave; `terminal` may be "nohup".

    A controller that says nothing is borne with for `patience_ms`.
    """
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(base)}
    command = [sys.executable, HERE, "supervisor", str(port), zygote, controller, terminal, str(patience_ms)]
    return subprocess.Popen(command, stdout=output, stderr=output, text=True, env=environment, process_group=0)


def members(run_folder: Path) -> dict[int, str]:
    """The processes that carry the run folder in their environment, with their command lines."""
    wanted = os.fsencode(f"{RUN_FOLDER_VARIABLE}={run_folder}")
    found = {}
    for name in os.listdir("/proc"):
        try:
            if name.isdecimal() and wanted in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found[int(name)] = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def wait_until(condition: object, seconds: float = 30.0) -> None:
    """Wait until a callable returns something true."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s: {condition}"
        time.sleep(0.02)


# ---- the parts


def _supervisor(port: int, zygote: str, controller: str, terminal: str, patience_ms: int) -> int:
    from kevlarflow.cli.main import complain
    from kevlarflow.cli.serve import child_environment, say
    from kevlarflow.control import supervisor
    from kevlarflow.control.run_folder import RunFolder
    from kevlarflow.control.supervisor import Programs, Supervisor
    from kevlarflow.errors import KevlarFlowError
    from kevlarflow.log_output import lose_what_cannot_be_written

    lose_what_cannot_be_written()
    if zygote == "slow":
        supervisor.QUIET_SECONDS = 0.5
    signal.signal(signal.SIGHUP, signal.SIG_IGN if terminal == "nohup" else signal.SIG_DFL)
    folder = configuration.run_folder_of(port)
    config = make_config(folder, port)
    timeouts = msgspec.structs.replace(config.timeouts, controller_lost_after_ms=patience_ms)
    config = msgspec.structs.replace(config, timeouts=timeouts)
    programs = Programs(
        zygote=(sys.executable, HERE, "zygote", zygote), controller=(sys.executable, HERE, "controller", controller)
    )
    try:
        run_folder = RunFolder(folder)
        configuration.save(config)
        return Supervisor(config, run_folder, child_environment(config), say, programs).run()
    except KevlarFlowError as error:
        return complain(str(error), error.exit_status)


def _zygote(behaviour: str, report_fd: int) -> int:
    from kevlarflow.node.zygote import Targets, Zygote

    config = configuration.load()
    with os.fdopen(report_fd, "w") as pipe:
        if behaviour == "refuses":
            json.dump({"error": "--enable-lora is not supported yet", "exit_status": 2}, pipe)
            return 1
        if behaviour == "refuses-once-again" and os.path.exists(config.launcher_path):
            # Its predecessor has left that.
            os.unlink(config.launcher_path)
            json.dump({"error": "no usable temporary folder", "exit_status": 1}, pipe)
            return 1
        if behaviour == "slow":
            time.sleep(1.0)
        if behaviour == "dies":
            raise RuntimeError("the zygote had a bad day")
        targets = {
            "api-server-dies": _dying_api_server,
            "api-server-finishes": _finishing_api_server,
            "slow": _slow_api_server,
        }
        target = targets.get(behaviour, _api_server)
        zygote = Zygote(config, Targets(node=lambda *_: time.sleep(1000), api_server=target))
        zygote.listen()
        json.dump({"model": {"layers": 4, "dtype": "float32", "kv_tokens": 1000}}, pipe)
    zygote.serve()
    return 0


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def _api_server(config: ServeConfig) -> None:
    forks_die_with_us()
    if os.fork() == 0:
        time.sleep(1000)  # The engine.
    HTTPServer((config.host, config.port), _Health).serve_forever()


def _finishing_api_server(config: ServeConfig) -> None:
    """When asked to end it has something to complete, and then leaves a file that names who was there to the end."""

    def finish(*_: object) -> None:
        time.sleep(0.5)
        folder = Path(config.run_folder)
        (folder.parent / "witnesses").write_text("\n".join(members(folder).values()))
        os._exit(0)

    signal.signal(signal.SIGTERM, finish)
    _api_server(config)


def _slow_api_server(config: ServeConfig) -> None:
    time.sleep(4.0)
    _api_server(config)


def _dying_api_server(_: ServeConfig) -> None:
    raise ValueError("no such chat template")


def _controller(behaviour: str) -> int:
    """Answer who subscribes, and, when "starting", who asks, with a cluster of which one node is ready."""
    import zmq

    from kevlarflow.wire.messages import AskStatus, Availability, Fatal, Status, Subscribe, decode, encode

    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    nodes = [{"state": state} for state in ("ready", "starting", "starting", "starting")]
    document = {"nodes": nodes, "engines": [{"state": "starting"}], "pipelines": [{"state": "serving"}]}
    router = zmq.Context.instance().socket(zmq.ROUTER)
    router.bind(configuration.load().controller_address)
    while True:
        peer, frame = router.recv_multipart()
        match decode(frame):
            case Subscribe() if behaviour == "gives-up":
                router.send_multipart([peer, encode(Fatal("node-0-1 died during start-up"))])
            case Subscribe():
                router.send_multipart([peer, encode(Availability(True, True, "", 0))])
            case AskStatus() if behaviour == "starting":
                router.send_multipart([peer, encode(Status(json.dumps(document).encode()))])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["supervisor", port, zygote, controller, terminal, patience_ms]:
            sys.exit(_supervisor(int(port), zygote, controller, terminal, int(patience_ms)))
        case ["zygote", behaviour, "--report-fd", report_fd]:
            sys.exit(_zygote(behaviour, int(report_fd)))
        case ["controller", behaviour]:
            sys.exit(_controller(behaviour))
