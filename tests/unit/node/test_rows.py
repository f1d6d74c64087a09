"""What depends on the rows of vLLM's own batch: whose activations are whose (told by their order), and thoughts."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.sequence import IntermediateTensors
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_input_batch import InputBatch

from kevlarflow.node.thinking_budget import ThinkingBudget, follow_thinking
from kevlarflow.node.v1_runner import V1LaneRunner
from kevlarflow.recovery.ledger import LedgerEntry
from kevlarflow.recovery.recompute import Chunk, Span


class Runner:
    """vLLM's way to update its batch, around a model whose rows say of which request they are."""

    _update_states = gpu_model_runner.GPUModelRunner._update_states

    def __init__(self) -> None:
        self.requests: dict = {}
        self.num_prompt_logprobs: dict = {}
        self.late_interaction_runner = SimpleNamespace(
            on_requests_finished=lambda _: None, register_request=lambda *_: None
        )
        self.input_batch = InputBatch(8, 64, 64, torch.device("cpu"), 100, [4], [16])
        self._on_request_state_removed = lambda *_: None
        self._process_encoder_cache_scheduler_output = self._may_reorder_batch = lambda _: None
        self.speculative_config = None
        self.use_async_spec_decode = self.use_async_scheduling = self.is_pooling_model = self.uses_mrope = False
        self.device = torch.device("cpu")
        self.execute_model_state = self.discard_request_mask = self._get_prompt_logprobs_dict = None

    def execute_model(self, step: SchedulerOutput, activations: object = None) -> object:
        self._update_states(step)
        if not step.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        rows = [ord(r[0]) for r in self.input_batch.req_ids for _ in range(step.num_scheduled_tokens[r])]
        return IntermediateTensors({"hidden_states": torch.tensor(rows)})


@pytest.fixture(autouse=True)
def _not_the_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model_runner, "get_pp_group", lambda: SimpleNamespace(is_last_rank=False))


def step(new: str = "", going_on: str = "", finished: str = "") -> SchedulerOutput:
    """Requests are letters; new ones have two tokens in it, others one."""
    made = SchedulerOutput.make_empty()
    made.scheduled_new_reqs = [
        NewRequestData(r, [1, 2], [], SamplingParams(), None, ([i],), 0, None) for i, r in enumerate(new, 1)
    ]
    count = len(going_on)
    made.scheduled_cached_reqs = CachedRequestData(
        list(going_on), set(), [[3]] * count, {}, [None] * count, [2] * count, [1] * count
    )
    made.num_scheduled_tokens = dict.fromkeys(going_on, 1) | dict.fromkeys(new, 2)
    made.total_num_scheduled_tokens = sum(made.num_scheduled_tokens.values())
    made.finished_req_ids = set(finished)
    return made


def lane_with(requests: Iterable[str]) -> V1LaneRunner:
    lane = V1LaneRunner(Runner())
    lane.use_blocks(range(20))
    lane.restore([LedgerEntry(r, [1, 2], [3], [1], 2, SamplingParams()) for r in requests])
    return lane


@pytest.mark.parametrize(
    ("before", "again"),
    [
        (lambda: step(new="zabc"), lambda: step(going_on="abc", finished="z")),
        (lambda: step(new="abc"), lambda: step(new="n", going_on="abc")),
    ],
    ids=["a request has ended before it", "a request is new in it"],
)
def test_what_is_passed_on_again_has_its_rows_where_the_next_stage_expects_them(
    before: Callable[[], SchedulerOutput], again: Callable[[], SchedulerOutput]
) -> None:
    staying, following = lane_with(""), lane_with("abc")
    staying.execute(before(), None, None, lambda: None)
    kept = staying.execute(again(), None, None, lambda: None)
    batch = staying.batch
    staying.reset()
    staying.restore([LedgerEntry(r, [1, 2], [3], [1], 2, SamplingParams()) for r in "abc"])
    passed_on = staying.follow(again(), kept, batch)
    computed = following.execute(again(), None, None, lambda: None)
    assert kept["hidden_states"].tolist() != computed["hidden_states"].tolist(), "there was nothing to put in order"
    assert passed_on["hidden_states"].tolist() == computed["hidden_states"].tolist()


def test_a_chunk_that_only_the_first_stages_run_leaves_their_order_as_it_was() -> None:
    lanes = [lane_with("abc") for _ in range(2)]
    for lane in lanes:
        lane.execute(step(new="n", going_on="abc"), None, None, lambda: None)
    lanes[0].recompute(Chunk((Span("p", (1, 2), (9,), 0, 2),), 0), None)
    for lane in lanes:
        lane.execute(step(new="p", going_on="bcn"), None, None, lambda: None)
    assert set(lanes[0].batch) == set("bcnp")
    assert lanes[0].batch == lanes[1].batch


def test_a_thought_is_known_from_when_its_request_is_restored_until_that_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lane = lane_with("")
    runner, reasoning = lane._runner, SimpleNamespace(reasoning_start_token_ids=[7], reasoning_end_token_ids=[11])
    vllms = ThinkingBudgetStateHolder(reasoning, 8, 0, torch.device("cpu"), False)
    runner.input_batch.thinking_budget_state_holder = vllms
    follow_thinking(runner)
    thoughts = runner.input_batch.thinking_budget_state_holder._state
    lane.restore([LedgerEntry(r, [1, 2], [7], [1], 2, SamplingParams(thinking_token_budget=9)) for r in "abc"])
    monkeypatch.setattr(ThinkingBudget, "_found_out", lambda *_: pytest.fail("it is known"))
    lane.execute(step(going_on="abc"), None, None, lambda: None)
    known = dict(zip(lane.batch, (thoughts[row] for row in range(3)), strict=True))
    lane.execute(step(going_on="b"), None, None, lambda: None)
    lane.execute(step(going_on="ab"), None, None, lambda: None)
    assert all(thoughts[row] is known[request] for row, request in enumerate(lane.batch))
    known.clear()
    requests = [weakref.ref(request) for request in runner.requests.values()]
    lane.execute(step(going_on="b", finished="ac"), None, None, lambda: None)
    assert [request() is None for request in requests] == [True, False, True]
    lane.reset()
    assert requests[1]() is None
    assert not thoughts
