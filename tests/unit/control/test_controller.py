"""The controller's shell without sockets and processes: messages in, messages out."""

from __future__ import annotations

import os
from unittest.mock import Mock, call

import msgspec
import pytest

from kevlarflow.control.controller import Controller
from kevlarflow.control.journal import FIRST_LOOK_SECONDS
from kevlarflow.control.observers import MAX_SUBSCRIBERS
from kevlarflow.control.watcher import Death
from kevlarflow.types import (
    Computing,
    Epoch,
    Loss,
    Member,
    NodeId,
    NodeInfo,
    NodeState,
    Pace,
    Phases,
    PipelineId,
    Stage,
)
from kevlarflow.wire import messages
from kevlarflow.wire.channel import MemoryHub, MemoryPeer
from kevlarflow.wire.flight_record import FlightRecorder
from kevlarflow.wire.messages import AnyMessage, decode, encode
from toy_world import make_config

ADVICE = "serving goes on, logs and journal do not; make room there"


class Shell:
    """A controller of nodes and engines that are all this process; one of each unless more are asked for."""

    def __init__(self, folder, pipelines: int = 1, vllm_args: tuple[str, ...] = ()) -> None:
        config = make_config(stages=1, pipelines=pipelines)
        self.hub = MemoryHub()
        self.config = msgspec.structs.replace(config, run_folder=str(folder), vllm_args=vllm_args)
        self.now = 100.0
        self.controller = Controller(self.config, self.hub, main_pid=1, clock=lambda: self.now)
        self.controller.start()

    def say(self, peer: MemoryPeer, *said: AnyMessage) -> list[AnyMessage]:
        for message in said:
            peer.send(encode(message))
        self.turn()
        return heard(peer)

    def turn(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.controller.turn()

    def ready(self, pipeline: int = 0, lanes: int = 1) -> messages.NodeReady:
        pid = os.getpid()
        member = Member(NodeId(f"node-{pipeline}-0"), 1)
        return messages.NodeReady(
            NodeInfo(member, Stage(0), "here", pid, (pid,), "steps", "activations", lanes, 50), {}
        )

    def serve(self, pipeline: int = 0, lanes: int = 1) -> tuple[MemoryPeer, MemoryPeer]:
        node, engine = self.hub.connect(), self.hub.connect()
        self.say(node, self.ready(pipeline, lanes))
        (form,) = self.say(engine, messages.EngineAttached(PipelineId(pipeline), os.getpid(), Epoch(0), ()))
        assert isinstance(form, messages.Form)
        self.say(engine, messages.Formed(PipelineId(pipeline), form.epoch, Phases(), 0, 0, 0))
        self.say(engine, messages.EngineReady(PipelineId(pipeline), 50))
        return node, engine


def heard(peer: MemoryPeer) -> list[AnyMessage]:
    return [decode(frame) for frame in iter(peer.receive, None)]


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def test_strangers_are_asked_who_they_are_but_not_all_the_time(shell):
    node, engine = shell.hub.connect(), shell.hub.connect()
    beat = messages.Heartbeat(Member(NodeId("node-0-0"), 1), 0.0)
    report = messages.EngineReport(PipelineId(0), 0, 0, 50, 0)
    assert shell.say(node, beat, beat) == [messages.Introduce()]
    assert shell.say(engine, report) == [messages.Introduce()]
    assert shell.say(node, beat) == []
    shell.turn(1.0)
    assert shell.say(node, beat) == [messages.Introduce()]


def test_a_subscriber_hears_of_changes_once(shell):
    observer = shell.hub.connect()
    (availability,) = shell.say(observer, messages.Subscribe())
    assert availability == messages.Availability(False, False, "pipeline 0 is starting", 10)
    shell.serve()
    assert heard(observer) == [messages.Availability(True, True, "", 0)]
    shell.turn(1.0)
    assert heard(observer) == []
    assert shell.say(observer, messages.Subscribe()) == [messages.Availability(True, True, "", 0)]


def test_a_journal_that_is_handed_on_gives_no_key_away(tmp_path):
    shell = Shell(tmp_path, vllm_args=("--api-key", "sk-first", "sk-second", "--hf-token=hf-x", "--dtype", "float32"))
    shell.serve()
    journal = (tmp_path / "journal.jsonl").read_text()
    assert "float32" in journal
    assert not [key for key in ("sk-first", "sk-second", "hf-x") if key in journal]
    assert "sk-first" in shell.config.vllm_args


def test_those_who_watch_are_told_of_a_full_disk_and_so_is_who_asks(tmp_path):
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    shell = Shell(tmp_path)
    observer = shell.hub.connect()
    shell.say(observer, messages.Subscribe(narration=True))
    shell.serve()
    shell.turn(FIRST_LOOK_SECONDS)
    told = [message.text for message in heard(observer) if isinstance(message, messages.Narration)]
    reason = f"{tmp_path} cannot be written (No space left on device)"
    assert [text for text in told if text.startswith(reason)] == [f"{reason}: {ADVICE}"]
    (status,) = shell.say(observer, messages.AskStatus())
    records = msgspec.json.decode(status.document)["records"]
    assert records["problem"] == f"{reason}: {ADVICE}"
    assert records["lost"] > 0


def test_a_subscriber_that_is_gone_is_forgotten(shell):
    observer = shell.hub.connect()
    shell.say(observer, messages.Subscribe())
    observer.close()
    shell.serve()
    assert shell.controller.observers._subscribers == {}


def test_the_number_of_subscribers_is_bounded(shell):
    for _ in range(MAX_SUBSCRIBERS + 5):
        shell.say(shell.hub.connect(), messages.Subscribe())
    assert len(shell.controller.observers._subscribers) == MAX_SUBSCRIBERS


def test_a_node_that_says_that_its_steps_take_long_is_emptied(tmp_path):
    shell = Shell(tmp_path, pipelines=2)
    peers = [shell.serve(pipeline, lanes=2) for pipeline in (0, 1)]
    # They are this very process: nobody must come to the point where it is killed.
    shell.controller.watcher.kill = lambda *_: None
    for _ in range(20):
        shell.turn(1.0)
        for pipeline, (node, engine) in enumerate(peers):
            pace = (Pace(2, 8, 10, 1.0 if pipeline else 0.2),)
            member = Member(NodeId(f"node-{pipeline}-0"), 1)
            shell.say(node, messages.Heartbeat(member, 0.0, pace=pace), messages.Heartbeat(member, 0.0))
            shell.say(engine, messages.EngineReport(PipelineId(pipeline), 2, 0, 50, 1))
    assert [slot.state for slot in shell.controller.cluster.slots.values()] == ["ready", "draining"]


def test_silence_is_judged_after_what_waits_was_read(shell):
    node, _ = shell.serve()
    beat = messages.Heartbeat(Member(NodeId("node-0-0"), 1), 0.0)
    for _ in range(40):
        shell.turn(0.1)
        shell.say(node, beat)
    assert shell.controller.cluster.slots[NodeId("node-0-0")].state == "ready"
    shell.controller.watcher.starved_seconds = lambda key: 0.0
    for _ in range(15):
        shell.turn(0.1)
    assert shell.controller.cluster.slots[NodeId("node-0-0")].state == "suspect"
    shell.say(node, beat)
    assert shell.controller.cluster.slots[NodeId("node-0-0")].state == "ready"


def test_a_node_whose_introduction_over_a_new_connection_is_late_lives(shell):
    shell.serve()
    shell.controller.watcher.starved_seconds = lambda key: 0.0
    shell.controller.watcher.kill = lambda key, pids: None
    again = shell.hub.connect()
    member = Member(NodeId("node-0-0"), 1)
    for number in range(1, 41):
        shell.turn(0.1)
        shell.say(again, messages.Heartbeat(member, 0.0, number=number))
    assert shell.controller.cluster.slots[NodeId("node-0-0")].fenced_by is None


def test_a_suspect_that_comes_back_over_another_connection_is_none_any_more(shell):
    shell.serve()
    shell.controller.watcher.starved_seconds = lambda key: 0.0
    for _ in range(15):
        shell.turn(0.1)
    slot = shell.controller.cluster.slots[NodeId("node-0-0")]
    assert slot.state == "suspect"
    again = shell.hub.connect()
    shell.say(again, messages.Heartbeat(slot.member, 0.0, number=16), shell.ready())
    shell.say(again, messages.Heartbeat(slot.member, 0.0, number=17))
    assert slot.state == "ready"


def test_one_that_never_says_who_it_is_does_not_hear_us(shell):
    shell.serve()
    shell.controller.watcher.starved_seconds = lambda key: 0.0
    shell.controller.watcher.kill = lambda key, pids: None
    again = shell.hub.connect()
    member = Member(NodeId("node-0-0"), 1)
    for number in range(1, 61):
        shell.turn(0.1)
        shell.say(again, messages.Heartbeat(member, 0.0, number=number))
    assert shell.controller.cluster.slots[NodeId("node-0-0")].fenced_by is not None


def test_beats_are_answered_and_a_step_that_hangs_is_fenced(shell):
    node, _ = shell.serve()
    killed = []
    # The node is this very process.
    shell.controller.watcher.kill = lambda key, pids: killed.append(key)
    member = Member(NodeId("node-0-0"), 1)
    for number in range(1, 6):
        shell.turn(0.1)
        beat = messages.Heartbeat(member, 0.9, PipelineId(0), step_overdue=True, number=number, heard=number - 1)
        assert shell.say(node, beat) == [messages.BeatHeard(number)]
    assert killed == [member]
    said = [entry for entry in shell.controller.cluster.story.tell("node-0-0").splitlines() if "fenced" in entry]
    assert len(said) == 1


def test_a_node_that_is_ready_is_watched_though_it_is_said_to_start_once_more(shell):
    node, _ = shell.serve()
    shell.controller.watcher.starved_seconds = lambda key: 0.0
    # It comes late, over a connection that has broken.
    shell.say(node, messages.NodeStarting(Member(NodeId("node-0-0"), 1), Stage(0), "here", (os.getpid(),)))
    for _ in range(15):
        shell.turn(0.1)
    assert shell.controller.cluster.slots[NodeId("node-0-0")].state == "suspect"


def test_a_loss_is_never_dated_before_it_happened(shell, monkeypatch):
    shell.serve()
    member = Member(NodeId("node-0-0"), 1)

    def die_while_it_is_looked_at(now: float) -> list[Death]:
        shell.now += 0.5
        return [Death(member, os.getpid(), alive_at=now)]

    monkeypatch.setattr(shell.controller.watcher, "check", die_while_it_is_looked_at)
    shell.turn()
    (recovery,) = shell.controller.cluster.recoveries
    assert recovery.time == pytest.approx(shell.now + shell.controller.cluster.unix_offset, rel=0, abs=1e-3)


def test_what_a_node_was_computing_is_read_when_it_is_dead(shell, tmp_path, monkeypatch):
    _, engine = shell.serve()
    member = Member(NodeId("node-0-0"), 1)
    monkeypatch.setattr(shell.controller.watcher, "check", lambda now: [Death(member, os.getpid(), now)])
    with FlightRecorder(tmp_path, member).computing(PipelineId(0), Epoch(1), 77):
        shell.turn()
    (order,) = [each for each in heard(engine) if isinstance(each, messages.Suspend)]
    assert order.losses == (Loss(member, Computing(PipelineId(0), Epoch(1), 77)),)


def test_a_wall_clock_that_is_set_is_followed(shell, monkeypatch):
    monkeypatch.setattr("kevlarflow.control.controller.unix_offset", lambda: 12_345.0)
    shell.turn(1.0)
    assert shell.controller.cluster.unix_offset == 12_345.0


def test_a_second_life_does_not_say_no_before_it_knows(shell):
    node, engine = shell.serve()
    second = Shell.__new__(Shell)
    second.config, second.hub, second.now = shell.config, shell.hub, shell.now + 1
    second.controller = Controller(shell.config, shell.hub, main_pid=1, clock=lambda: second.now)
    second.controller.start()
    observer = shell.hub.connect()
    assert second.say(observer, messages.Subscribe()) == []
    second.say(node, shell.ready())
    second.say(engine, messages.EngineAttached(PipelineId(0), os.getpid(), Epoch(1), (Member(NodeId("node-0-0"), 1),)))
    assert heard(observer) == [messages.Availability(True, True, "", 0)]
    assert heard(engine) == []


def test_a_second_life_says_no_when_nobody_appears(shell):
    shell.serve()
    second = Shell.__new__(Shell)
    second.config, second.hub, second.now = shell.config, shell.hub, shell.now + 1
    second.controller = Controller(shell.config, shell.hub, main_pid=1, clock=lambda: second.now)
    second.controller.start()
    observer = shell.hub.connect()
    assert second.say(observer, messages.Subscribe()) == []
    # The node is this very process: it must not come to the point where it is fenced.
    second.controller.watcher.kill = lambda *_: None
    for _ in range(shell.config.timeouts.settle_ms // 1_000 + 1):
        second.turn(1.0)
    (availability,) = heard(observer)
    assert availability.serving is False
    assert availability.started is True


def test_a_second_life_that_stands_still_gives_up_nobody(shell):
    node, _ = shell.serve()
    second = Shell.__new__(Shell)
    second.hub, second.config, second.now = shell.hub, shell.config, shell.now
    second.controller = Controller(shell.config, shell.hub, main_pid=1, clock=lambda: second.now)
    second.controller.start()
    kill = second.controller.watcher.kill = Mock()
    heard(node)
    beat = messages.Heartbeat(Member(NodeId("node-0-0"), 1), 0.0)
    second.turn(0.1)
    node.send(encode(beat))
    second.turn(60.0)
    assert heard(node) == [messages.Introduce()]
    second.say(node, shell.ready())
    second.turn(0.1)
    assert second.controller.cluster.slots[NodeId("node-0-0")].state is NodeState.READY
    kill.assert_not_called()


def test_a_number_is_written_down_before_it_is_given_out(shell, monkeypatch):
    given, written = [], []
    send = shell.hub.send

    def look_first(peer: bytes, frame: bytes) -> bool:
        message = decode(frame)
        if isinstance(message, messages.Form):
            given.append(message.epoch)
            written.append(shell.controller.records.memory.recall().snapshot.epochs[0])
        return send(peer, frame)

    monkeypatch.setattr(shell.hub, "send", look_first)
    shell.serve()
    assert given
    assert written == given


NODE = Member(NodeId("node-0-0"), 1)


def second_life(shell):
    """Another controller for the same cluster; the node is this very process, so nothing is killed in earnest."""
    second = Shell.__new__(Shell)
    second.hub, second.config, second.now = shell.hub, shell.config, shell.now
    second.controller = Controller(shell.config, shell.hub, main_pid=1, clock=lambda: second.now)
    second.controller.start()
    second.controller.watcher.kill = Mock()
    return second


def test_a_second_life_does_not_miss_a_node_that_gets_no_cpu(shell):
    node, _ = shell.serve()
    second = second_life(shell)
    # What its threads have waited for one grows as fast as the clock.
    second.controller.watcher.starved_seconds = lambda _: second.now
    for _ in range(60):
        second.turn(0.1)
    second.controller.watcher.kill.assert_not_called()
    second.say(node, shell.ready())
    assert second.controller.cluster.slots[NodeId("node-0-0")].state is NodeState.READY


def test_a_second_life_misses_a_node_that_is_silent(shell):
    shell.serve()
    second = second_life(shell)
    second.controller.watcher.starved_seconds = lambda _: 0.0
    for _ in range(29):
        second.turn(0.1)
    second.controller.watcher.kill.assert_not_called()
    for _ in range(3):
        second.turn(0.1)
    second.controller.watcher.kill.assert_any_call(NODE, (os.getpid(),))


def test_a_second_life_misses_a_node_that_beats_and_does_not_say_who_it_is(shell):
    shell.serve()
    second = second_life(shell)
    node = shell.hub.connect()
    for _ in range(99):
        node.send(encode(messages.Heartbeat(NODE, 0.0)))
        second.turn(0.1)
    assert call(NODE, (os.getpid(),)) not in second.controller.watcher.kill.call_args_list
    for _ in range(2):
        node.send(encode(messages.Heartbeat(NODE, 0.0)))
        second.turn(0.1)
    second.controller.watcher.kill.assert_any_call(NODE, (os.getpid(),))
