"""The processes of a run are recognized by their environment and their title."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from kevlarflow.config import RUN_FOLDER_VARIABLE, RUN_ID_VARIABLE
from kevlarflow.control.relatives import find_relatives
from kevlarflow.kinship import TITLE
from kevlarflow.recovery.events import KnownNode
from kevlarflow.types import Member, NodeId, PipelineId

BODY = """
import sys
from setproctitle import setproctitle
setproctitle(sys.argv[1])
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    children = []

    def start(name: str, run_id: str = "mine") -> int:
        run = {RUN_FOLDER_VARIABLE: str(tmp_path), RUN_ID_VARIABLE: run_id}
        # Without it the title would be written over the environment.
        environment = os.environ | run | {"SPT_NOENV": "1"}
        command = [sys.executable, "-c", BODY, TITLE + name]
        child = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        children.append(child)
        assert child.stdout is not None
        child.stdout.readline()
        return child.pid

    yield start
    for child in children:
        child.kill()
        child.communicate()


def test_nodes_and_engines_are_found_even_if_they_are_stopped(start, tmp_path):
    node, engine = start("node-1-0-23"), start("engine-4")
    start("api-server")
    for pid in (node, engine):
        os.kill(pid, signal.SIGSTOP)
    found = find_relatives(str(tmp_path), "mine")
    assert found.nodes == (
        KnownNode(Member(NodeId("node-1-0"), 23), (node,), ready=True, failed_starts=0, fenced=True),
    )
    assert found.engines == {PipelineId(4): engine}
    assert found.epochs == {}


def test_those_of_another_run_are_strangers(start, tmp_path):
    start("node-0-0-1", run_id="yours")
    assert find_relatives(str(tmp_path), "mine").nodes == ()
