"""The life of a node: load the stage alone, say so, then serve lanes until told to leave.

Follow a step from here: it comes in at `_take_from_engines`, waits in its lane (`node.lanes`) for the activations that
arrive at `_take_activations`, runs in `_run` as `node.work` says, and leaves to the next node (`pass_on`) or, at the
last stage, back to the engine (`answer`). All of it happens on this one thread, so a lane never changes while it
computes. There are two others: the heartbeat, and the replicator, which reads KV blocks and looks at their tags
afterwards.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq
from vllm.config import VllmConfig

from kevlarflow.config import ServeConfig
from kevlarflow.errors import KevlarFlowError
from kevlarflow.node.device import stage_device
from kevlarflow.node.heartbeat import HeartbeatThread
from kevlarflow.node.lane_replicas import LaneReplicas
from kevlarflow.node.lanes import Lane, Lanes, Work
from kevlarflow.node.pace import PaceMeter
from kevlarflow.node.progress import Progress
from kevlarflow.node.replicator import Replicator
from kevlarflow.node.sockets import Sockets, remove_of_former_lives
from kevlarflow.node.stage import Activations, Sampled, StageDevice
from kevlarflow.node.work import Computed, Workflow
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.replication.standby import Bounds
from kevlarflow.replication.zmq_transfer import ZmqTransfer
from kevlarflow.types import Member, NodeInfo, Stage
from kevlarflow.wire import steps
from kevlarflow.wire.flight_record import FlightRecorder
from kevlarflow.wire.messages import NodeStarting

log = logging.getLogger("kevlarflow.node")

# Received frames are read-only; they are copied into the runner's own buffer before anything is computed.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

MAX_WAITING_MESSAGES = 10_000
"""High-water mark of each socket, in messages."""


def run(config: ServeConfig, member: Member, stage: Stage, configure: Callable[[ServeConfig], VllmConfig]) -> None:
    """Serve as `member` until the process is told to leave. Does not return.

    `configure` makes vLLM's configuration of a pipeline, the same that the engines have.

    A failure to load, or to get the memory for replicas, is reported to the controller in one line, and the process
    exits with status 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    progress = Progress(config.timeouts.step_floor_ms / 1_000)
    pace = PaceMeter()
    server = NodeServer(config, member, stage, progress, pace)
    starting = NodeStarting(member, stage, socket.gethostname(), (os.getpid(),))
    heartbeat = HeartbeatThread(config, starting, progress, pace, server.epochs)
    heartbeat.start()
    try:
        device = stage_device(config, stage, configure(config))
        device.load()
        heartbeat.say_ready(server.attach(device))
    except Exception as error:
        log.exception("%s cannot load stage %d", member, stage)
        heartbeat.say_failed(_for_people(error))
        raise SystemExit(1) from error
    server.serve()


def _for_people(error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return first_line if isinstance(error, KevlarFlowError) else f"{type(error).__name__}: {first_line}"


class NodeServer:
    """The node's sockets and main loop."""

    def __init__(self, config: ServeConfig, member: Member, stage: Stage, progress: Progress, pace: PaceMeter) -> None:
        self._config = config
        self._member = member
        self._stage = stage
        self._progress = progress
        self._pace = pace
        self._lanes = Lanes([], 0, is_first_stage=stage == 0)
        self._description = b""
        self._workflow: Workflow | None = None
        """Once it has loaded."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        run_folder = Path(config.run_folder)
        remove_of_former_lives(run_folder, member)
        self._sockets = Sockets.of(run_folder, member)
        self._recorder = FlightRecorder(run_folder, member)
        self._engines = self._bind(zmq.ROUTER, self._sockets.steps)
        self._upstream = self._bind(zmq.PULL, self._sockets.activations)
        self._replicas: LaneReplicas | None = None

    def _bind(self, kind: int, path: Path) -> zmq.Socket[bytes]:
        path.unlink(missing_ok=True)
        sock: zmq.Socket[bytes] = self._context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.SNDHWM, MAX_WAITING_MESSAGES)
        sock.setsockopt(zmq.RCVHWM, MAX_WAITING_MESSAGES)
        sock.bind(f"ipc://{path}")
        return sock

    def epochs(self) -> Any:
        """The newest epoch of each pipeline that this node has seen."""
        return self._lanes.epochs

    def attach(self, device: StageDevice) -> NodeInfo:
        """Take over a loaded device; returns what the node says of itself."""
        description, runners = device.description(), device.runners()
        self._lanes = Lanes(runners, description.num_blocks, is_first_stage=self._stage == 0)
        self._description = pickle.dumps(description)
        replica_address = self._replicate(device) if self._config.standby_memory_bytes else ""
        self._workflow = Workflow(self._stage, description.block_size, self._replicas, self, time.monotonic)
        return NodeInfo(
            member=self._member,
            stage=self._stage,
            host=socket.gethostname(),
            pid=os.getpid(),
            pids=(os.getpid(),),
            step_address=f"ipc://{self._sockets.steps}",
            activation_address=f"ipc://{self._sockets.activations}",
            lanes=len(runners),
            kv_blocks=description.num_blocks,
            replica_address=replica_address,
        )

    def _replicate(self, device: StageDevice) -> str:
        """Start to copy lanes, and to keep copies of others; returns the address where those are to be sent."""
        config, description, kv = self._config, device.description(), device.kv_blocks()
        address = f"ipc://{self._sockets.replicas}"
        bounds = Bounds(
            config.pipelines, description.num_blocks, description.block_size, kv.block_bytes, kv.token_bytes
        )
        transfer = ZmqTransfer(address, kv.block_bytes, config.pipelines)
        replicator = Replicator(config, self._member, self._stage, kv, bounds, transfer)
        replicator.start()
        self._replicas = LaneReplicas(replicator, kv)
        return address

    def serve(self) -> None:
        """Take messages and run work, for ever."""
        poller = zmq.Poller()
        poller.register(self._engines, zmq.POLLIN)
        poller.register(self._upstream, zmq.POLLIN)
        if self._replicas:
            poller.register(self._replicas.answered, zmq.POLLIN)
        self._progress.wake()
        while True:
            self._pass_on_outcomes()
            self._take_from_engines()
            self._take_activations()
            due_ms = self._say_flushed()
            ready = self._lanes.next_work()
            if ready is None:
                self._progress.rest()
                poller.poll(due_ms)
                self._progress.wake()
            else:
                self._run(*ready)

    # ---- coming in

    def _take_from_engines(self) -> None:
        while True:
            try:
                engine, frame, *payload = self._engines.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(engine, steps.decode(frame), payload)
            except msgspec.MsgspecError:
                log.warning("%s: a message of an engine makes no sense and was dropped", self._member)

    def _take(self, engine: bytes, header: steps.AnyStepMessage, payload: list[bytes]) -> None:
        if isinstance(header, steps.OF_A_LANE) and self._lanes.loses_touch(header.pipeline, header.epoch, engine):
            self._answer(engine, steps.Unlinked(header.pipeline, header.epoch, self._stage))
            return
        match header:
            case steps.Describe():
                self._answer(engine, steps.Description(self._stage), self._description)
            case steps.Join() | steps.Leave() | steps.AssignStandby() | steps.Hasten():
                self._progress.begin(header.pipeline)
                # What raises here ends the node, and is not answered as in `_run`. There the lane is broken until it is
                # emptied; if that fails nobody knows what its runner holds, and only a new process is sure to be clean.
                # The loss is noticed within a moment and held against no request, since nothing was being computed.
                try:
                    self._take_about_lane(engine, header, payload)
                finally:
                    self._progress.end()
            case (
                steps.Execute()
                | steps.Recompute()
                | steps.Restore()
                | steps.Flush()
                | steps.Place()
                | steps.PlaceRest()
            ):
                # Unless it carries an old epoch.
                self._lanes.add_work(Work(engine, header, payload))
            case _:
                log.warning("%s: %s is no message for a node", self._member, type(header).__name__)

    def _take_about_lane(
        self, engine: bytes, header: steps.Join | steps.Leave | steps.AssignStandby | steps.Hasten, payload: list[bytes]
    ) -> None:
        match header:
            case steps.Join():
                self._join(engine, header, payload)
            case steps.Leave():
                self._leave(header)
                self._answer(engine, steps.Left(header.pipeline, header.epoch, self._member))
            case _:
                self._take_about_replicas(header)

    def _take_about_replicas(self, header: steps.AssignStandby | steps.Hasten) -> None:
        lane = self._lanes.current(header.pipeline, header.epoch)
        if lane is None or self._replicas is None:
            return
        if isinstance(header, steps.AssignStandby):
            self._replicas.assign(lane, header.standby, anew=header.anew)
        else:
            self._replicas.hasten(lane)

    def _leave(self, leave: steps.Leave) -> None:
        left = self._lanes.leave(leave.pipeline, leave.epoch)
        if left is not None:
            _unlink(left)
            if self._replicas:
                self._replicas.close(left)

    def _join(self, engine: bytes, join: steps.Join, payload: list[bytes]) -> None:
        for orphan in join.orphans:
            self._leave(steps.Leave(*orphan))
        lane = self._lanes.open(join.pipeline, join.epoch) if join.stage == self._stage else None
        if lane is None:
            reason = f"{self._member} serves stage {self._stage} and has no lane for epoch {join.epoch}"
            self._answer(engine, steps.Refused(join.pipeline, join.epoch, join.stage, reason))
            return
        _unlink(lane)
        lane.engine = engine
        if self._replicas:
            self._replicas.open(lane)
        first = self._replicas.kept(lane) if self._replicas else frozenset[int]()
        self._lanes.share(lane, pickle.loads(payload[0]), first)
        if join.next_address:
            lane.link = self._context.socket(zmq.PUSH)
            lane.link.setsockopt(zmq.LINGER, 0)
            lane.link.setsockopt(zmq.SNDHWM, MAX_WAITING_MESSAGES)
            lane.link.connect(join.next_address)
        results = lane.kept.results
        joined = steps.Joined(join.pipeline, join.epoch, join.stage, tuple(results))
        self._answer(engine, joined, *results.values())

    def _pass_on_outcomes(self) -> None:
        """Tell engines what the standbys have confirmed."""
        for outcome in self._replicas.outcomes() if self._replicas else ():
            lane = self._lanes.current(outcome.pipeline)
            if lane is not None:
                self._answer(lane.engine, outcome)
                if isinstance(outcome, steps.Flushed) and outcome.epoch == lane.epoch:
                    lane.flush_until = None

    def _say_flushed(self) -> int | None:
        """Say so of lanes whose standbys have had time enough; returns the milliseconds until that is due again."""
        now = time.monotonic()
        for lane in self._lanes:
            if lane.flush_until is not None and now >= lane.flush_until:
                lane.flush_until = None
                self._answer(lane.engine, steps.Flushed(lane.pipeline, lane.epoch, self._stage))
        due = [lane.flush_until for lane in self._lanes if lane.flush_until is not None]
        return math.ceil(1_000 * (min(due) - now)) if due else None

    def _take_activations(self) -> None:
        while True:
            try:
                frame, *raw = self._upstream.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                header = steps.decode(frame)
            except msgspec.MsgspecError:
                log.warning("%s: a message of another node makes no sense and was dropped", self._member)
                continue
            if isinstance(header, steps.Activations):
                # Unless they carry an old epoch.
                tensors = _unpack(header, raw)
                self._lanes.add_activations(header.pipeline, header.epoch, header.sequence, tensors)

    # ---- running

    def _run(self, lane: Lane, work: Work, activations: Activations | None) -> None:
        header = work.header
        self._progress.begin(header.pipeline)
        try:
            assert self._workflow is not None, "who serves has loaded"
            done = self._workflow.begin(lane, work, activations)
            self._workflow.end(lane, work, done)
        except Exception as error:
            log.exception("%s: %s failed on lane %d", self._member, type(header).__name__, header.pipeline)
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            sequence = header.sequence if isinstance(header, steps.Execute | steps.Recompute) else 0
            self._lanes.fail(lane)
            self._answer(work.engine, steps.StepFailed(header.pipeline, header.epoch, sequence, self._stage, reason))
        else:
            # What raises here ends the node, as in `_take`: it was said to be done, and a newer order may count on it.
            done.still_to_do()
        finally:
            self._progress.end()

    # ---- what the workflow computes with: see `node.work.Shell`

    def content(self, work: Work) -> Any:
        """Unpack what came along."""
        return pickle.loads(work.payload[0])

    def execute(self, lane: Lane, work: Work, step: steps.Execute, activations: Activations | None) -> Computed:
        """Run a step with vLLM."""
        scheduled, grammar = pickle.loads(work.payload[0]), pickle.loads(work.payload[1])
        self._progress.measure(scheduled.total_num_scheduled_tokens)
        self._pace.begin(scheduled)
        with self._recorder.computing(step.pipeline, step.epoch, step.sequence):
            result = lane.runner.execute(scheduled, activations, grammar, self._pace.end)
        if isinstance(result, Sampled):
            payload = pickle.dumps((result.output, result.generators), pickle.HIGHEST_PROTOCOL)
            return Computed(sampled=payload, size=len(payload))
        return Computed(result, size=sum(tensor.nbytes for tensor in result.values()) if result is not None else 0)

    def follow(self, lane: Lane, work: Work, kept: tuple[Activations, Sequence[str]]) -> tuple[Activations, Any]:
        """Have vLLM take note of a step, and put the rows of its output into the order that they have now."""
        output = lane.runner.follow(pickle.loads(work.payload[0]), *kept)
        return output, (output, lane.runner.batch)

    def recompute(
        self, lane: Lane, recompute: steps.Recompute, chunk: Chunk, activations: Activations | None
    ) -> Activations | None:
        """Run a chunk with vLLM."""
        with self._recorder.computing(recompute.pipeline, recompute.epoch, recompute.sequence):
            return lane.runner.recompute(chunk, activations)

    def to_keep(self, lane: Lane, output: Activations) -> tuple[Activations, Sequence[str]]:
        """A copy, with whose rows it has: the runner may use the memory again."""
        return {name: tensor.clone() for name, tensor in output.items()}, lane.runner.batch

    def pass_on(self, lane: Lane, sequence: int, output: Activations) -> None:
        """Send activations to the next stage."""
        tensors = {name: tensor.contiguous() for name, tensor in output.items()}
        shapes = tuple((name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items())
        header = steps.encode(steps.Activations(lane.pipeline, lane.epoch, sequence, shapes))
        self._send(lane.link, [header, *(t.view(torch.uint8).numpy() for t in tensors.values())])

    def answer(self, lane: Lane, answer: steps.AnyStepMessage, *payload: bytes) -> None:
        """Send to the lane's engine."""
        self._answer(lane.engine, answer, *payload)

    # ---- going out

    def _answer(self, engine: bytes, header: steps.AnyStepMessage, *payload: bytes) -> None:
        self._send(self._engines, [engine, steps.encode(header), *payload])

    def _send(self, sock: Any, frames: list[Any]) -> None:
        """Send without waiting: a peer that does not read is dead or about to be replaced."""
        try:
            sock.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            log.warning("%s: a message was dropped: %d wait for a peer already", self._member, MAX_WAITING_MESSAGES)


def _unlink(lane: Lane) -> None:
    if lane.link is not None:
        lane.link.close(linger=0)
        lane.link = None


def _unpack(header: steps.Activations, raw: list[bytes]) -> Activations:
    """Tensors over the received frames, without a copy."""
    return {
        name: torch.frombuffer(frame, dtype=getattr(torch, dtype)).view(shape)
        for (name, dtype, shape), frame in zip(header.tensors, raw, strict=True)
    }
