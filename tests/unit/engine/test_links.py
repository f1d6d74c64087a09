"""An engine's channels to nodes, over real sockets."""

from __future__ import annotations

import os
import time

import msgspec
import zmq

import kevlarflow.engine.links
from kevlarflow.engine.links import NodeLinks
from kevlarflow.faults.cutting import cut
from kevlarflow.faults.processes import identify
from kevlarflow.types import Epoch, Member, NodeInfo, PipelineId
from kevlarflow.wire import steps

DEAF_SECONDS = 1.5
DEADLINE_SECONDS = 20.0


def a_node(address):
    return NodeInfo(Member("node-0-1", 1), 1, "host", 1, (1,), address, "", 2, 50)


def test_a_farewell_reaches_a_node_that_does_not_listen_for_a_while(tmp_path):
    address = f"ipc://{tmp_path}/node"
    leave = steps.Leave(PipelineId(0), Epoch(5))
    NodeLinks(os.eventfd(0)).send_farewell(a_node(address), leave)
    time.sleep(DEAF_SECONDS)
    node = zmq.Context.instance().socket(zmq.ROUTER)
    node.bind(address)
    try:
        assert node.poll(5_000), "the lane would stay on the node, with its blocks"
        assert steps.decode(node.recv_multipart()[1]) == leave
    finally:
        node.close(linger=0)


def test_the_answer_to_a_farewell_is_heard_until_the_node_has_parted(tmp_path):
    info = a_node(f"ipc://{tmp_path}/node")
    node = zmq.Context.instance().socket(zmq.ROUTER)
    node.bind(info.step_address)
    links = NodeLinks(os.eventfd(0))
    left = steps.Left(PipelineId(0), Epoch(5), info.member)
    try:
        for _ in range(2):
            links.send_farewell(info, steps.Leave(PipelineId(0), Epoch(5)))
            assert node.poll(5_000)
            peer, _ = node.recv_multipart()
            node.send_multipart([peer, steps.encode(left)])
            assert links.receive(5_000) == [(left, [])]
        links.part(info.member)
        node.send_multipart([peer, steps.encode(left)])
        assert links.receive(100) == []
    finally:
        links.close()
        node.close(linger=0)


def test_channels_to_nodes_that_never_answer_are_closed_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(kevlarflow.engine.links, "FAREWELL_MS", 50)
    links = NodeLinks(os.eventfd(0))
    dead = [
        msgspec.structs.replace(a_node(f"ipc://{tmp_path}/node"), member=Member("node-0-1", number))
        for number in range(1, 5)
    ]
    try:
        for info in dead[:3]:
            links.send_farewell(info, steps.Leave(PipelineId(0), Epoch(5)))
        time.sleep(0.06)
        links.send_farewell(dead[3], steps.Leave(PipelineId(0), Epoch(6)))
        assert set(links._farewells) == {dead[3].member}
    finally:
        links.close()


def test_a_connection_that_was_broken_and_made_anew_has_another_name_at_the_node(tmp_path):
    """What a lane relies on to know that something may be missing."""
    info = a_node(f"ipc://{tmp_path}/node")
    node = zmq.Context.instance().socket(zmq.ROUTER)
    node.bind(info.step_address)
    links = NodeLinks(os.eventfd(0))
    links.use([info])

    def name():
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            # What is sent before ZeroMQ has seen the cut is lost.
            links.send(info, steps.Describe())
            if node.poll(500):
                return node.recv_multipart()[0]
        raise AssertionError("nothing arrives")

    try:
        before = name()
        assert name() == before
        assert cut(identify(os.getpid()))
        assert name() != before
    finally:
        links.close()
        node.close(linger=0)
