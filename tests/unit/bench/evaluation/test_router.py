"""The real vllm-router, with its real flags, in front of two servers of which one is killed."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from kevlarflow.bench.evaluation.contenders import Stock, router
from kevlarflow.bench.load import closed_loop
from kevlarflow.bench.prompts import clients
from kevlarflow.bench.systems import ServerProcess, free_port
from kevlarflow.faults import FaultDidNotHappen

SERVER = Path(__file__).parents[3] / "faulty_server.py"


@pytest.fixture
def stock(tmp_path):
    def server(name):
        def command(port):
            return [sys.executable, str(SERVER), str(port), "well"]

        return ServerProcess(name, "m", command, {}, tmp_path / name, free_port())

    servers = [server("stock-0"), server("stock-1")]
    found = Stock(servers, router(servers, "m", tmp_path))
    yield found
    found.stop()


def ask(stock, seed, count):
    streams = asyncio.run(closed_loop(stock.address, stock.model, clients(seed, count, 1, 5, 1)))
    return [defect for stream in streams if (defect := stream.defect(5))]


def test_requests_go_on_while_a_server_is_restarted(stock):
    stock.start()
    stock.wait_ready()
    assert ask(stock, "before", 4) == []
    (victim,) = stock._servers[0].server.processes()
    os.kill(victim.pid, signal.SIGKILL)
    assert ask(stock, "during", 4) == []
    deadline = time.monotonic() + 60
    while not (stock.lives() and stock.lives()[0].ready_at):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ask(stock, "after", 4) == []


def test_a_worker_that_is_not_there_is_said(stock):
    stock.start()
    stock.wait_ready()
    with pytest.raises(FaultDidNotHappen, match="stage 1 of pipeline 0 has 0 workers, not one"):
        stock.victim(0, 1)
