"""The hook in vLLM's scheduler, over vLLM's own block pool and queue."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kevlarflow.errors import IncompatibleVllm

pytestmark = pytest.mark.timeout(120)


class Waiting:
    """All that the hook asks of a request in the queue."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens


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
    hook._withheld, hook._held = {}, []
    return hook


def test_only_usable_blocks_are_given_out_and_all_of_them_when_there_is_room_again(hook):
    pool = hook.kv_cache_manager.block_pool
    hook._use_blocks(frozenset({2, 5, 7}))
    assert pool.get_num_free_blocks() == 3
    assert {block.block_id for block in pool.get_new_blocks(3)} == {2, 5, 7}
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


def test_another_vllm_is_refused_by_the_name_that_it_lacks():
    from kevlarflow.engine.scheduler import check_scheduler

    with pytest.raises(IncompatibleVllm, match=r"no kv_cache_manager\.block_pool\.free_block_queue"):
        check_scheduler(SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=object())))
