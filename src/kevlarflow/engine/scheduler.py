"""A hook in vLLM's scheduler: before each step it learns what a failure took, and it ends what cannot go on.

Only a scheduler can do these things. Cached prefix blocks that a new node does not hold are evicted before anything can
hit them. Blocks are withheld while the nodes share their memory with another pipeline, and requests that have no room
are preempted, or wait until there is more, up to a bound. And requests that cannot be saved end through the scheduler,
with an error for the client, so that the engine goes on.

Non-public names of vLLM, used in this module only: `Scheduler.kv_cache_manager.block_pool`, its `free_block_queue`, and
of a block `block_id`, `block_hash`, `ref_cnt`, `is_null`; `Scheduler._preempt_request`, `prev_step_scheduled_req_ids`,
`_pause_state`.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kevlarflow.engine.executor import KevlarExecutor
from kevlarflow.engine.orders import SchedulerOrders
from kevlarflow.engine.translate import AbandonedOutput
from kevlarflow.errors import IncompatibleVllm
from kevlarflow.recovery.pipeline_events import Aside

USED_NAMES = (
    "kv_cache_manager.block_pool.free_block_queue",
    "_preempt_request",
    "prev_step_scheduled_req_ids",
    "_pause_state",
)
HELD_PAUSE_SECONDS = 0.01
"""How long to rest when every request there is waits for more memory, or for a node.

A poll, since nothing here could wake vLLM's loop up: it looks for new requests and cancellations, in a queue of its
own, between two steps, and sleeps on that queue only if the scheduler says that it has no requests. But that would tell
a shutdown, too, that there is nothing to wait for.
"""


def check_scheduler(scheduler: Any) -> None:
    """Raise `IncompatibleVllm` when vLLM's scheduler lacks a name that this module uses."""
    for name in USED_NAMES:
        try:
            operator.attrgetter(name)(scheduler)
        except AttributeError:
            raise IncompatibleVllm(
                f"vLLM's {type(scheduler).__name__} has no {name}: this KevlarFlow release needs vLLM 0.32"
            ) from None


class KevlarScheduler(Scheduler):
    """See the module's text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_scheduler(self)
        assert KevlarExecutor.current is not None, "the executor comes before the scheduler"
        self._executor = KevlarExecutor.current
        self._ended: list[tuple[Request, str]] = []
        """Requests that were ended, with the reason for the client."""
        self._withheld: dict[int, Any] = {}
        """Blocks that may not be given out for now."""
        self._held: list[Request] = []
        """Requests that are longer than all blocks that may be given out, oldest first."""
        self._held_since: dict[Request, float] = {}
        """Since when they have been so. Orders that change nothing for them do not begin it anew."""
        self._longest_hold_seconds = self._executor.replacement_wait_seconds
        self._executor.scheduler_ready(self._load)

    def _load(self) -> tuple[int, int, int]:
        running, waiting = self.get_request_counts()
        return running, waiting, self.kv_cache_config.num_blocks

    # ---- vLLM's steps

    def add_request(self, request: Request) -> None:
        """Take a request. An order to end all was about those before it: when there are none, it is about nobody."""
        if not self.requests:
            self._executor.session.spare_newcomers()
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Make the next step, after what a failure demands."""
        orders = self._executor.begin_scheduling()
        self._obey(orders)
        if orders.pause:
            return self._schedule_nobody(*args, **kwargs)
        self._hold_back()
        if self._held and not self.running and not self.waiting:
            time.sleep(HELD_PAUSE_SECONDS)
        return super().schedule(*args, **kwargs)

    def _schedule_nobody(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """A step that only says who has ended, so that vLLM's loop serves new requests and cancellations meanwhile.

        vLLM's own pause would have the loop sleep until the next request comes, so it lasts for this step only.
        """
        time.sleep(HELD_PAUSE_SECONDS)
        before: PauseState = self.pause_state
        self._pause_state = PauseState.PAUSED_ALL
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self._pause_state = before

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take a step's output; when it was abandoned, its requests end, and all others before the next step."""
        if isinstance(model_runner_output, AbandonedOutput):
            self._end(list(scheduler_output.num_scheduled_tokens), model_runner_output.reason)
            model_runner_output = EMPTY_MODEL_RUNNER_OUTPUT
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        # The last token of one that was preempted may have been in flight: vLLM looks for it in its own queues only.
        self._held = [request for request in self._held if not request.is_finished()]
        self._tell_clients(outputs)
        return outputs

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting) requests."""
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._held)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """End requests from outside."""
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        self._held = [request for request in self._held if request not in finished]
        return finished

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """As vLLM does, to which blocks that are withheld, and so hold nothing, would seem to be in use."""
        queue = self.kv_cache_manager.block_pool.free_block_queue
        for block in self._withheld.values():
            queue.append(block)
        try:
            return bool(super().reset_prefix_cache(*args, **kwargs))
        finally:
            for block in self._withheld.values():
                queue.remove(block)

    # ---- what a failure demands

    def _obey(self, orders: SchedulerOrders) -> None:
        if orders.end_all:
            self._end(list(self.requests), orders.end_all)
        # Whoever is preempted goes to the front of the queue, so the youngest is the first.
        places = {request.request_id: place for place, request in enumerate(self.running)} if orders.aside else {}
        for aside in sorted(orders.aside, key=lambda each: -places.get(each.request, -1)):
            self._set_aside(aside)
        pool = self.kv_cache_manager.block_pool
        if orders.spoilt:
            pool.evict_blocks(orders.spoilt)
        for usable in orders.usable:
            self._use_blocks(usable)
        if orders.keep is not None:
            self._evict_unheld_blocks(orders.keep)

    def _set_aside(self, aside: Aside) -> None:
        """End a request, or preempt it; the tokens that it had in flight will not come."""
        request = self.requests.get(aside.request)
        if request is None:
            return
        if aside.reason:
            self._end([aside.request], aside.reason)
            return
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
            self.prev_step_scheduled_req_ids.discard(aside.request)
        if not aside.known and request.status == RequestStatus.PREEMPTED:
            # No node has ever heard of it: it has to be introduced like a new one.
            request.status = RequestStatus.WAITING

    def _use_blocks(self, usable: frozenset[int] | None) -> None:
        """Give out these blocks only."""
        pool = self.kv_cache_manager.block_pool
        for block_id in [b for b in self._withheld if usable is None or b in usable]:
            pool.free_block_queue.append(self._withheld.pop(block_id))
        if usable is not None:
            surplus = [
                b for b in pool.blocks if not (b.is_null or b.block_id in usable or b.block_id in self._withheld)
            ]
            if strays := [block.block_id for block in surplus if block.ref_cnt]:
                raise AssertionError(f"blocks {strays} are in use and beyond this pipeline's share")
            # A prefix is of no use without its beginning, so all that nobody holds goes.
            self._evict_unheld_blocks(frozenset())
            for block in surplus:
                pool.free_block_queue.remove(block)
                self._withheld[block.block_id] = block
        for request in reversed(self._held):
            self.waiting.prepend_request(request)
        self._held.clear()

    def _hold_back(self) -> None:
        """Take requests out of the queue that no preemption can make room for, and end those that wait for too long."""
        if not self._withheld:
            self._held_since.clear()
            return
        blocks = self.kv_cache_config.num_blocks - 1
        left = blocks - len(self._withheld)
        room = left * self.cache_config.block_size
        too_long = [request for request in self.waiting if request.num_tokens >= room]
        if too_long:
            self.waiting.remove_requests(too_long)
            self._held += too_long
        now = time.monotonic()
        self._held_since = {request: self._held_since.get(request, now) for request in self._held}
        for request, since in self._held_since.items():
            # What is in flight of one that was preempted is still delivered, and may be all that it lacked.
            if now - since >= self._longest_hold_seconds and not request.num_in_flight_tokens:
                # Each of k pipelines has 1/k of the blocks.
                self._end([request.request_id], self._about_room(request, room, blocks // max(1, left)))

    def _about_room(self, request: Request, room: int, pipelines: int) -> str:
        return (
            f"this request needs {request.num_tokens + 1} tokens of KV memory, and only {room} are left while a node "
            f"serves {pipelines} pipelines; no more came within {self._longest_hold_seconds:g} s (--replacement-wait): "
            "start a node with kevlarflow node --join, or raise --kv-cache-memory-bytes"
        )

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
