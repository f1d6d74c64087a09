"""An engine's channels to nodes, over real sockets."""

from __future__ import annotations

import os
import time

import zmq

from kevlarflow.engine.links import NodeLinks
from kevlarflow.types import Epoch, PipelineId
from kevlarflow.wire import steps

DEAF_SECONDS = 1.5


def test_a_farewell_reaches_a_node_that_does_not_listen_for_a_while(tmp_path):
    address = f"ipc://{tmp_path}/node"
    leave = steps.Leave(PipelineId(0), Epoch(5))
    NodeLinks(os.eventfd(0)).send_once(address, leave)
    time.sleep(DEAF_SECONDS)
    node = zmq.Context.instance().socket(zmq.ROUTER)
    node.bind(address)
    try:
        assert node.poll(5_000), "the lane would stay on the node, with its blocks"
        assert steps.decode(node.recv_multipart()[1]) == leave
    finally:
        node.close(linger=0)
