"""The hook in vLLM's scheduler, over vLLM's own block pool and queue."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kevlarflow.errors import IncompatibleVllm
from kevlarflow.types import Cause, Epoch, Member, NodeId, NodeInfo, PipelineId, Stage
from kevlarflow.wire.messages import Form, Suspend

pytestmark = pytest.mark.timeout(120)


class Waiting:
    """All that the hook asks of a request in the queue."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.finished = False

    def is_finished(self) -> bool:
        return self.finished


@pytest.fixture
def hook():
    """A scheduler hook with 9 blocks to give out, and nothing around it."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.request_queue import FCFSRequestQueue

    from kevlarflow.engine.scheduler import KevlarScheduler

    hook = KevlarScheduler.__new__(KevlarScheduler)
    hook.kv_cache_manager = SimpleNamespace(block_pool=BlockPool(10, True, 4))
    hook.kv_cache_config = SimpleNamespace(num_blocks=10)
    hook.cache_config = SimpleNamespace(block_size=4)
    hook.waiting = FCFSRequestQueue()
    hook._withheld, hook._held, hook._held_since, hook._longest_hold_seconds = {}, [], {}, 45.0
    return hook


def test_only_usable_blocks_are_given_out_and_all_of_them_when_there_is_room_again(hook):
    pool = hook.kv_cache_manager.block_pool
    hook._use_blocks(frozenset({2, 5, 7}))
    assert pool.get_num_free_blocks() == 3
    assert {block.block_id for block in pool.get_new_blocks(3)} == {2, 5, 7}
    hook._use_blocks(None)
    assert {block.block_id for block in pool.get_new_blocks(6)} == {1, 3, 4, 6, 8, 9}


def test_the_prefix_cache_can_be_reset_while_blocks_are_withheld(hook):
    pool = hook.kv_cache_manager.block_pool
    hook.kv_cache_manager.reset_prefix_cache = pool.reset_prefix_cache
    hook.running, hook.prev_step_scheduled_req_ids, hook.connector, hook.aux_output_connector = [], set(), None, None
    hook._use_blocks(frozenset({2, 5, 7}))
    # As POST /reset_prefix_cache and POST /pause ask for it.
    assert hook.reset_prefix_cache(reset_running_requests=True)
    assert {block.block_id for block in pool.get_new_blocks(3)} == {2, 5, 7}
    assert not hook.reset_prefix_cache(), "some blocks are really in use"
    hook._use_blocks(None)
    assert {block.block_id for block in pool.get_new_blocks(6)} == {1, 3, 4, 6, 8, 9}


def test_a_block_in_use_beyond_the_share_is_a_bug(hook):
    (block,) = hook.kv_cache_manager.block_pool.get_new_blocks(1)
    with pytest.raises(AssertionError, match="beyond this pipeline's share"):
        hook._use_blocks(frozenset({block.block_id + 1}))


def test_a_request_longer_than_the_share_waits_for_more_room_and_keeps_its_place(hook):
    short, long, last = map(Waiting, (11, 12, 3))
    for request in (long, short, last):
        hook.waiting.add_request(request)
    hook._use_blocks(frozenset({2, 5, 7}))
    hook._hold_back()
    assert list(hook.waiting) == [short, last]
    hook._use_blocks(None)
    assert list(hook.waiting) == [long, short, last]


def test_a_request_that_ends_with_a_token_in_flight_while_it_waits_for_room_does_not_come_back(hook, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    def its_last_token_comes(*_):
        long.finished = True
        return {}

    long, longer = Waiting(12), Waiting(13)
    for request in (long, longer):
        hook.waiting.add_request(request)
    hook._use_blocks(frozenset({2, 5, 7}))
    hook._hold_back()
    hook._ended = []
    monkeypatch.setattr(Scheduler, "update_from_output", its_last_token_comes)
    hook.update_from_output(None, None)
    hook._use_blocks(None)
    assert list(hook.waiting) == [longer]


def test_a_request_that_comes_after_a_suspension_of_an_idle_engine_is_not_ended_for_it(hook):
    from vllm import SamplingParams
    from vllm.v1.request import Request

    from kevlarflow.engine.session import Session
    from kevlarflow.recovery.recompute import Limits

    session = Session(PipelineId(0), Limits(max_batched_tokens=8, max_requests=2, block_size=4, stages=1))
    hook._executor = SimpleNamespace(session=session)
    hook.requests, hook._ended = {}, []
    hook.spec_decode_metrics_level, hook.connector, hook.log_stats = "none", None, False

    def ask(name: str) -> None:
        hook.add_request(Request(name, [1, 2, 3], SamplingParams(), None))

    def obey() -> list[str]:
        hook.finish_requests = lambda names, _: [hook.requests.pop(name) for name in names]
        hook._obey(session.begin_scheduling()[1])
        return [request.request_id for request, _ in hook._ended]

    suspend(session, epoch=1)
    serve(session, epoch=2)
    ask("after")
    assert obey() == []
    suspend(session, epoch=3)
    ask("meanwhile")
    serve(session, epoch=4)
    assert obey() == ["after", "meanwhile"]


def suspend(session, epoch: int) -> None:
    session.post(Suspend(session.pipeline, Epoch(epoch), Stage(0), "no node is left"))
    session.attend(1.0)


def serve(session, epoch: int) -> None:
    """A node is there again; what becomes of the forming does not matter here."""
    node = NodeInfo(Member(NodeId("n"), 1), Stage(0), "here", 1, (1,), "inproc://n", "inproc://a", 1, 10)
    session.post(Form(session.pipeline, Epoch(epoch), (node,), (), Cause.CRASH, (Stage(0),)))
    session.attend(0.0)


def test_another_vllm_is_refused_by_the_name_that_it_lacks():
    from kevlarflow.engine.scheduler import check_scheduler

    with pytest.raises(IncompatibleVllm, match=r"no kv_cache_manager\.block_pool\.free_block_queue"):
        check_scheduler(SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=object())))


def test_while_the_pipeline_waits_for_a_node_nobody_is_scheduled_and_the_loop_goes_on(hook, monkeypatch):
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.scheduler import Scheduler

    from kevlarflow.engine.orders import SchedulerOrders

    def begin_scheduling():
        return SchedulerOrders(pause=pauses)

    hook._executor = SimpleNamespace(begin_scheduling=begin_scheduling)
    hook._pause_state = PauseState.UNPAUSED
    hook.running = []
    hook.kv_holding_waiting, hook.num_waiting_for_streaming_input = (), 0
    hook.waiting.add_request(Waiting(3))
    monkeypatch.setattr(Scheduler, "schedule", lambda scheduler: scheduler._pause_state)
    pauses = True
    assert hook.schedule() is PauseState.PAUSED_ALL
    # Otherwise vLLM's loop would sleep until the next request comes, and miss the node that comes first.
    assert hook.has_unfinished_requests()
    pauses = False
    assert hook.schedule() is PauseState.UNPAUSED
