"""The real controller process, with nodes and engines that only talk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from control_fakes import FORMING, FakeCluster, all_serve, connect, fake_cluster
from kevlarflow.config import Timeouts
from kevlarflow.control.status import ask, ask_status
from kevlarflow.errors import ClusterUnreachable
from kevlarflow.types import Cause
from kevlarflow.wire import messages
from kevlarflow.wire.messages import decode, encode

SUSPICION_SECONDS = Timeouts().suspect_after_ms / 1_000
SILENCE_SECONDS = Timeouts().confirm_after_ms / 1_000
ANSWER_SECONDS = 30.0


@pytest.fixture
def cluster(tmp_path):
    with fake_cluster(tmp_path) as cluster:
        yield cluster


def nodes_of(document: dict, pipeline: int) -> list[str]:
    return document["pipelines"][pipeline]["nodes"]


def kill(cluster: FakeCluster, node: str) -> int:
    pid = cluster.node(node)["pid"]
    os.kill(pid, signal.SIGKILL)
    return pid


def test_forms_pipelines_of_nodes_that_start_alone(cluster):
    document = cluster.start().wait_serving()
    assert [each["nodes"] for each in document["pipelines"]] == [["node-0-0", "node-0-1"], ["node-1-0", "node-1-1"]]
    assert [each["epoch"] for each in document["pipelines"]] == [1, 1]
    assert document["recoveries"] == []
    assert document["main_pid"] == os.getpid()
    assert {node["state"] for node in document["nodes"]} == {"ready"}
    assert document["engines"][0]["pid"] == cluster.engines[0].process.pid
    assert document["engines"][0]["kv_blocks"] == 100


def test_waits_for_a_launcher_that_is_still_importing(cluster):
    cluster.start_controller()
    cluster.start_engines()
    cluster.wait(lambda d: {node["state"] for node in d["nodes"]} == {"starting"}, "that nodes are awaited")
    cluster.start_launcher()
    cluster.wait_serving()


def test_a_killed_node_is_replaced_by_a_donor_and_comes_back_at_a_quiet_point(cluster):
    cluster.start().wait_serving()
    cluster.engines[0].running = 3
    killed_at = time.time()
    kill(cluster, "node-0-1")
    document = cluster.wait(lambda d: len(d["recoveries"]) == 1 and all_serve(d), "the failover")
    assert nodes_of(document, 0) == ["node-0-0", "node-1-1"]
    recovery = document["recoveries"][0]
    assert (recovery["state"], recovery["cause"], recovery["from"], recovery["to"]) == (
        "done", "crash", "node-0-1", "node-1-1",
    )  # fmt: skip
    assert (recovery["requests"], recovery["recomputed_tokens"]) == (3, 7)
    assert recovery["time"] == pytest.approx(killed_at, abs=5.0)
    # Nobody waited for it to be silent.
    assert recovery["seconds"]["detect"] < SUSPICION_SECONDS
    assert recovery["seconds"]["total"] >= FORMING.total
    busy = cluster.wait(lambda d: {n["state"] for n in d["nodes"]} == {"ready"}, "the replacement")
    assert nodes_of(busy, 0) == ["node-0-0", "node-1-1"]
    cluster.engines[0].running = 0
    document = cluster.wait(lambda d: nodes_of(d, 0) == ["node-0-0", "node-0-1"] and all_serve(d), "the rejoin")
    assert document["recoveries"][1]["cause"] == "rejoin"
    assert cluster.node("node-0-1")["incarnation"] == 2
    last = cluster.engines[0].orders[-1]
    assert isinstance(last, messages.Form)
    assert (last.cause, [info.member.node for info in last.released]) == (Cause.REJOIN, ["node-1-1"])


def test_a_stopped_node_is_killed_and_replaced(tmp_path):
    with fake_cluster(tmp_path) as cluster:
        cluster.start().wait_serving()
        pid = cluster.node("node-1-0")["pid"]
        os.kill(pid, signal.SIGSTOP)
        document = cluster.wait(lambda d: d["recoveries"] and all_serve(d), "the failover")
        assert document["recoveries"][0]["cause"] == "hang"
        detect = document["recoveries"][0]["seconds"]["detect"]
        assert 0.25 < detect < SILENCE_SECONDS, "it was to be seen that it is stopped"
        cluster.wait(lambda d: nodes_of(d, 1) == ["node-1-0", "node-1-1"], "the rejoin")
        cluster.wait(lambda _: not os.path.exists(f"/proc/{pid}"), "the end of the stopped process")


def test_a_node_that_sleeps_in_a_step_is_killed_sooner_than_one_that_is_silent(tmp_path):
    with fake_cluster(tmp_path) as cluster:
        cluster.start().wait_serving()
        pid = cluster.node("node-1-0")["pid"]
        hung_at = time.time()
        Path(cluster.config.path("hang-node-1-0#1")).touch()
        document = cluster.wait(lambda d: d["recoveries"] and all_serve(d), "the failover")
        recovery = document["recoveries"][0]
        assert (recovery["cause"], recovery["from"]) == ("hang", "node-1-0")
        assert recovery["time"] - hung_at < SILENCE_SECONDS
        cluster.wait(lambda d: nodes_of(d, 1) == ["node-1-0", "node-1-1"], "the rejoin")
        cluster.wait(lambda _: not os.path.exists(f"/proc/{pid}"), "the end of the process that hung")


def test_an_engine_that_is_stopped_is_killed(tmp_path):
    timeouts = Timeouts(settle_ms=3_500, engine_silent_after_ms=900, engine_lost_after_ms=3_600)
    with fake_cluster(tmp_path, timeouts=timeouts) as cluster:
        cluster.start().wait_serving()
        engine = cluster.engines[0]
        engine.stopping.set()
        cluster.wait(lambda d: d["engines"][0]["state"] == "dead", "that the engine is given up")
        assert engine.process.wait(30) == -signal.SIGKILL


def test_pipelines_wait_when_a_stage_is_gone_and_take_the_replacement(cluster):
    cluster.start().wait_serving()
    Path(cluster.config.path("hold-node-0-1")).touch()
    Path(cluster.config.path("hold-node-1-1")).touch()
    kill(cluster, "node-0-1")
    kill(cluster, "node-1-1")
    cluster.wait(lambda d: {p["state"] for p in d["pipelines"]} == {"waiting"}, "waiting")
    observer = connect(cluster.config)
    observer.send(encode(messages.Subscribe()))
    availability = decode(observer.recv())
    assert isinstance(availability, messages.Availability)
    assert (availability.serving, availability.started) == (False, True)
    assert "stage 1" in availability.reason
    assert availability.retry_after_seconds >= 1
    Path(cluster.config.path("hold-node-0-1")).unlink()
    document = cluster.wait_serving()
    assert nodes_of(document, 1) == ["node-1-0", "node-0-1"]
    assert observer.poll(20_000)
    assert decode(observer.recv()) == messages.Availability(True, True, "", 0)
    observer.close(linger=0)


def test_a_restarted_controller_adopts_what_serves(cluster):
    before = cluster.start().wait_serving()
    cluster.controller.kill()
    cluster.controller.wait()
    cluster.start_controller()
    after = cluster.wait_serving()
    assert [node["pid"] for node in after["nodes"]] == [node["pid"] for node in before["nodes"]]
    assert [each["epoch"] for each in after["pipelines"]] == [1, 1]
    kill(cluster, "node-0-0")
    document = cluster.wait(lambda d: d["recoveries"] and all_serve(d), "the failover")
    assert nodes_of(document, 0)[0] in ("node-1-0", "node-0-0")
    assert document["pipelines"][0]["epoch"] >= 2
    epochs = [order.epoch for order in cluster.engines[0].orders]
    assert epochs == sorted(set(epochs))


def test_a_stopped_node_does_not_outlive_the_memory_of_the_controller(tmp_path):
    with fake_cluster(tmp_path, timeouts=Timeouts(settle_ms=3_500)) as cluster:
        cluster.start().wait_serving()
        pid = cluster.node("node-1-0")["pid"]
        assert cluster.controller is not None
        cluster.controller.kill()
        cluster.controller.wait()
        os.kill(pid, signal.SIGSTOP)
        Path(cluster.config.path("controller.json")).write_text("rubbish")
        cluster.start_controller()
        cluster.wait(lambda d: nodes_of(d, 1) == ["node-1-0", "node-1-1"] and all_serve(d), "a replacement")
        assert not os.path.exists(f"/proc/{pid}")


def test_a_node_that_dies_while_the_controller_is_away_is_missed_at_once(cluster):
    cluster.start().wait_serving()
    victim = cluster.node("node-0-1")["pid"]
    cluster.engines[0].running = 2
    cluster.controller.kill()
    cluster.controller.wait()
    os.kill(victim, signal.SIGKILL)
    cluster.start_controller()
    document = cluster.wait(lambda d: d["recoveries"] and all_serve(d), "the failover", seconds=30)
    assert nodes_of(document, 0) == ["node-0-0", "node-1-1"]
    assert document["recoveries"][0]["state"] == "done"


def test_a_new_engine_attaches_to_the_living_nodes(cluster):
    before = cluster.start().wait_serving()
    cluster.engines[1].stop()
    document = cluster.wait(lambda d: d["engines"][1]["state"] == "dead", "the loss of the engine")
    assert document["pipelines"][1]["state"] == "starting"
    cluster.engines[1] = type(cluster.engines[1])(cluster.config, 1)
    cluster.engines[1].start()
    after = cluster.wait_serving()
    assert [node["pid"] for node in after["nodes"]] == [node["pid"] for node in before["nodes"]]
    form = cluster.engines[1].orders[0]
    assert isinstance(form, messages.Form)
    assert (form.cause, form.epoch) == (Cause.ATTACH, 2)


def test_a_node_that_fails_at_start_ends_the_start_with_its_reason(cluster):
    Path(cluster.config.path("fail-node-1-0")).touch()
    cluster.start_controller()
    observer = connect(cluster.config)
    observer.send(encode(messages.Subscribe()))
    cluster.start_launcher()
    cluster.start_engines()
    while observer.poll(60_000):
        message = decode(observer.recv())
        if isinstance(message, messages.Fatal):
            assert message.reason.startswith("node-1-0 failed: no weights: use another --model. Its log: ")
            break
    else:
        pytest.fail("no Fatal came")
    observer.close(linger=0)


def test_a_drained_node_leaves_and_its_place_is_filled_by_hand(cluster, tmp_path):
    cluster.start().wait_serving()
    pid = cluster.node("node-0-1")["pid"]
    assert ask(tmp_path, messages.DrainNode("node-9-9"), messages.Answered, ANSWER_SECONDS).refusal.startswith(
        "there is no node"
    )
    assert ask(tmp_path, messages.DrainNode("node-0-1"), messages.Answered, ANSWER_SECONDS).refusal == ""

    def has_left(document):
        (node,) = (each for each in document["nodes"] if each["id"] == "node-0-1")
        return node["state"] == "dead" and not os.path.exists(f"/proc/{pid}") and all_serve(document)

    cluster.wait(has_left, "the departure")
    assert cluster.node("node-0-1")["incarnation"] == 1
    assert nodes_of(cluster.status(), 0) == ["node-0-0", "node-1-1"]
    # Whoever has the place must prove to be a living process; this one never becomes a node.
    hand = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        answer = ask(tmp_path, messages.JoinNode("node-0-1", hand.pid), messages.Answered, ANSWER_SECONDS)
        assert (answer.refusal, answer.member.incarnation, answer.stage) == ("", 2, 1)
        assert cluster.node("node-0-1")["state"] == "starting"
        taken = ask(tmp_path, messages.JoinNode("node-0-1", os.getpid()), messages.Answered, ANSWER_SECONDS)
        assert "is taken by node-0-1#2" in taken.refusal
    finally:
        hand.kill()
        hand.wait()
    cluster.wait(lambda _: cluster.node("node-0-1")["state"] == "dead", "its loss")
    # What was emptied by hand is filled by hand.
    again = ask(tmp_path, messages.JoinNode("node-0-1", hand.pid), messages.Answered, ANSWER_SECONDS)
    assert (again.refusal, again.member.incarnation) == ("", 3)
    assert nodes_of(cluster.status(), 0) == ["node-0-0", "node-1-1"]


def test_asked_to_end_it_leaves_with_0_and_the_next_finds_all_nodes(cluster):
    before = cluster.start().wait_serving()
    cluster.controller.send_signal(signal.SIGTERM)
    assert cluster.controller.wait(30) == 0
    cluster.start_controller()
    after = cluster.wait_serving()
    assert [each["pid"] for each in after["nodes"]] == [each["pid"] for each in before["nodes"]]


def test_rubbish_is_dropped_and_counted(cluster):
    cluster.start().wait_serving()
    observer = connect(cluster.config)
    observer.send(b"\xc1rubbish")
    observer.send_multipart([b"two", b"frames"])
    observer.send(encode(messages.Started(1)))
    observer.send(encode(messages.AskMetrics()))
    answer = decode(observer.recv())
    assert isinstance(answer, messages.Metrics)
    text = answer.exposition.decode()
    assert "kevlarflow_control_dropped_messages 3.0" in text
    assert 'kevlarflow_nodes{state="ready"} 4.0' in text
    observer.close(linger=0)


def test_a_subscriber_hears_what_happens(cluster):
    cluster.start().wait_serving()
    observer = connect(cluster.config)
    observer.send(encode(messages.Subscribe(narration=True)))
    decode(observer.recv())
    cluster.engines[0].running = 1
    pid = kill(cluster, "node-0-1")
    lines = []
    while len(lines) < 2 and observer.poll(60_000):
        message = decode(observer.recv())
        if isinstance(message, messages.Narration):
            lines.append(message.text)
    assert lines[0] == f"node-0-1 died (pid {pid}: SIGKILL): pipeline 0 borrows node-1-1"
    assert lines[1].startswith("pipeline 0 recovered in ")
    assert lines[1].endswith("ms: 1 request, 7 tokens recomputed")
    observer.close(linger=0)


def test_the_journal_holds_the_events(cluster):
    cluster.start().wait_serving()
    lines = [json.loads(line) for line in Path(cluster.config.path("journal.jsonl")).read_text().splitlines()]
    assert "start" in lines[0]
    assert {line["event"]["type"] for line in lines[1:]} >= {"ClusterBegun", "NodeReady", "EngineAttached", "Formed"}
    assert len(lines) < 200


def test_a_run_folder_that_cannot_be_looked_into_is_named(tmp_path):
    with pytest.raises(ClusterUnreachable, match=r"x cannot be entered \(File name too long\): ask as the user who"):
        ask_status(tmp_path / ("x" * 300))


def test_status_says_when_nothing_answers(tmp_path):
    with pytest.raises(ClusterUnreachable, match=r"nothing answers on port .*: is `kevlarflow serve` running"):
        ask_status(tmp_path)
    silent = zmq.Context.instance().socket(zmq.ROUTER)
    silent.bind(f"ipc://{tmp_path}/controller.sock")
    before = time.monotonic()
    with pytest.raises(ClusterUnreachable):
        ask_status(tmp_path, timeout_seconds=1.5)
    assert time.monotonic() - before >= 1.5
    silent.close(linger=0)
