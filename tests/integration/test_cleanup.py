"""However a cluster ends, nothing of it stays: no process, socket, shared memory or run folder; and nothing is open
to others while it runs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time

import httpx
import psutil
import pytest

from integration.cluster import FLAGS, KEVLARFLOW, STOP_TIMEOUT_SECONDS, Cluster, running_cluster, shared_memory_of
from kevlarflow.bench.chaos.stage import shared_memory, shared_memory_since
from kevlarflow.bench.systems import free_port
from kevlarflow.config import Timeouts, run_folder_of
from kevlarflow.faults.processes import is_alive
from standins import members, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def begin_streams(cluster: Cluster, count: int = 4) -> list[threading.Thread]:
    """Start requests that will not end before the cluster does; return when each has had a token."""
    begun = threading.Barrier(count + 1)

    def stream() -> None:
        body = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
        try:
            with httpx.stream("POST", f"{cluster.base_url}/v1/completions", json=body, timeout=60.0) as response:
                lines = response.iter_lines()
                next(lines)
                begun.wait(60.0)
                for _ in lines:
                    pass
        except httpx.HTTPError:
            pass  # The cluster was ended under it.

    threads = [threading.Thread(target=stream, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    begun.wait(60.0)
    return threads


def require_nothing_left(cluster: Cluster, shared_before: set[str]) -> None:
    assert members(cluster.run_folder) == {}
    assert not cluster.run_folder.exists()
    assert not cluster.run_folder.with_suffix(".lock").exists()
    # Nor is it others' who come and go meanwhile.
    wait_until(lambda: not shared_memory_since(shared_before, []), STOP_TIMEOUT_SECONDS)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("0.0.0.0", cluster.port))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_when_it_ends_under_load(number: signal.Signals) -> None:
    shared_before = shared_memory()
    with running_cluster() as cluster:
        require_private(cluster)
        threads = begin_streams(cluster)
        processes = cluster.processes()
        # A stopped process takes no notice of a signal that can be handled.
        os.kill(cluster.status()["nodes"][0]["pid"], signal.SIGSTOP)
        cluster.process.send_signal(number)
        begun = time.monotonic()
        assert cluster.process.wait(STOP_TIMEOUT_SECONDS) == (-9 if number is signal.SIGKILL else 0)
        # It takes about a second. After the grace it would be killed, with streams open or not.
        assert time.monotonic() - begun < Timeouts().stop_grace_s
        wait_until(lambda: not any(map(is_alive, processes)), STOP_TIMEOUT_SECONDS)
        wait_until(lambda: not cluster.run_folder.with_suffix(".lock").exists(), STOP_TIMEOUT_SECONDS)
        require_nothing_left(cluster, shared_before)
        for thread in threads:
            thread.join(30.0)
            assert not thread.is_alive()


def require_private(cluster: Cluster) -> None:
    """Only the API server can be reached from outside, nodes not at all, and nobody else may enter the folders."""
    for node in cluster.status()["nodes"]:
        assert psutil.Process(node["pid"]).net_connections("inet") == []
    pids = [process.pid for process in cluster.processes()]
    reachable = {
        connection.laddr.port
        for pid in pids
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.ip not in {"127.0.0.1", "::1"}
    }
    assert reachable == {cluster.port}
    for folder in (cluster.run_folder.parent, cluster.run_folder, cluster.run_folder.with_suffix(".logs")):
        assert folder.stat().st_mode & 0o077 == 0
    assert shared_memory_of(cluster.processes()) == set()


def test_a_node_that_dies_during_start_up_is_one_line_and_leaves_nothing() -> None:
    shared_before = shared_memory()
    port = free_port()
    command = [KEVLARFLOW, "serve", "-pp", "2", "-dp", "2", "--port", str(port), *FLAGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as serve:
        folder = run_folder_of(port)

        def node() -> list[int]:
            return [pid for pid, title in members(folder).items() if title.startswith("kevlarflow: node-0-1")]

        wait_until(node, 120.0)
        os.kill(node()[0], signal.SIGKILL)
        said, errors = serve.communicate(timeout=60)
    assert serve.returncode == 1
    assert errors.count("\n") == 1, errors
    assert re.match(r"kevlarflow: .*node-0-1.*\.log", errors), errors
    assert "ready in" not in said
    require_nothing_left(Cluster(serve, port, 2, 2), shared_before)
