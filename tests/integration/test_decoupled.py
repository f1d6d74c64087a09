"""Decoupled initialization: nodes start alone, in any order, and a pipeline is an exchange of addresses.

The test plays the controller. No node is told of another when it starts, so whatever it knows of a pipeline came
in the messages that formed it. The grid's geometry does not matter either: the nodes that form the pipeline here
have names from different rows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import psutil
import pytest

from integration.failover import assert_identical
from integration.standin import StandIn, stand_in
from kevlarflow.types import NodeInfo
from kevlarflow.wire.messages import StartApiServer
from parity import workload
from parity.client import Recording, replay
from parity.reference import Reference

# Each start of a cluster is one; here it is looked at piece by piece.
pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


def test_a_pipeline_is_formed_of_nodes_that_started_alone(stock_reference: Reference) -> None:
    requests = workload.named("plain-0", "seeded", "prefix-left", "prefix-left-again", "json")
    with stand_in() as controller:
        last = controller.start_node("node-5-1", stage=1)
        assert_alone(last)
        first = controller.start_node("node-2-0", stage=0)
        assert_alone(first)

        controller.fork(StartApiServer())
        controller.attach_engine()
        controller.form(first, last)
        controller.wait_healthy()
        assert_identical(requests, stock_reference, ask(controller, requests))

        # A node that nobody knew when the pipeline was formed takes a place in it.
        late = controller.start_node("node-0-1", stage=1)
        assert_alone(late)
        controller.form(first, late, released=(last,), lost=(1,))
        assert_identical(requests, stock_reference, ask(controller, requests))
        assert psutil.pid_exists(first.pid)


def assert_alone(node: NodeInfo) -> None:
    """No connection to a peer or to a world, and no port where one could be made."""
    assert psutil.Process(node.pid).net_connections(kind="inet") == []


def ask(controller: StandIn, requests: Sequence[workload.Request]) -> dict[str, Recording]:
    """Replay requests while the controller goes on answering."""
    answered: list[dict[str, Recording]] = []
    client = in_background(lambda: answered.append(replay(controller.base_url, requests)))
    while client.is_alive():
        controller.pump(50)
    return answered[0]


def in_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
