"""What vLLM's engine asks of its workers, and the executor answers for the nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)


class Scheduler:
    """All that a pause asks of it."""

    def __init__(self) -> None:
        from vllm.v1.core.sched.interface import PauseState

        self.pause_state = PauseState.UNPAUSED

    def set_pause_state(self, state: Any) -> None:
        self.pause_state = state

    def finish_requests(self, requests: Any, status: Any) -> list[Any]:
        return []


@pytest.fixture
def core() -> Any:
    """vLLM's engine over an executor of two stages, with nothing around them."""
    from vllm.v1.engine.core import EngineCore

    from kevlarflow.engine.executor import KevlarExecutor

    executor = KevlarExecutor.__new__(KevlarExecutor)
    executor.sleeping_tags = set()
    executor._descriptions = [SimpleNamespace(), SimpleNamespace()]
    core = EngineCore.__new__(EngineCore)
    core.model_executor, core.scheduler = executor, Scheduler()
    core._reset_caches = lambda *_: None
    return core


@pytest.mark.parametrize("level", [0, 1, 2])
def test_an_engine_that_is_put_to_sleep_wakes_up_again(core: Any, level: int) -> None:
    core.sleep(level)
    assert core.is_sleeping()
    assert core.wake_up(["scheduling"] if level == 0 else None)
    assert not core.is_sleeping()


def test_what_needs_a_worker_at_run_time_is_refused(core: Any) -> None:
    with pytest.raises(NotImplementedError, match="do not offer 'compute_weight_checksums' while they serve"):
        core.collective_rpc("compute_weight_checksums")
