"""What counts as a false alarm, from journals as controllers write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from kevlarflow.bench import alarms
from kevlarflow.bench.alarms import JournalIncomplete, from_journal, from_records, read_journal, suspicions
from kevlarflow.control.journal import Journal
from kevlarflow.recovery import events
from kevlarflow.recovery.events import AnyEvent
from kevlarflow.types import Member, NodeId, PipelineId

ONE, OTHER = Member(NodeId("node-0-1"), 1), Member(NodeId("node-1-0"), 2)
NOBODY: Mapping[str, float] = {}


def write(folder: Path, *noted: tuple[float, AnyEvent | None], resumed: bool = False) -> None:
    """A journal; None for an event is a new life of the controller."""
    journal = Journal(str(folder / "journal.jsonl"))
    journal.start(1.0, resumed=resumed)
    for at, event in noted:
        if event is None:
            journal.start(at, resumed=True)
        else:
            journal.add(at, event)
    journal.close()


def told(folder: Path, victims: Mapping[str, float] = NOBODY) -> list[str]:
    return [alarm.text for alarm in from_journal(read_journal(folder), victims)]


def test_what_happens_in_peace_is_no_alarm(tmp_path: Path) -> None:
    report = events.EngineReport(PipelineId(0), 3, 0, 2, 100)
    write(tmp_path, (1.0, events.ClusterBegun()), (2.0, report), (3.0, events.Tick()))
    assert told(tmp_path) == []
    assert list(suspicions(read_journal(tmp_path), NOBODY)) == []


@pytest.mark.parametrize(
    ("event", "evidence"),
    [
        (events.NodeSilent(ONE, 6.5, "was stuck in a step"), "what was stuck in a step"),
        (events.NodeExited(ONE, 8.9), "node-0-1#1"),
        (events.NodeFailed(ONE, "no memory"), "reason no memory"),
        (events.LaunchFailed(ONE, "no memory"), "reason no memory"),
        (events.NodeSlow(ONE, 3.4, 10.0), "ratio 3.4"),
        (events.EngineLost(PipelineId(1), 4711), "pid 4711"),
        (None, "the controller was started again"),
    ],
)
def test_every_loss_and_every_verdict_is_an_alarm_with_its_evidence(
    event: AnyEvent | None, evidence: str, tmp_path: Path
) -> None:
    write(tmp_path, (9.0, event))
    (text,) = told(tmp_path)
    assert evidence in text


def test_what_is_said_of_a_victim_is_true_from_the_fault_on_and_of_no_other_member(tmp_path: Path) -> None:
    replacement = Member(ONE.node, 2)
    losses = [(at, events.NodeExited(member, at)) for at, member in ((5.0, ONE), (7.0, OTHER), (8.0, replacement))]
    write(tmp_path, *losses)
    assert len(told(tmp_path)) == 3
    assert len(told(tmp_path, {str(ONE): 4.9})) == 2
    assert len(told(tmp_path, {str(ONE): 5.1})) == 3, "it was lost before it was hurt"
    assert told(tmp_path, {str(ONE): 4.9, str(OTHER): 6.0, str(replacement): 7.9}) == []


def test_an_older_file_belongs_to_the_journal_and_one_that_is_gone_is_missed(tmp_path: Path) -> None:
    write(tmp_path, (2.0, events.EngineLost(PipelineId(0), 1)))
    (tmp_path / "journal.jsonl").rename(tmp_path / "journal.1.jsonl")
    journal = Journal(str(tmp_path / "journal.jsonl"))
    journal.add(3.0, events.EngineLost(PipelineId(0), 2))
    journal.close()
    assert [line.at for line in read_journal(tmp_path)] == [1.0, 2.0, 3.0]
    assert len(told(tmp_path)) == 2
    (tmp_path / "journal.1.jsonl").unlink()
    with pytest.raises(JournalIncomplete, match="does not begin with the start of the cluster"):
        read_journal(tmp_path)


def test_a_journal_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(JournalIncomplete):
        read_journal(tmp_path)
    write(tmp_path, resumed=True)
    with pytest.raises(JournalIncomplete):
        read_journal(tmp_path)


def test_suspicions_that_pass_are_no_alarms_and_are_told_with_their_length(tmp_path: Path) -> None:
    write(
        tmp_path,
        (5.0, events.NodeSuspected(ONE, 3.75)),
        (5.5, events.NodeCleared(ONE)),
        (6.0, events.NodeSuspected(OTHER, 5.0)),
    )
    assert told(tmp_path) == []
    passed, lasting = suspicions(read_journal(tmp_path), NOBODY)
    assert passed == alarms.Alarm(5.0, "node-0-1#1 suspect for 0.50 s, on evidence of the 1.25 s before")
    assert lasting.text.startswith("node-1-0#2 suspect to the end")
    assert [each.at for each in suspicions(read_journal(tmp_path), {str(OTHER): 5.9})] == [5.0]


def record(cause: str, origin: str, unix_time: float) -> dict[str, object]:
    return {"cause": cause, "from": origin, "to": "node-1-1", "time": unix_time, "pipeline": 0, "stage": 1}


def test_a_recovery_that_nobody_called_for_is_an_alarm() -> None:
    records = [record(cause, "node-0-1", 1_007.0) for cause in ("crash", "hang", "slow", "link", "rejoin")]
    found = list(from_records(records, NOBODY, 1_000.0))
    assert [alarm.at for alarm in found] == [7.0] * 4
    assert "crash of node-0-1" in found[0].text
    assert list(from_records(records, {"node-0-1#1": 6.0}, 1_000.0)) == []
    assert len(list(from_records(records, {"node-0-1#1": 8.0, "node-0-0#1": 6.0}, 1_000.0))) == 4
