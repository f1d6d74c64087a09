"""The hook over vLLM's own classes, without a model."""

import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from vllm.v1.core.sched.output import SchedulerOutput

from kevlarflow.emulation.profile import REPORTS_VARIABLE, Device, Profile, StepCounts
from kevlarflow.node import emulated


def scheduled():
    """Two requests: 5 tokens of a prompt of which 3 are computed, and one more token after 10."""
    step = SchedulerOutput.make_empty()
    step.scheduled_new_reqs = [SimpleNamespace(req_id="new", num_computed_tokens=3)]
    step.scheduled_cached_reqs.req_ids = ["old"]
    step.scheduled_cached_reqs.num_computed_tokens = [10]
    step.num_scheduled_tokens = {"new": 5, "old": 1}
    step.total_num_scheduled_tokens = 6
    return step


def test_the_work_of_a_step():
    assert emulated.work_of(scheduled()) == (6, 8 + 11, 5 * 5.5 + 1 * 10.5)


def test_a_token_is_written_into_every_head_and_nothing_else_is():
    blocks, heads, block_size, head_size = 4, 3, 2, 5
    cache = torch.zeros(blocks, heads, block_size, 2 * head_size)
    key, value = torch.rand(2, 1, head_size), torch.rand(2, 1, head_size)
    emulated.fill(cache, key, value, torch.tensor([5, 2]))
    rest = cache[:, 1:].reshape(blocks, block_size, heads - 1, 2 * head_size)
    for number, slot in enumerate((5, 2)):
        row = torch.cat((key[number, 0], value[number, 0]))
        assert (rest[slot // 2, slot % 2] == row).all()
    assert int((rest.abs().sum((2, 3)) > 0).sum()) == 2
    assert not cache[:, 0].any()


def test_padding_behind_the_tokens_is_ignored():
    cache = torch.zeros(1, 2, 4, 6)
    emulated.fill(cache, torch.ones(3, 1, 3), torch.ones(3, 1, 3), torch.tensor([1]))
    assert int(cache[:, 1:].sum()) == 6


def test_a_layer_gets_the_heads_that_hold_its_stage():
    spec = SimpleNamespace(head_size=128, dtype=torch.float32)
    assert emulated.heads_of(spec, Profile(stages=4)) == 32


def test_a_step_takes_its_emulated_time_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv(REPORTS_VARIABLE, str(tmp_path))
    went_first = []
    monkeypatch.setattr(emulated, "go_first", lambda: went_first.append(True))
    profile = Profile(device=Device(memory_bytes_per_second=1e15, flops=1e18, overhead_seconds=0.3))
    clock = emulated.StepClock(profile)
    begun = time.monotonic()
    clock.begin(scheduled(), stage=0)
    clock.end()
    assert time.monotonic() - begun >= 0.3
    (path,) = tmp_path.glob("*.json")
    counts = msgspec.json.decode(path.read_bytes(), type=StepCounts)
    assert (counts.steps, counts.stage) == (1, 0)
    assert counts.emulated_seconds == pytest.approx(0.3, rel=0.01)
    assert counts.host_seconds < 0.2  # What was slept is not the host's.
    assert went_first == [True]


WHO_GOES_FIRST = """
import os, threading
from kevlarflow.node.emulated import AUTOGROUP, go_first
done = threading.Event()
helper = threading.Thread(target=done.wait)
helper.start()
go_first()
print(os.getpriority(os.PRIO_PROCESS, 0), os.getpriority(os.PRIO_PROCESS, helper.native_id))
print(AUTOGROUP.read_text().strip() if AUTOGROUP.exists() else "nice -20")
done.set()
"""


def is_allowed_to_go_first():
    """Asked of another process, so that the tests stay as they are."""
    ask = [sys.executable, "-c", "import os; os.nice(-1)"]
    return subprocess.run(ask, stderr=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.skipif(not is_allowed_to_go_first(), reason="to go before others needs CAP_SYS_NICE")
def test_a_device_goes_before_other_processes_of_its_session_and_its_session_before_others():
    ask = [sys.executable, "-c", WHO_GOES_FIRST]
    told = subprocess.run(ask, stdout=subprocess.PIPE, check=True, text=True, start_new_session=True).stdout
    threads, session = told.splitlines()
    assert threads == "-20 -20"
    assert session.endswith("nice -20")


@pytest.fixture
def pipeline_group(monkeypatch, tmp_path):
    """A group as vLLM's stages make it, of one."""
    # vLLM names shared memory after it: no other run of the tests, and none that was killed, may have used it.
    ident = uuid.uuid4().hex
    monkeypatch.setenv("VLLM_DIST_IDENT", ident)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=1, rank=0)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()
    for shared in Path("/dev/shm").glob(f"*{ident}*"):
        shared.unlink()


@pytest.fixture
def waiting_is_hooked(monkeypatch):
    """A function that puts the hook in place, which is undone after the test."""
    from vllm.distributed.device_communicators import cpu_communicator, shm_broadcast

    for owner, name in (
        (cpu_communicator.CpuCommunicator, "_all_group_ranks_share_shm_group_name"),
        (shm_broadcast.SpinCondition, "__init__"),
        (shm_broadcast, "sched_yield"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return emulated._hook_waiting


def test_who_waits_for_activations_sleeps(pipeline_group, waiting_is_hooked):
    import vllm._custom_ops  # noqa: F401 - a worker has loaded vLLM's kernels.
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def spins():
        cpu = torch.device("cpu")
        return CpuCommunicator(pipeline_group, cpu, pipeline_group, "pp:0").supports_tensor_dict

    if not hasattr(torch.ops._C, "init_shm_manager"):
        assert not spins()
        pytest.skip("vLLM's kernels for AVX2 have no shared memory to spin on")
    assert spins(), "vLLM has changed: the hook is not needed any more"
    waiting_is_hooked()
    assert not spins()


def test_who_waits_for_a_step_sleeps(waiting_is_hooked):
    from vllm.distributed.device_communicators import shm_broadcast

    waiting_is_hooked()
    begun = time.monotonic()
    shm_broadcast.sched_yield()
    assert time.monotonic() - begun >= emulated.QUEUE_POLL_SECONDS


def test_without_a_profile_nothing_is_hooked(monkeypatch):
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.delenv("KEVLARFLOW_EMULATION", raising=False)
    emulated.install()
    assert not hasattr(GPUModelRunner, emulated.MARK)
