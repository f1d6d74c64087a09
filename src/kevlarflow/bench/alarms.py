"""False alarms: what a cluster holds against its processes, less what was really done to them.

Pure functions of the controller's journal and of the records in its status. A *victim* is a member that was hurt on
purpose; whatever is said of it from then on is true. All times are `time.monotonic()`, as in the journal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from kevlarflow.bench.watch import CLOCK_SLACK_SECONDS, LOST
from kevlarflow.errors import KevlarFlowError
from kevlarflow.recovery import events
from kevlarflow.sim.replay import Line
from kevlarflow.sim.words import words
from kevlarflow.types import Cause

JOURNAL = ("journal.1.jsonl", "journal.jsonl")
ALARMING = (
    events.NodeSilent, events.NodeExited, events.NodeFailed, events.LaunchFailed, events.NodeSlow, events.MemberFailed,
    events.EngineLost,
)  # fmt: skip
UNPLANNED = {*LOST, str(Cause.SLOW), str(Cause.LINK)}
"""Causes of recoveries that begin with a verdict of the cluster's own."""

Victims = Mapping[str, float]
"""Members that were hurt on purpose, as "node-0-1#2", and when."""


class Alarm(NamedTuple):
    """Something that the cluster held against a process."""

    at: float
    text: str
    """What, with the evidence."""


class JournalIncomplete(KevlarFlowError):
    """The journal does not tell the whole life of the cluster, so nothing follows from what is not in it."""


def read_journal(run_folder: Path) -> list[Line]:
    """All that a cluster has noted since its start. Raises `JournalIncomplete` when some of it is gone."""
    decoder = msgspec.json.Decoder(Line)
    paths = [run_folder / name for name in JOURNAL]
    try:
        texts = [path.read_bytes() for path in paths if path.exists()]
        lines = [decoder.decode(line) for text in texts for line in text.splitlines()]
    except (OSError, msgspec.MsgspecError) as error:
        raise JournalIncomplete(f"the journal in {run_folder} cannot be read: {error}") from error
    if not lines or lines[0].start is None or lines[0].start.get("resumed"):
        raise JournalIncomplete(f"the journal in {run_folder} does not begin with the start of the cluster")
    return lines


def from_journal(lines: Sequence[Line], victims: Victims) -> Iterator[Alarm]:
    """Losses of nodes, engines and the controller, complaints, and verdicts on silent and slow nodes."""
    for line in lines[1:]:
        if line.start is not None:
            yield Alarm(line.at, "the controller was started again")
        elif isinstance(line.event, ALARMING) and not _is_about(line, victims):
            yield Alarm(line.at, words(line.event))


def from_records(recoveries: Iterable[dict[str, Any]], victims: Victims, unix_offset: float) -> Iterator[Alarm]:
    """Recoveries that no victim called for. `unix_offset` is Unix seconds minus monotonic seconds."""
    for record in recoveries:
        at = float(record["time"]) - unix_offset
        hurt = [since for member, since in victims.items() if member.partition("#")[0] == record["from"]]
        if record["cause"] in UNPLANNED and not any(at >= since - CLOCK_SLACK_SECONDS for since in hurt):
            place = f"pipeline {record['pipeline']}, stage {record['stage']}"
            yield Alarm(at, f"recovery: {record['cause']} of {record['from']} ({place}, to {record['to']})")


def suspicions(lines: Sequence[Line], victims: Victims) -> Iterator[Alarm]:
    """Members that were suspect, which costs them nothing, and for how long. A verdict that follows is an alarm too."""
    open_since: dict[str, Line] = {}
    for line in lines:
        if isinstance(line.event, events.NodeSuspected) and not _is_about(line, victims):
            open_since[str(line.event.member)] = line
        elif isinstance(line.event, events.NodeCleared | events.NodeSilent | events.NodeExited):
            begun = open_since.pop(str(line.event.member), None)
            if begun is not None:
                yield _suspicion(begun, f"suspect for {line.at - begun.at:.2f} s")
    for begun in open_since.values():
        yield _suspicion(begun, "suspect to the end")


def _suspicion(begun: Line, how_long: str) -> Alarm:
    assert isinstance(begun.event, events.NodeSuspected)
    evidence = begun.at - begun.event.beat_at
    return Alarm(begun.at, f"{begun.event.member} {how_long}, on evidence of the {evidence:.2f} s before")


def _is_about(line: Line, victims: Victims) -> bool:
    """Whether an event is about a member that had been hurt by then."""
    member = str(getattr(line.event, "member", ""))
    return member in victims and line.at >= victims[member]
