"""Sampling on the CPU compiles nothing: a step that compiles for seconds looks like a node that is stuck."""

from __future__ import annotations

import torch
from torch._dynamo.utils import counters
from vllm.v1.sample import sampler
from vllm.v1.sample.ops import topk_topp_sampler

from kevlarflow.node.cpu import register_kernels


def test_the_first_logprobs_and_the_first_draw_compile_nothing() -> None:
    register_kernels()
    counters.clear()
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]])
    ranks = sampler.Sampler.gather_logprobs(logits, 1, torch.tensor([2, 0])).selected_token_ranks
    assert ranks.tolist() == [2, 1]
    certain = torch.tensor([[0.0, 1e4, 0.0]])
    assert topk_topp_sampler.compiled_random_sample(certain).tolist() == [1]
    assert not counters["stats"]
