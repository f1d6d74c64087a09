"""A logits processor that kills the node it runs on: what a bug of a user's own code, or of a kernel, does.

vLLM loads it by ``--logits-processors integration.deadly:Deadly``. A request asks for it by
``"vllm_xargs": {"deadly_after": n}``, and its node dies of SIGSEGV in the step that would compute token n + 1.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

FLAG = "--logits-processors=integration.deadly:Deadly"


class Deadly(AdapterLogitsProcessor):
    """See the module's text."""

    def is_argmax_invariant(self) -> bool:
        """vLLM skips those that are when all requests are greedy."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        """For the requests that ask for it."""
        after = (params.extra_args or {}).get("deadly_after")
        return functools.partial(_die, after) if after is not None else None


def _die(after: int, output: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(output) >= after:
        ctypes.string_at(0)
    return logits
