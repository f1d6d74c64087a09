"""What every transfer promises: the one over ZeroMQ and its twin in memory."""

import threading
import time

import pytest
import zmq

from kevlarflow.node.thread_clock import ThreadClock
from kevlarflow.replication.transfer import CHANNEL_PLACES, MemoryNetwork, MemoryTransfer
from kevlarflow.replication.zmq_transfer import ZmqTransfer
from unit.replication.parts import asleep

DEADLINE_SECONDS = 60.0


@pytest.fixture(params=["memory", "zmq"])
def make(request, tmp_path):
    network, made = MemoryNetwork(), []

    def build(name, block_bytes=8):
        if request.param == "memory":
            made.append(MemoryTransfer(network, name))
            return made[-1], name
        address = f"ipc://{tmp_path}/{name}"
        made.append(ZmqTransfer(address, block_bytes, peers=2))
        return made[-1], address

    yield build
    for each in made:
        each.close()


def receive(end):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (arrival := end.receive()) is None:
        assert time.monotonic() < deadline, "nothing came"
        end.wait(0.05)
    return arrival


def test_a_copy_arrives_and_is_answered(make):
    (source, _), (standby, address) = make("a"), make("b")
    outlet = source.connect(address)
    assert outlet.send(b"header", memoryview(b"12345678"))
    arrival = receive(standby)
    assert (arrival.header, bytes(arrival.data)) == (b"header", b"12345678")
    standby.answer(arrival.peer, b"stored")
    assert receive(outlet_as_end(source, outlet)) == b"stored"


def outlet_as_end(transfer, outlet):
    class End:
        receive = staticmethod(outlet.receive)
        wait = staticmethod(transfer.wait)

    return End


def test_each_channel_is_a_peer_of_its_own(make):
    (source, _), (standby, address) = make("a"), make("b")
    first, second = source.connect(address), source.connect(address)
    first.send(b"1", memoryview(b"x" * 8))
    one = receive(standby)
    second.send(b"2", memoryview(b"x" * 8))
    assert receive(standby).peer != one.peer


def test_a_peer_that_is_not_there_takes_a_few_copies_and_then_none(make, tmp_path):
    source, _ = make("a")
    outlet = source.connect(f"ipc://{tmp_path}/nobody")
    clock = ThreadClock()
    began = asleep(clock)
    sent = sum(outlet.send(b"h", memoryview(b"x" * 8)) for _ in range(100))
    assert sent <= CHANNEL_PLACES
    assert asleep(clock) - began < 0.5


def test_an_answer_to_a_peer_that_is_gone_is_lost(make):
    (source, _), (standby, address) = make("a"), make("b")
    outlet = source.connect(address)
    outlet.send(b"h", memoryview(b"x" * 8))
    arrival = receive(standby)
    outlet.close()
    standby.answer(arrival.peer, b"stored")
    standby.answer(b"never seen", b"stored")
    assert standby.receive() is None


def test_a_ring_ends_the_wait_and_waiting_has_an_end(make):
    end, _ = make("a")
    threading.Timer(0.05, end.ring).start()
    began = time.monotonic()
    end.wait(DEADLINE_SECONDS)
    assert time.monotonic() - began < DEADLINE_SECONDS / 2
    end.wait(0.01)


def test_a_message_that_is_no_copy_has_no_header_and_a_giant_is_cut_off(tmp_path):
    address = f"ipc://{tmp_path}/z"
    standby = ZmqTransfer(address, 8, peers=2)
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    peer.connect(address)
    peer.send_multipart([b"one frame"])
    assert receive(standby).header == b""
    peer.send_multipart([b"h", b"x" * 1_000_000])
    standby.wait(0.2)
    assert standby.receive() is None
    peer.close()
    standby.close()
