"""Asking a zygote that may not be there."""

from __future__ import annotations

import socket

import pytest

from kevlarflow.control.launcher import LauncherClient, Outcome
from kevlarflow.types import Member, NodeId, Stage
from kevlarflow.wire.messages import Started, StartNode, decode, encode

A = Member(NodeId("node-0-0"), 1)
B = Member(NodeId("node-0-1"), 3)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "launcher.sock")


@pytest.fixture
def client(path):
    client = LauncherClient(path)
    yield client
    client.close()


def listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(1)
    listener.settimeout(5)
    return listener


def test_answers_belong_to_requests_in_order(path, client):
    with listen(path) as listener:
        client.request(A, Stage(0), 10.0)
        client.request(B, Stage(1), 10.0)
        assert client.pump(1.0) == []
        connection, _ = listener.accept()
        with connection:
            assert decode(connection.recv(4096)) == StartNode(A.node, 1, Stage(0))
            assert decode(connection.recv(4096)) == StartNode(B.node, 3, Stage(1))
            connection.send(encode(Started(11)))
            connection.send(encode(Started(12)))
            assert client.pump(1.1) == [Outcome(A, 11), Outcome(B, 12)]
            assert client.idle


def test_a_launcher_that_is_not_there_yet_is_waited_for(path, client):
    client.request(A, Stage(0), 10.0)
    assert client.pump(1.0) == []
    with listen(path) as listener:
        assert client.pump(1.01) == []
        assert client.pump(2.0) == []
        connection, _ = listener.accept()
        with connection:
            connection.send(encode(Started(11)))
            assert client.pump(2.1) == [Outcome(A, 11)]


def test_a_request_ends_at_its_deadline(path, client):
    client.request(A, Stage(0), 10.0)
    client.request(B, Stage(1), 20.0)
    (outcome,) = client.pump(10.0)
    assert (outcome.member, outcome.pid) == (A, None)
    assert path in outcome.reason
    assert not client.idle


def test_what_was_not_answered_when_the_launcher_went_has_failed(path, client):
    with listen(path) as listener:
        client.request(A, Stage(0), 10.0)
        client.request(B, Stage(1), 10.0)
        client.pump(1.0)
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.send(encode(Started(11)))
        connection.close()
        outcomes = client.pump(1.1)
        assert outcomes[0] == Outcome(A, 11)
        assert (outcomes[1].member, outcomes[1].pid) == (B, None)


def test_an_answer_that_makes_no_sense_ends_the_connection(path, client):
    with listen(path) as listener:
        client.request(A, Stage(0), 10.0)
        client.pump(1.0)
        connection, _ = listener.accept()
        with connection:
            connection.send(b"\xc1")
            (outcome,) = client.pump(1.1)
            assert outcome.pid is None
            assert decode(connection.recv(4096)) == StartNode(A.node, A.incarnation, Stage(0))
            assert connection.recv(4096) == b"", "it is closed"
