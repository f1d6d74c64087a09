"""Which of vLLM's steps without tokens the nodes have to hear of."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("news", "expected"),
    [
        ({}, False),
        ({"finished_req_ids": {"a"}}, True),
        ({"preempted_req_ids": {"a"}}, True),
        ({"new_block_ids_to_zero": [3]}, True),
        ({"free_encoder_mm_hashes": ["picture"]}, True),
    ],
)
def test_a_step_without_tokens_is_sent_if_it_says_anything(news: dict[str, Any], expected: bool) -> None:
    from vllm.v1.core.sched.output import SchedulerOutput

    from kevlarflow.engine.translate import has_news

    step = SchedulerOutput.make_empty()
    for name, value in news.items():
        assert hasattr(step, name)
        setattr(step, name, value)
    assert has_news(step) is expected
