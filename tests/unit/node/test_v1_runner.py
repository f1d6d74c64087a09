"""Request state in vLLM's V1 runner, as far as it can be told without a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from kevlarflow.node import v1_runner
from kevlarflow.node.v1_runner import USED_NAMES, V1LaneRunner
from kevlarflow.recovery.ledger import LedgerEntry


class Runner(SimpleNamespace):
    """All that a lane asks of vLLM's runner; it notes what it knows of each request when a step comes."""

    def __init__(self) -> None:
        super().__init__(**dict.fromkeys(USED_NAMES))
        self.requests: dict = {}
        self.input_batch = SimpleNamespace(req_id_to_index={}, req_ids=["r"])
        self.outputs: dict[str, list[int]] = {}
        self.step = SchedulerOutput.make_empty()

    def execute_model(self, step: SchedulerOutput, activations: object = None) -> object:
        self.step = step
        self.outputs = {name: list(each.output_token_ids) for name, each in self.requests.items()}
        return EMPTY_MODEL_RUNNER_OUTPUT


def test_a_token_that_the_scheduler_has_dropped_is_not_believed_after_a_recovery() -> None:
    runner = Runner()
    lane = V1LaneRunner(runner)
    lane.use_blocks(range(10))
    lane.restore([LedgerEntry(name, [1, 2], [3, 4], [1], 3, SamplingParams()) for name in ("reset", "other")])
    step = SchedulerOutput.make_empty()
    step.scheduled_cached_reqs = CachedRequestData(
        req_ids=["reset", "other"],
        resumed_req_ids={"reset"},
        new_token_ids=[[1, 2, 3], [4]],
        all_token_ids={},
        new_block_ids=[([2],), None],
        num_computed_tokens=[0, 3],
        num_output_tokens=[1, 2],
    )
    lane.execute(step, None, None, lambda: None)
    assert runner.outputs == {"reset": [3], "other": [3, 4]}


def test_a_step_that_was_run_before_changes_the_state_and_neither_computes_nor_empties_blocks() -> None:
    runner = Runner()
    lane = V1LaneRunner(runner)
    lane.use_blocks(range(10, 20))
    lane.restore([LedgerEntry("r", [1, 2], [3, 4], [1], 3, SamplingParams())])
    step = SchedulerOutput.make_empty()
    step.num_scheduled_tokens, step.total_num_scheduled_tokens = {"r": 1}, 1
    step.new_block_ids_to_zero = [2]
    step.scheduled_cached_reqs = CachedRequestData(
        req_ids=["r"],
        resumed_req_ids=set(),
        new_token_ids=[[4]],
        all_token_ids={},
        new_block_ids=[([2],)],
        num_computed_tokens=[3],
        num_output_tokens=[2],
    )
    lane.follow(step, {}, ("r",))
    assert runner.step.scheduled_cached_reqs.new_block_ids == [([12],)]
    assert runner.step.num_scheduled_tokens == {"r": 1}
    assert runner.step.total_num_scheduled_tokens == 0, "so the runner returns before it computes"
    assert runner.step.new_block_ids_to_zero is None


def test_a_thought_is_found_out_while_requests_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, caught = Runner(), list[tuple[object, list[int]]]()
    monkeypatch.setattr(v1_runner, "catch_up", lambda batch, request: caught.append((batch, request.output_token_ids)))
    lane = V1LaneRunner(runner)
    lane.use_blocks(range(10))
    lane.restore([LedgerEntry("r", [1, 2], [3, 4], [1], 3, SamplingParams())])
    assert caught == [(runner.input_batch, [3, 4])]
