"""The node's main loop as its heartbeats see it: at rest it may be for ever, stuck between two steps it may not."""

from __future__ import annotations

import contextlib
import errno
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq

from kevlarflow.node import main, replicator
from kevlarflow.node.lanes import Lane, Lanes, Work
from kevlarflow.node.main import NodeServer
from kevlarflow.node.pace import PaceMeter
from kevlarflow.node.progress import UNSEEN_FACTOR, Progress, Step
from kevlarflow.node.sockets import Sockets
from kevlarflow.node.work import Done
from kevlarflow.types import Epoch, Member, NodeId, PipelineId, Stage
from kevlarflow.wire.messages import NodeFailed, NodeStarting, decode
from kevlarflow.wire.steps import Execute, Flushed, Join, Place, encode
from toy_world import make_config

MEMBER = Member(NodeId("node-0-0"), 1)
FLOOR = 0.02
DEADLINE_SECONDS = 60.0


class Ended(Exception):
    """The loop is to end."""


class Loop(threading.Thread):
    """Runs the loop of a node without lanes, until it is told to end."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._config = msgspec.structs.replace(make_config(), run_folder=str(folder))
        self._made = threading.Event()
        self.server: NodeServer
        self.progress: Progress

    def run(self) -> None:
        self.progress = Progress(FLOOR)
        self.server = NodeServer(self._config, MEMBER, Stage(0), self.progress, PaceMeter())
        self._made.set()
        with contextlib.suppress(Ended):
            self.server.serve()

    def begin(self) -> None:
        self.start()
        assert self._made.wait(DEADLINE_SECONDS)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def test_a_loop_that_rests_is_not_overdue_and_one_that_is_stuck_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path)
    loop.begin()
    wait_for(lambda: loop.progress.look() == Step())
    time.sleep(2 * UNSEEN_FACTOR * FLOOR)
    assert loop.progress.look() == Step()

    released = threading.Event()

    def deadlock() -> None:
        released.wait(DEADLINE_SECONDS)
        raise Ended

    monkeypatch.setattr(loop.server, "_take_activations", deadlock)
    upstream: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
    upstream.connect(f"ipc://{Sockets.of(tmp_path, MEMBER).activations}")
    upstream.send(b"wake up")
    wait_for(lambda: loop.progress.look().is_overdue)
    assert loop.progress.look().pipeline is None
    released.set()
    loop.join(DEADLINE_SECONDS)
    upstream.close(linger=0)
    assert not loop.is_alive()


class Runner:
    batch = ()

    def use_blocks(self, table: object) -> None:
        pass

    def reset(self) -> None:
        pass


def test_a_flush_is_over_in_time_though_another_lane_is_never_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = NodeServer(
        msgspec.structs.replace(make_config(), run_folder=str(tmp_path)),
        MEMBER,
        Stage(0),
        Progress(60.0),
        PaceMeter(),
    )
    runners: list[Any] = [Runner(), Runner()]
    server._lanes = Lanes(runners, 4, is_first_stage=True)
    moving, busy = (server._lanes.open(PipelineId(each), Epoch(1)) for each in (0, 1))
    assert moving is not None
    assert busy is not None
    moving.flush_until = time.monotonic() + 0.1
    deadline = time.monotonic() + DEADLINE_SECONDS
    said: list[object] = []

    def run(lane: Lane, work: Work, _: object) -> None:
        lane.queue.append(work)
        if said or time.monotonic() > deadline:
            raise Ended

    monkeypatch.setattr(server, "_run", run)
    monkeypatch.setattr(server, "_answer", lambda _, header: said.append(header))
    server._lanes.add_work(Work(b"engine", Execute(PipelineId(1), Epoch(1), 1, has_tokens=True, writes=()), [b""]))
    with pytest.raises(Ended):
        server.serve()
    assert said == [Flushed(PipelineId(0), Epoch(1), Stage(0))]


def test_what_is_said_of_a_flush_in_an_earlier_epoch_does_not_end_the_one_of_this(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = msgspec.structs.replace(make_config(), run_folder=str(tmp_path))
    server = NodeServer(config, MEMBER, Stage(0), Progress(60.0), PaceMeter())
    runners: list[Any] = [Runner()]
    server._lanes = Lanes(runners, 4, is_first_stage=True)
    server._lanes.open(PipelineId(0), Epoch(1))
    lane = server._lanes.open(PipelineId(0), Epoch(2))
    assert lane is not None
    monkeypatch.setattr(server, "_answer", lambda *_: None)
    for epoch, awaited in ((1, 5.0), (2, None)):
        lane.flush_until = 5.0
        outcomes = [Flushed(PipelineId(0), Epoch(epoch), Stage(0))]
        monkeypatch.setattr(server, "_replicas", SimpleNamespace(outcomes=lambda said=outcomes: said))
        server._pass_on_outcomes()
        assert lane.flush_until == awaited


def test_a_lane_gets_memory_for_what_is_kept_of_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = msgspec.structs.replace(make_config(), run_folder=str(tmp_path))
    server = NodeServer(config, MEMBER, Stage(0), Progress(60.0), PaceMeter())
    runners: list[Any] = [Runner(), Runner()]
    server._lanes = Lanes(runners, 9, is_first_stage=True)
    monkeypatch.setattr(server, "_answer", lambda *_: None)
    replicas = SimpleNamespace(open=lambda lane: None, kept=lambda lane: {7} if lane.pipeline == 1 else set())
    monkeypatch.setattr(server, "_replicas", replicas)
    for pipeline, usable in ((0, {1, 2, 3, 4}), (1, {1, 2, 3, 7})):
        join = Join(PipelineId(pipeline), Epoch(1), Stage(0), next_address="")
        server._join(b"engine", join, [pickle.dumps(frozenset(usable))])
    guest = server._lanes.current(PipelineId(1))
    assert guest is not None
    assert guest.blocks.table == [0, 7, 6, 5, 0, 0, 0, 8, 0]


def test_a_node_that_cannot_empty_a_lane_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Spoilt(Runner):
        def reset(self) -> None:
            raise KeyError("request-7")

    config = msgspec.structs.replace(make_config(), run_folder=str(tmp_path))
    server = NodeServer(config, MEMBER, Stage(0), Progress(60.0), PaceMeter())
    runners: list[Any] = [Spoilt()]
    server._lanes = Lanes(runners, 4, is_first_stage=True)
    said: list[object] = []
    monkeypatch.setattr(server, "_answer", lambda _, header, *payload: said.append(header))
    engine: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    engine.connect(f"ipc://{Sockets.of(tmp_path, MEMBER).steps}")
    join = Join(PipelineId(0), Epoch(1), Stage(0), next_address="")
    engine.send_multipart([encode(join), pickle.dumps(None)])
    with pytest.raises(KeyError, match="request-7"):
        server.serve()
    engine.close(linger=0)
    assert said == [], "an engine that heard it had joined would send requests"


def test_a_node_that_cannot_do_what_it_has_said_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        raise KeyError("block 7")

    config = msgspec.structs.replace(make_config(), run_folder=str(tmp_path))
    server = NodeServer(config, MEMBER, Stage(0), Progress(60.0), PaceMeter())
    server._lanes = Lanes([Runner()], 4, is_first_stage=True)  # type: ignore[list-item]
    lane = server._lanes.open(PipelineId(0), Epoch(1))
    assert lane is not None
    workflow = SimpleNamespace(begin=lambda *_: Done(still_to_do=write), end=lambda *_: None)
    monkeypatch.setattr(server, "_workflow", workflow)
    with pytest.raises(KeyError, match="block 7"):
        server._run(lane, Work(b"engine", Place(PipelineId(0), Epoch(1)), [b""]), None)


class Device:
    """Loaded at once."""

    def load(self) -> None:
        pass

    def description(self) -> object:
        return SimpleNamespace(num_blocks=4, block_size=16)

    def runners(self) -> list[Any]:
        return [Runner()]

    def kv_blocks(self) -> object:
        return SimpleNamespace(block_bytes=64, token_bytes=4)


def test_a_node_that_gets_no_memory_for_replicas_says_why_it_cannot_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def store(*_: object) -> object:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(replicator, "StandbyStore", store)
    monkeypatch.setattr(main, "stage_device", lambda *_: Device())
    monkeypatch.setattr(NodeServer, "serve", lambda _: pytest.fail("it serves"))
    config = msgspec.structs.replace(make_config(), run_folder=str(tmp_path), standby_memory_bytes=1 << 20)
    controller: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    controller.bind(config.controller_address)
    with pytest.raises(SystemExit) as leaving:
        main.run(config, MEMBER, Stage(0), lambda _: None)
    assert leaving.value.code == 1
    heard: list[object] = []
    while not any(isinstance(each, NodeFailed) for each in heard):
        assert controller.poll(1_000 * DEADLINE_SECONDS), heard
        heard.append(decode(controller.recv_multipart()[1]))
    controller.close(linger=0)
    assert isinstance(heard[0], NodeStarting)
    assert heard[-1] == NodeFailed(MEMBER, "OSError: [Errno 12] Cannot allocate memory")
