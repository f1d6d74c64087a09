"""Real families of processes: who dies when whom is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from standins import wait_until

FAMILY = """
import os, sys, time
from kevlarflow.kinship import adopt_orphans, fork_for_parent

adopt_orphans()
supervisor = os.getpid()
if os.fork() == 0:
    zygote = os.getpid()
    fork_for_parent(lambda: (print(supervisor, zygote, os.getpid(), flush=True), time.sleep(1000)))
time.sleep(1000)
"""


def exists(pid: int) -> bool:
    """Whether a process is there, and more than a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


@pytest.fixture
def family() -> Iterator[tuple[int, int, int]]:
    """A supervisor, its zygote, and a node that the zygote forked for it."""
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        supervisor, zygote, node = map(int, child.stdout.readline().split())
        yield supervisor, zygote, node
        for pid in (supervisor, zygote, node):
            if exists(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_forked_node_is_the_supervisors_child_and_outlives_the_zygote(family: tuple[int, int, int]) -> None:
    supervisor, zygote, node = family
    assert parent_of(node) == supervisor
    os.kill(zygote, signal.SIGKILL)
    wait_until(lambda: not exists(zygote))
    assert exists(node)
    assert parent_of(node) == supervisor


def test_a_forked_node_dies_with_the_supervisor_even_if_it_is_stopped(family: tuple[int, int, int]) -> None:
    supervisor, _, node = family
    os.kill(node, signal.SIGSTOP)
    os.kill(supervisor, signal.SIGKILL)
    wait_until(lambda: not exists(node))


def test_forks_of_forks_die_with_the_first() -> None:
    script = """
import os, time
from kevlarflow.kinship import forks_die_with_us

forks_die_with_us()
server = os.getpid()
if os.fork() == 0:
    engine = os.getpid()
    if os.fork() == 0:
        print(server, engine, os.getpid(), flush=True)
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        server, engine, helper = map(int, child.stdout.readline().split())
        assert exists(engine)
        assert exists(helper)
        os.kill(server, signal.SIGKILL)
        wait_until(lambda: not exists(engine) and not exists(helper))


def test_who_comes_too_late_leaves_at_once() -> None:
    script = "from kevlarflow.kinship import die_with_parent; die_with_parent(1 << 22); print('still here')"
    late = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (late.returncode, late.stdout) == (1, b"")
