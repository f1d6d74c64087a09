"""Which process of stock vLLM serves a stage of a pipeline, by titles and kinship as vLLM's own processes have them."""

import time

import psutil
import pytest

from kevlarflow.bench.evaluation.contenders import Stock
from kevlarflow.bench.recipes import LONGEST_SOCKET_NAME, LONGEST_SOCKET_PATH, Recipe, stock_vllm
from kevlarflow.bench.systems import ServerProcess
from kevlarflow.faults import FaultDidNotHappen
from kevlarflow.faults.processes import command_line

ENGINE = "(exec -a Worker_PP0 sleep 60) & (exec -a Worker_PP1 sleep 60) & exec -a EngineCore_DP{} sleep 60"
TITLES = 6
"""Two engines and their workers."""


@pytest.fixture(scope="module")
def stock_dp(tmp_path_factory):
    """One server with two engines; pipeline 1 was started first, so its processes have the lower ids."""
    script = "; ".join(f"bash -c '{ENGINE.format(rank)}' & sleep 0.2" for rank in (1, 0))

    def command(port):
        return ["bash", "-c", f"{script}; wait"]

    server = ServerProcess("stock-dp", "m", command, {}, tmp_path_factory.mktemp("stock") / "log")
    server.start()
    deadline = time.monotonic() + 30
    while sum("_" in command_line(each.pid).split()[0] for each in server.processes()) < TITLES:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield Stock([server], None)
    server.stop()


@pytest.mark.parametrize("pipeline", [0, 1])
def test_a_worker_is_its_pipelines(stock_dp, pipeline):
    (victim,) = stock_dp.victim(pipeline, 1).processes
    assert command_line(victim.pid).startswith("Worker_PP1")
    assert command_line(psutil.Process(victim.pid).ppid()).startswith(f"EngineCore_DP{pipeline}")


def test_a_pipeline_that_is_not_there_has_no_worker(stock_dp):
    with pytest.raises(FaultDidNotHappen, match="stage 1 of pipeline 2 has 0 workers, not one"):
        stock_dp.victim(2, 1)


@pytest.mark.parametrize("depth", [1, 12])
def test_sockets_of_stock_have_names_that_the_kernel_takes(tmp_path, depth):
    folder = tmp_path.joinpath(*["a long name"] * depth)
    folder.mkdir(parents=True)
    server = stock_vllm(Recipe(model="m"), {}, folder)
    assert len(server._environment["VLLM_RPC_BASE_PATH"]) + LONGEST_SOCKET_NAME <= LONGEST_SOCKET_PATH
