"""Systems under test: real child processes that get ready, die, or leave something behind."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from kevlarflow.bench.experiment import running
from kevlarflow.bench.recipes import KEVLARFLOW, STOCK, Recipe, make
from kevlarflow.bench.systems import ServerProcess, SystemFailed

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
STUBBORN_CHILD = """
import signal, subprocess, sys
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", child], start_new_session=True, stdout=subprocess.PIPE)
process.stdout.readline()
"""


def server(folder: Path, code: str) -> ServerProcess:
    return ServerProcess("a server", "m", lambda port: [sys.executable, "-c", code, str(port)], {}, folder / "log")


def test_ready_then_stopped_with_nothing_left(tmp_path: Path):
    system = server(tmp_path, SERVER)
    leftovers: list[str] = []
    with running(system, leftovers) as seconds:
        assert 0 < seconds < 30
        processes = system.processes()
        assert len(processes) == 1
    assert leftovers == []
    assert not Path(f"/proc/{processes[0].pid}").exists()
    assert system.stop() == []


def test_what_is_left_running_is_reported_and_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kevlarflow.bench.systems.LINGER_SECONDS", 0.2)
    system = server(tmp_path, STUBBORN_CHILD + SERVER)
    system.start()
    system.wait_ready()
    pids = [process.pid for process in system.processes()]
    assert len(pids) == 2
    (left,) = system.stop()
    assert "import signal, time" in left
    deadline = time.monotonic() + 30
    while any(_runs(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_system_that_dies_says_its_last_words(tmp_path: Path):
    system = server(tmp_path, "import sys; sys.exit('kevlarflow: no memory for this')")
    expected = "a server ended with exit status 1: no memory for this"
    with pytest.raises(SystemFailed, match=expected), running(system, []):
        pytest.fail("it was never ready")


def test_a_system_that_never_gets_ready_is_given_up_and_stopped(tmp_path: Path):
    system = server(tmp_path, "import time; time.sleep(60)")
    system.start()
    (process,) = system.processes()
    with pytest.raises(SystemFailed, match="not ready after 0 s"):
        system.wait_ready(timeout_seconds=0.2)
    system.stop()
    assert not Path(f"/proc/{process.pid}").exists()


def test_both_systems_get_the_same_flags(tmp_path: Path):
    recipe = Recipe(model="/m", eager=True, dtype="float32")
    commands = {name: make(name, recipe, tmp_path)._make_command(8123) for name in (STOCK, KEVLARFLOW)}
    joined = " ".join(recipe.flags())
    assert all(joined in " ".join(command) for command in commands.values())
    assert all("--enforce-eager" in command and "8123" in command for command in commands.values())
    assert "--worker-extension-cls" not in commands[KEVLARFLOW]


@pytest.mark.parametrize(("eager", "stages", "remedied"), [(True, 2, True), (False, 2, False), (True, 1, False)])
def test_only_an_eager_pipeline_of_stock_gets_the_remedy(tmp_path: Path, eager: bool, stages: int, remedied: bool):
    recipe = Recipe(model="/m", eager=eager, stages=stages)
    command = make(STOCK, recipe, tmp_path)._make_command(8123)
    assert ("--worker-extension-cls" in command) == remedied


def test_systems_have_caches_of_their_own(tmp_path: Path):
    assert (
        os.fspath(tmp_path) in make(STOCK, Recipe(model="/m"), tmp_path, tmp_path / "c")._environment["VLLM_CACHE_ROOT"]
    )
    assert "VLLM_CACHE_ROOT" not in make(KEVLARFLOW, Recipe(), tmp_path)._environment
