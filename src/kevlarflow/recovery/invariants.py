"""What must hold of a cluster after every event, however strange its history.

`Invariants` watches one cluster: call `check` after each `handle`. It raises `Violated`, which carries the story
of whom it concerns. Tests and the simulator run it after every event; it looks only at what is, and at what it saw
last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.events import AnyCommand, Form, Suspend
from kevlarflow.recovery.members import LIVING, Pipeline, subject
from kevlarflow.recovery.shares import shares
from kevlarflow.types import Epoch, NodeState, PipelineId, PipelineState, RecoveryState


class Violated(AssertionError):
    """An invariant does not hold."""


Problem = tuple[str, str]
"""Whom it concerns, and what is wrong."""


def members_are_living(cluster: Cluster) -> Iterator[Problem]:
    """No pipeline names a member that is dead, of another stage, or of the past."""
    for pipeline in cluster.pipelines:
        for stage, member in enumerate(pipeline.members):
            if member is None:
                continue
            slot = cluster.slot_of(member)
            if slot is None or slot.state not in LIVING:
                yield subject(pipeline.id), f"names {member}, which is not alive"
            elif slot.stage != stage:
                yield subject(pipeline.id), f"names {member} for stage {stage}"


def serving_is_complete(cluster: Cluster) -> Iterator[Problem]:
    """A pipeline that serves or recovers has a node for every stage and an engine; one that serves was formed."""
    for pipeline in cluster.pipelines:
        if pipeline.state not in (PipelineState.SERVING, PipelineState.RECOVERING):
            continue
        if pipeline.holes:
            yield subject(pipeline.id), f"is {pipeline.state} without stages {pipeline.holes}"
        if not pipeline.engine.attached:
            yield subject(pipeline.id), f"is {pipeline.state} without an engine"
        if (pipeline.state is PipelineState.SERVING) != pipeline.formed:
            yield subject(pipeline.id), f"is {pipeline.state}, formed: {pipeline.formed}"
        if pipeline.forming == pipeline.formed:
            yield subject(pipeline.id), f"is forming: {pipeline.forming}, formed: {pipeline.formed}"


def lanes_have_memory(cluster: Cluster) -> Iterator[Problem]:
    """No node has more lanes than memory, the lane of its own pipeline counted whether it is used or not."""
    for slot in cluster.slots.values():
        if slot.info is None:
            continue
        others = (each for each in cluster.pipelines if each.id != slot.pipeline)
        # Lanes that are only presumed after a loss of memory are no proof.
        held = (each.members if cluster.forgetful else each.lanes for each in others)
        foreign = sum(slot.member in lanes for lanes in held)
        if foreign > slot.info.lanes - 1:
            yield slot.node, f"has {foreign} foreign lanes and memory for {slot.info.lanes} in all"


def shares_fit(cluster: Cluster) -> Iterator[Problem]:
    """Who serves with a node knows how many do, so that together they use no more than its KV memory."""
    for pipeline in cluster.pipelines:
        told = pipeline.engine.attached and (pipeline.forming or pipeline.formed) and not pipeline.holes
        if told and pipeline.shares != shares(cluster, pipeline):
            yield subject(pipeline.id), f"uses 1/{pipeline.shares} where {shares(cluster, pipeline)} lanes share"


def waiting_has_a_reason(cluster: Cluster) -> Iterator[Problem]:
    """A pipeline waits only for a stage that it has no node for."""
    for pipeline in cluster.pipelines:
        if pipeline.state is PipelineState.WAITING and not pipeline.holes:
            yield subject(pipeline.id), "waits for nothing"


def waiting_is_bounded(cluster: Cluster) -> Iterator[Problem]:
    """Requests wait for a node no longer than the bound, which stops when the pipeline serves."""
    for pipeline in cluster.pipelines:
        waits = pipeline.state is PipelineState.WAITING and isinstance(pipeline.order, Suspend) and pipeline.order.waits
        over = pipeline.wait_until is None or (cluster.passes_deadlines and cluster.now >= pipeline.wait_until)
        if waits and over:
            yield subject(pipeline.id), "lets its requests wait beyond the bound"
        if pipeline.state is PipelineState.SERVING and pipeline.wait_until is not None:
            yield subject(pipeline.id), "serves, and its bound runs on"


def records_match(cluster: Cluster) -> Iterator[Problem]:
    """A recovery runs exactly while its pipeline is not serving; ended ones are kept, but not for ever."""
    for pipeline in cluster.pipelines:
        if pipeline.recoveries and pipeline.state is PipelineState.SERVING:
            yield subject(pipeline.id), "serves and has recoveries that run"
    running = {each.id for pipeline in cluster.pipelines for each in pipeline.recoveries.values()}
    for recovery in cluster.recoveries:
        if (recovery.state is RecoveryState.RUNNING) != (recovery.id in running):
            yield subject(recovery.pipeline), f"recovery {recovery.id} is {recovery.state}"
        phases = (recovery.seconds.detect, recovery.seconds.plan, recovery.seconds.relink)
        if min(phases) < 0:
            yield subject(recovery.pipeline), f"recovery {recovery.id} took {recovery.seconds}"


def who_drains_can_leave(cluster: Cluster) -> Iterator[Problem]:
    """A node drains for a reason, and was not told to leave while a pipeline has a lane on it."""
    for slot in cluster.slots.values():
        emptied = slot.emptied_for is not None
        if (emptied and slot.usable) or (not emptied and slot.state is NodeState.DRAINING):
            yield slot.node, f"is {slot.state} and emptied for {slot.emptied_for}"
        if slot.leave_by is not None and any(slot.member in each.members for each in cluster.pipelines):
            yield slot.node, "was told to leave and serves"


def somebody_is_on_the_way(cluster: Cluster) -> Iterator[Problem]:
    """After the start, a dead slot has a time at which it is filled again."""
    for slot in cluster.slots.values():
        dead = slot.state is NodeState.DEAD and cluster.begun and not slot.vacant
        if dead and slot.start_at is None and cluster.served:
            yield slot.node, "is dead and nobody starts it"
        if slot.state is NodeState.STARTING and slot.ready_by is None:
            yield slot.node, "may take for ever to start"


CHECKS: tuple[Callable[[Cluster], Iterator[Problem]], ...] = (
    members_are_living,
    serving_is_complete,
    lanes_have_memory,
    shares_fit,
    waiting_has_a_reason,
    waiting_is_bounded,
    records_match,
    who_drains_can_leave,
    somebody_is_on_the_way,
)


class Invariants:
    """The checks on one cluster, and those that need to know what was before."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._epochs: dict[PipelineId, Epoch] = {each.id: each.epoch for each in cluster.pipelines}
        self._ordered: dict[PipelineId, Form | Suspend] = {}
        """The newest order of each pipeline that was sent."""

    def check(self, commands: list[AnyCommand]) -> None:
        """Raise `Violated` if something does not hold after the event that led to `commands`."""
        if self._cluster.aborted is not None:
            return
        for check in CHECKS:
            for whom, problem in check(self._cluster):
                self._fail(whom, problem)
        for command in commands:
            self._check_order(command)
        for pipeline in self._cluster.pipelines:
            self._check_epoch(pipeline)

    def _check_order(self, command: AnyCommand) -> None:
        """Each new order carries an epoch of its own; only the newest may be sent again, unchanged."""
        if not isinstance(command, (Form, Suspend)):
            return
        pipeline = self._cluster.pipelines[command.pipeline]
        last = self._ordered.get(command.pipeline)
        if last is not None and command.epoch <= last.epoch and command != last:
            self._fail(subject(command.pipeline), f"was sent {command} after epoch {last.epoch}")
        self._ordered[command.pipeline] = command
        if isinstance(command, Form):
            stages = [info.stage for info in command.nodes]
            if stages != list(range(len(pipeline.members))):
                self._fail(subject(command.pipeline), f"was told to form with stages {stages}")
            if {each.member for each in command.nodes} & {each.member for each in command.released}:
                self._fail(subject(command.pipeline), "was told to use a node and to leave it")
            if isinstance(last, Form) and command.epoch > last.epoch:
                self._check_newcomers(command, last)

    def _check_newcomers(self, order: Form, last: Form) -> None:
        """A lane is given to a node only that is known to be well."""
        for member in {each.member for each in order.nodes} - {each.member for each in last.nodes}:
            slot = self._cluster.slot_of(member)
            if slot is None or not slot.usable:
                self._fail(subject(order.pipeline), f"is given {member}, which is {slot.state if slot else 'gone'}")

    def _check_epoch(self, pipeline: Pipeline) -> None:
        if pipeline.epoch < self._epochs[pipeline.id]:
            self._fail(subject(pipeline.id), f"went from epoch {self._epochs[pipeline.id]} to {pipeline.epoch}")
        self._epochs[pipeline.id] = pipeline.epoch

    def _fail(self, whom: str, problem: str) -> None:
        raise Violated(f"{whom} {problem}\n{self._cluster.story.tell(whom)}")
