"""The face that vLLM's engine sees: an `Executor` whose workers are the nodes of a pipeline that may change.

vLLM calls `execute_model` and `sample_tokens`; the step leaves in the second (only then is the grammar's bitmask
known) and comes back through a future that recovers the pipeline while it waits. What vLLM asks of its workers at
start-up is answered from the descriptions that the nodes gave: the nodes have loaded and sized themselves already.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from setproctitle import setproctitle
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.worker.worker_base import CompilationTimes

from kevlarflow import config as configuration
from kevlarflow.engine.attendant import Attendant
from kevlarflow.engine.orders import SchedulerOrders
from kevlarflow.engine.session import Session
from kevlarflow.engine.translate import has_news, step_of
from kevlarflow.errors import StartupFailed
from kevlarflow.kinship import TITLE
from kevlarflow.recovery.recompute import Limits
from kevlarflow.types import PipelineId
from kevlarflow.wire.messages import EngineReady

log = logging.getLogger("kevlarflow.engine")

RECOMPUTE_TOKENS = 128
"""Tokens that are recomputed in one forward pass. Short passes let the donor serve its own pipeline in between, and let
the stages up to the lost one work on different passes at the same time; much shorter ones waste time in overhead."""


class KevlarExecutor(Executor):
    """See the module's text. One per engine process; `current` finds it for the scheduler hook."""

    supports_pp = True
    current: KevlarExecutor | None = None

    def _init_executor(self) -> None:
        config = configuration.load()
        pipeline = PipelineId(self.parallel_config.data_parallel_index)
        # By it a controller that has lost its memory knows whose process this is, even if it does not speak.
        setproctitle(f"{TITLE}engine-{pipeline}")
        limits = Limits(
            max_batched_tokens=min(RECOMPUTE_TOKENS, self.scheduler_config.max_num_batched_tokens),
            max_requests=self.scheduler_config.max_num_seqs,
            block_size=self.cache_config.block_size,
            stages=self.parallel_config.pipeline_parallel_size,
        )
        self.session = Session(pipeline, limits)
        self._attendant = Attendant(config, self.session)
        self._attendant.start()
        self.replacement_wait_seconds = config.replacement_wait_s
        self._descriptions = self.session.wait_formed(config.timeouts.startup_timeout_s)
        # Numbers of steps name the content of KV blocks, on standbys too, which outlive an engine. Counting on from
        # the time of day in microseconds, no engine of this pipeline uses a number of an earlier one again.
        self._sequence = itertools.count(time.time_ns() // 1_000)
        self._formation = 0
        self._pending: SchedulerOutput | None = None
        KevlarExecutor.current = self

    # ---- the scheduler hook

    def begin_scheduling(self) -> SchedulerOrders:
        """Called before the scheduler makes a step; returns what it has to do first."""
        self._formation, orders = self.session.begin_scheduling()
        return orders

    def scheduler_ready(self, load: Callable[[], tuple[int, int, int]]) -> None:
        """The scheduler exists and can be asked for its load."""
        self._attendant.watch(load)
        self.session.reports.append(EngineReady(self.session.pipeline, load()[2]))

    # ---- steps

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Take a step. One with tokens is issued by `sample_tokens`; one without has no output to wait for."""
        if scheduler_output.total_num_scheduled_tokens:
            self._pending = scheduler_output
            return _done(None) if non_block else None
        if has_news(scheduler_output):
            self._issue(scheduler_output, None)
        return _done(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """Issue the pending step; its output, or a future of it."""
        pending, self._pending = self._pending, None
        assert pending is not None, "sample_tokens() follows execute_model()"
        future = self._issue(pending, grammar_output)
        return future if non_block else future.result()

    def _issue(self, scheduled: SchedulerOutput, grammar: GrammarOutput | None) -> Future[Any]:
        step = step_of(scheduled, next(self._sequence), self._formation)
        return self.session.issue(step, scheduled, grammar)

    # ---- what vLLM asks of workers

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """Answer for the nodes. Raises `NotImplementedError` for what needs a worker at run time."""
        answers = self._answers(method, args)
        return _done(answers) if non_block else answers

    def _answers(self, method: str | Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        stages = self._descriptions
        match method:
            case "get_kv_cache_spec":
                return [stage.kv_cache_spec for stage in stages]
            case "get_supported_kv_cache_layouts":
                return [stage.kv_cache_layouts for stage in stages]
            case "determine_available_memory":
                return [stage.available_memory for stage in stages]
            case "initialize_from_config":
                return self._check_blocks(args[0])
            case "compile_or_warm_up_model":
                return [CompilationTimes(stage.compilation_seconds, 0.0) for stage in stages]
            case "get_supported_tasks":
                return [stage.supported_tasks for stage in stages]
            case "set_kv_cache_layout" | "reset_mm_cache" | "reset_encoder_cache" | "synchronize_device" | "shutdown":
                return [None] * len(stages)
            case "sleep" | "wake_up":
                # As vLLM's CPU worker does: its engine pauses before it asks, and would stay so if this raised.
                log.warning("%s frees and loads nothing: nodes keep their memory, and only scheduling stops", method)
                return [None] * len(stages)
        raise NotImplementedError(f"KevlarFlow's nodes do not offer {method!r} while they serve")

    def _check_blocks(self, kv_cache_configs: list[Any]) -> list[None]:
        for stage, (wanted, have) in enumerate(zip(kv_cache_configs, self._descriptions, strict=True)):
            if wanted.num_blocks > have.num_blocks:
                raise StartupFailed(
                    f"the engine wants {wanted.num_blocks} KV blocks, but stage {stage} has {have.num_blocks}"
                )
        return [None] * len(kv_cache_configs)

    def check_health(self) -> None:
        """An executor without a pipeline is waiting, not dead: `/health` asks the controller instead."""

    def shutdown(self) -> None:
        """Let the nodes go on without this engine."""
        self._attendant.stop()
        self.session.close()


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
