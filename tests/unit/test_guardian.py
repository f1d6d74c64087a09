from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from kevlarflow.config import RUN_FOLDER_VARIABLE, RUN_ID_VARIABLE
from kevlarflow.control import guardian
from kevlarflow.control.run_folder import LOGS_KEPT, RunFolder, make_private
from kevlarflow.errors import UsageError
from kevlarflow.faults.processes import identify
from standins import members, wait_until


class Sleepers:
    """Processes that carry the environment of a run."""

    def __init__(self) -> None:
        self.all: list[subprocess.Popen[bytes]] = []

    def start(
        self, folder: Path, run_id: str, script: str = "import time; time.sleep(1000)"
    ) -> subprocess.Popen[bytes]:
        environment = {**os.environ, RUN_FOLDER_VARIABLE: str(folder), RUN_ID_VARIABLE: run_id}
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", f"{script}\n"], env=environment, stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        self.all.append(child)
        return child


@pytest.fixture
def sleepers() -> Iterator[Sleepers]:
    started = Sleepers()
    yield started
    for child in started.all:
        child.kill()
        child.communicate()


@pytest.fixture
def folder() -> Iterator[Path]:
    # Short, because Unix sockets would live below it.
    base = Path(subprocess.check_output(["mktemp", "-d"], text=True).strip())
    yield base / "private" / "8000"
    subprocess.run(["rm", "-rf", str(base)], check=True)


def test_the_names_of_the_variables_agree() -> None:
    assert guardian.RUN_FOLDER_VARIABLE == RUN_FOLDER_VARIABLE
    assert guardian.RUN_ID_VARIABLE == RUN_ID_VARIABLE


def test_it_imports_the_standard_library_only() -> None:
    command = [sys.executable, "-I", "-S", "-X", "importtime", guardian.__file__, "x", "x", "0", "x", "1"]
    outcome = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in outcome.stderr.splitlines() if "|" in line
    }
    assert imported - {"imported package"} <= set(sys.stdlib_module_names) | {"__phello__"}


def test_a_sweep_takes_the_run_and_nobody_else(sleepers: Sleepers, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "socket").touch()
    ours = [sleepers.start(folder, "one") for _ in range(3)]
    other_run, other_folder = sleepers.start(folder, "two"), sleepers.start(folder.parent, "one")
    wait_until(lambda: len(members(folder)) == 4)
    assert guardian.sweep(str(folder), "one") == []
    assert [child.wait(30) for child in ours] == [-9, -9, -9]
    assert other_run.poll() is None
    assert other_folder.poll() is None
    assert not folder.exists()


def test_who_takes_long_to_die_is_waited_for(sleepers: Sleepers, folder: Path) -> None:
    """The kernel gives the memory back first: then the environment is gone, but the process is not, nor its sockets."""
    script = "held = b'x' * (1 << 30); print(flush=True); import time; time.sleep(1000)"
    heavy = sleepers.start(folder, "one", script)
    assert heavy.stdout is not None
    heavy.stdout.readline()
    assert guardian.sweep(str(folder), "one") == []
    assert identify(heavy.pid) is None


def test_forked_and_renamed_children_are_found(sleepers: Sleepers, folder: Path) -> None:
    script = "import os, time; os.fork(); os.setsid() if os.fork() == 0 else None; time.sleep(1000)"
    parent = sleepers.start(folder, "one", script)
    wait_until(lambda: len(members(folder)) == 4)
    parent.kill()
    parent.wait()
    guardian.sweep(str(folder), "one")
    assert members(folder) == {}


def test_shared_memory_goes_unless_others_use_it(sleepers: Sleepers, folder: Path) -> None:
    names = [f"/dev/shm/kevlarflow-test-{uuid.uuid4().hex}" for _ in range(2)]
    for name in names:
        Path(name).write_bytes(b"0" * 4096)
    script = (
        f"import mmap, time; files = [open(name, 'r+b') for name in {names!r}[:COUNT]]; "
        "maps = [mmap.mmap(file.fileno(), 0) for file in files]; "
        "print(1, flush=True); time.sleep(1000)"
    )
    try:
        for child in (
            sleepers.start(folder, "one", script.replace("COUNT", "2")),
            sleepers.start(folder.parent, "other", script.replace("COUNT", "1")),
        ):
            assert child.stdout is not None
            child.stdout.readline()
        guardian.sweep(str(folder), "one")
        assert [Path(name).exists() for name in names] == [True, False]
    finally:
        for name in names:
            Path(name).unlink(missing_ok=True)


SUPERVISE = """
import os, subprocess, sys
from pathlib import Path
from kevlarflow.control import guardian
from kevlarflow.control.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
end, beginning = os.pipe()
command = [sys.executable, "-I", "-S", guardian.__file__, *run.guard_arguments(end)]
process = subprocess.Popen(command, pass_fds=(end, run.lock))
print(run.run_id, process.pid, flush=True)
sys.stdin.read()
"""


def test_it_waits_for_the_end_of_a_supervisor_and_gives_the_lock_back_last(sleepers: Sleepers, folder: Path) -> None:
    supervisor = [sys.executable, "-c", SUPERVISE, str(folder)]
    with subprocess.Popen(supervisor, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run_id, its_guardian = process.stdout.readline().split()
        child = sleepers.start(folder, run_id)
        wait_until(lambda: child.pid in members(folder))
        os.kill(int(its_guardian), signal.SIGSTOP)
        process.kill()
    # The supervisor is gone, and the port is still taken: its guardian has not finished.
    with open(folder.with_suffix(".lock")) as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert child.poll() is None
    os.kill(int(its_guardian), signal.SIGCONT)
    assert child.wait(30) == -9
    wait_until(lambda: not folder.with_suffix(".lock").exists())
    assert not folder.exists()


def test_while_its_supervisor_lives_it_leaves_the_lock_and_nobody_else_gets_the_port(
    sleepers: Sleepers, folder: Path
) -> None:
    run = RunFolder(folder)
    child = sleepers.start(folder, run.run_id)
    end, beginning = os.pipe()
    command = [sys.executable, "-I", "-S", guardian.__file__, *run.guard_arguments(end)]
    with subprocess.Popen(command, pass_fds=(end, run.lock)) as process:
        os.close(end)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        assert child.poll() is None
        os.close(beginning)
        assert process.wait(60) == 0
    assert child.wait(30) == -9
    assert not folder.exists()
    with pytest.raises(UsageError, match="is taken by another kevlarflow"):
        RunFolder(folder)
    run.remove_logs()
    run.give_back()
    assert list(folder.parent.iterdir()) == []


def test_what_another_run_has_on_the_port_is_left_alone(folder: Path) -> None:
    """As it may be when somebody has removed the lock of a cluster that was still there."""
    first = RunFolder(folder)
    end, beginning = os.pipe()
    command = [sys.executable, "-I", "-S", guardian.__file__, *first.guard_arguments(end)]
    with subprocess.Popen(command, pass_fds=(end, first.lock)) as process:
        first.give_back()
        second = RunFolder(folder)
        second.lock_path.write_text("1")  # It is another process.
        for descriptor in (end, beginning):
            os.close(descriptor)
        assert process.wait(60) == 0
    first.sweep()
    first.remove_logs()
    first.give_back()
    assert (folder / "run-id").read_text() == second.run_id
    assert second.log_path.exists()
    assert second.lock_path.exists()


# ---- the run folder


def test_a_run_folder_is_private_and_locked(folder: Path) -> None:
    run = RunFolder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert run.log_path.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UsageError, match=f"port 8000 is taken by another kevlarflow \\(main process {os.getpid()}\\)"):
        RunFolder(folder)
    run.sweep()
    run.give_back()
    assert not folder.exists()
    assert not run.lock_path.exists()


def test_nothing_below_the_folder_ages_while_a_cluster_lives(folder: Path) -> None:
    """systemd-tmpfiles passes by a folder that it cannot lock, with all that is below."""
    runs = [RunFolder(folder), RunFolder(folder.with_name("8001"))]
    ageing = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    for run in runs:
        with pytest.raises(BlockingIOError):
            fcntl.flock(ageing, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for descriptor in (run.lock, run._base):
            os.close(descriptor)
    fcntl.flock(ageing, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(ageing)


def test_what_a_dead_run_left_is_swept(folder: Path, sleepers: Sleepers) -> None:
    first = RunFolder(folder)
    (folder / "old.sock").touch()
    orphan = sleepers.start(folder, first.run_id)
    wait_until(lambda: members(folder))
    os.close(first.lock)  # Supervisor and guardian were killed together.
    second = RunFolder(folder)
    assert orphan.wait(30) == -9
    assert sorted(path.name for path in folder.iterdir()) == ["run-id", "tmp"]
    assert second.run_id != first.run_id
    os.close(second.lock)


def test_logs_of_a_run_that_failed_outlive_the_next_start(folder: Path) -> None:
    folder.parent.mkdir(mode=0o700, parents=True)
    for text in ("first", "second"):
        run = RunFolder(folder)
        (run.log_path / "exits.log").write_text(text)
        run.sweep()
        run.give_back()
    before = folder.parent / "8000-before.logs"
    assert (before / "exits.log").read_text() == "first"
    run = RunFolder(folder)
    assert (before / "exits.log").read_text() == "second"
    assert list(run.log_path.iterdir()) == []
    os.close(run.lock)


def test_logs_of_ended_runs_do_not_pile_up(folder: Path) -> None:
    folder.parent.mkdir(mode=0o700, parents=True)
    for port in range(LOGS_KEPT + 2):
        logs = folder.parent / f"{port}.logs"
        logs.mkdir()
        os.utime(logs, (1_000 + port, 1_000 + port))
    (folder.parent / "0.lock").touch()  # It still runs.
    run = RunFolder(folder)
    left = {path.name for path in folder.parent.glob("*.logs")}
    assert left == {"0.logs", "8000.logs", *(f"{port}.logs" for port in range(2, LOGS_KEPT + 2))}
    os.close(run.lock)


def test_a_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.parent.mkdir()
    folder.parent.chmod(0o755)
    with pytest.raises(UsageError, match="is open to other users: run chmod 700"):
        RunFolder(folder)


def test_a_link_in_place_of_the_folder_is_refused(folder: Path) -> None:
    (folder.parent.parent / "elsewhere").mkdir(mode=0o700)
    folder.parent.symlink_to(folder.parent.parent / "elsewhere")
    with pytest.raises(UsageError, match="is not a folder of yours"):
        make_private(folder.parent)


def test_a_folder_too_long_for_sockets_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="too long for Unix sockets"):
        RunFolder(folder / ("x" * 80))
