"""What a spectator of the demo is shown, as data: four stories, the nodes, and what has happened so far.

The demo changes the scene; a screen (`kevlarflow.bench.screen`) shows it. Nothing here draws.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from kevlarflow.bench.measure import Pause, pause_after
from kevlarflow.bench.streams import Stream


class Tone(enum.StrEnum):
    """How a line is meant."""

    PLAIN = "plain"
    GOOD = "good"
    BAD = "bad"
    CLUSTER = "cluster"
    """Said by the cluster itself."""


@dataclasses.dataclass(frozen=True)
class Line:
    """Something that has happened."""

    mark: str
    """When: seconds since the start, or since the kill."""
    text: str
    tone: Tone


@dataclasses.dataclass
class Story:
    """One stream, as a spectator sees it."""

    title: str
    pipeline: int
    stream: Stream | None = None
    reference: Stream | None = None
    """The same request without a failure."""

    def pause(self, fault_at: float | None) -> Pause | None:
        """What the fault has done to it so far."""
        if self.stream is None or fault_at is None:
            return None
        return pause_after(self.stream, fault_at)

    def waits_since_fault(self, fault_at: float | None) -> bool:
        """Whether no token has come since the fault, and some should."""
        if self.stream is None or fault_at is None or self.stream.done or self.stream.failure:
            return False
        return not self.stream.times or self.stream.times[-1] <= fault_at

    def split(self, fault_at: float | None) -> tuple[str, str]:
        """The text before the pause and after it."""
        if self.stream is None:
            return "", ""
        pause = self.pause(fault_at)
        if pause is None:
            return self.stream.text, ""
        assert fault_at is not None
        resumed_at = fault_at + pause.resumed_seconds
        before = sum(time < resumed_at for time in self.stream.times)
        return "".join(self.stream.pieces[:before]), "".join(self.stream.pieces[before:])

    @property
    def is_identical(self) -> bool:
        """Whether its text is that of the run without a failure."""
        return self.stream is not None and self.reference is not None and self.stream.text == self.reference.text


@dataclasses.dataclass(frozen=True)
class Seat:
    """A place in the grid: which node serves a stage of a pipeline, and how its own node is."""

    own: str
    own_state: str
    own_incarnation: int
    serving: str | None

    @property
    def is_borrowed(self) -> bool:
        """Whether another pipeline's node helps out."""
        return self.serving is not None and self.serving != self.own

    @property
    def is_lost(self) -> bool:
        """Whether its own node is dead, or in a new life that is not yet ready."""
        return self.own_state == "dead" or (self.own_state == "starting" and self.own_incarnation > 1)


@dataclasses.dataclass
class Scene:
    """Everything that is shown."""

    stories: list[Story]
    act: str = ""
    """What is going on, in a few words."""
    status: dict[str, Any] | None = None
    lines: list[Line] = dataclasses.field(default_factory=list)
    fault_at: float | None = None
    """`time.monotonic()` of the kill."""
    fault_pipeline: int | None = None

    def seats(self) -> list[list[Seat]]:
        """The grid: a row for each pipeline, a seat for each stage."""
        if self.status is None:
            return []
        nodes = {node["id"]: node for node in self.status["nodes"]}
        return [
            [_seat(nodes, f"node-{pipeline['id']}-{stage}", serving) for stage, serving in enumerate(pipeline["nodes"])]
            for pipeline in self.status["pipelines"]
        ]

    def helps(self, node: str) -> list[int]:
        """The pipelines that a node serves besides its own."""
        pipelines = enumerate(self.seats())
        return [number for number, seats in pipelines for seat in seats if seat.is_borrowed and seat.serving == node]

    def pipeline_state(self, pipeline: int) -> str:
        """The state of a pipeline, as `status` has it."""
        states = {each["id"]: str(each["state"]) for each in (self.status or {"pipelines": []})["pipelines"]}
        return states.get(pipeline, "")

    @property
    def affected(self) -> list[Story]:
        """The stories that are told by the pipeline whose node was killed."""
        return [story for story in self.stories if story.pipeline == self.fault_pipeline]


def _seat(nodes: dict[str, dict[str, Any]], own: str, serving: str | None) -> Seat:
    node = nodes.get(own)
    if node is None:
        return Seat(own, "dead", 0, serving)
    return Seat(own, node["state"], node["incarnation"], serving)
