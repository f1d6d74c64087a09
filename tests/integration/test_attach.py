"""Engines and API server die: they are started again and attach to the nodes, which never notice."""

from __future__ import annotations

from typing import Any

import pytest

from integration.cluster import Cluster
from integration.failover import assert_identical, run
from integration.waiting import until
from kevlarflow.faults import KillProcesses
from parity import workload
from parity.reference import Reference

pytestmark = pytest.mark.timeout(600)


def identities(status: dict[str, Any]) -> dict[str, tuple[int, list[int]]]:
    return {node["id"]: (node["incarnation"], node["pids"]) for node in status["nodes"]}


@pytest.mark.parametrize(
    "victims",
    ["both", pytest.param("engine", marks=pytest.mark.slow), pytest.param("server", marks=pytest.mark.slow)],
)
def test_a_new_engine_side_attaches_to_the_living_nodes(
    victims: str, grid: Cluster, stock_reference: Reference
) -> None:
    before = grid.status()
    engines = [engine["pid"] for engine in before["engines"]]
    server = grid.api_server_pid()
    pids = {"both": [server, *engines], "engine": engines[:1], "server": [server]}[victims]
    grid.inject(KillProcesses(victims, tuple(pids)))

    def restarted() -> bool:
        return not {engine["pid"] for engine in grid.status()["engines"]} & set(pids) and grid.healthy()

    until("engines are new and /health is 200", restarted, timeout=120, poll=0.3)
    after = grid.wait_settled()
    assert identities(after) == identities(before), "nodes were restarted though only the engine side died"
    # The weights were loaded by the same processes, once: whoever wants to load again needs a new process.
    requests = workload.named("plain-0", "plain-1", "seeded", "json", "prefix-left", "prefix-left-again")
    assert_identical(requests, stock_reference, run(grid, requests).recordings)
