"""The session around a pipeline's core, without nodes."""

from __future__ import annotations

import pickle

from kevlarflow.recovery.recompute import Limits
from kevlarflow.types import Epoch, PipelineId
from kevlarflow.wire import steps


def test_the_output_of_a_step_that_is_over_is_not_kept():
    from vllm.v1.outputs import ModelRunnerOutput

    from kevlarflow.engine.session import Session

    session = Session(PipelineId(0), Limits(max_batched_tokens=8, max_requests=2, block_size=4, stages=1))
    output = ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0}, sampled_token_ids=[[7]])
    # All its requests were set aside, and it was delivered without them.
    session._receive(steps.Executed(PipelineId(0), Epoch(0), 5), [pickle.dumps((output, {}))])
    assert not session._outputs
