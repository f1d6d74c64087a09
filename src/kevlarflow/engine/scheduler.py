"""A hook in vLLM's scheduler: before each step it learns what a failure took, and it ends what cannot go on.

Two things only a scheduler can do. Cached prefix blocks that a new node does not hold are evicted before anything can
hit them. And requests that cannot be saved end through the scheduler, with an error for the client, so that the
engine goes on.

Non-public names of vLLM, used in this module only: `Scheduler.kv_cache_manager.block_pool`, and of a block `block_id`,
`block_hash`, `ref_cnt`, `is_null`.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kevlarflow.engine.executor import AbandonedOutput, KevlarExecutor


class KevlarScheduler(Scheduler):
    """See the module's text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert KevlarExecutor.current is not None, "the executor comes before the scheduler"
        self._executor = KevlarExecutor.current
        self._ended: list[tuple[Request, str]] = []
        """Requests that were ended, with the reason for the client."""
        self._executor.scheduler_ready(self._load)

    def _load(self) -> tuple[int, int, int]:
        running, waiting = self.get_request_counts()
        return running, waiting, self.kv_cache_config.num_blocks

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Make the next step, after what a failure demands."""
        keep, reason = self._executor.begin_scheduling()
        if reason:
            self._end(list(self.requests), reason)
        if keep is not None:
            self._evict_unheld_blocks(keep)
        return super().schedule(*args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take a step's output; when it was abandoned, so is every request."""
        if isinstance(model_runner_output, AbandonedOutput):
            self._end(list(self.requests), model_runner_output.reason)
            model_runner_output = EMPTY_MODEL_RUNNER_OUTPUT
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        self._tell_clients(outputs)
        return outputs

    def _evict_unheld_blocks(self, keep: frozenset[int]) -> None:
        """Forget cached blocks that no live request holds, but `keep`, which came back from replicas."""
        pool = self.kv_cache_manager.block_pool
        unheld = {
            b.block_id for b in pool.blocks if b.block_hash is not None and b.ref_cnt == 0 and not b.is_null
        } - keep
        pool.evict_blocks(unheld)

    def _end(self, request_ids: list[str], reason: str) -> None:
        ended = self.finish_requests(request_ids, RequestStatus.FINISHED_ERROR)
        self._executor.session.note_lost(len(ended))
        self._ended += [(request, reason) for request in ended]

    def _tell_clients(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for request, reason in self._ended:
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=reason,
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)
        self._ended.clear()
