"""When a fault strikes: conditions on what a client has seen, as data.

A fault at a fixed time hits whatever happens to run then. A trigger names the situation instead, and is judged
against `Progress`, which the client that drives the load keeps. Judging is pure, so that it can be tested, and cheap,
so that it can be done at every event: the fault then strikes within the event that made it due.

A trigger that can no longer come true says so by `missed`: the run has not tested what it was for.
"""

from __future__ import annotations

import dataclasses
import enum

import msgspec


class RequestState(enum.StrEnum):
    """Where a request is, as its client sees it."""

    WAITING = "waiting"
    """Sent; no token yet."""
    DECODING = "decoding"
    ENDED = "ended"


@dataclasses.dataclass
class RequestProgress:
    """What the client has seen of one request."""

    pipeline: int | None
    state: RequestState = RequestState.WAITING
    tokens: int = 0
    others_at_start: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tokens that each other request of its pipeline had received when it was sent."""
    was_cancelled: bool = False


@dataclasses.dataclass
class Progress:
    """What the client has seen of all requests."""

    requests: dict[str, RequestProgress] = dataclasses.field(default_factory=dict)
    tokens: int = 0
    preemptions: dict[int, int] = dataclasses.field(default_factory=dict)
    """Preemptions that the server has counted for each pipeline since the start of the run."""

    def sent(self, name: str, pipeline: int | None) -> None:
        """A request has been sent."""
        others = {other: request.tokens for other, request in self.requests.items() if request.pipeline == pipeline}
        self.requests[name] = RequestProgress(pipeline, others_at_start=others)

    def received(self, name: str, tokens: int) -> None:
        """An event has arrived that carries so many tokens."""
        request = self.requests[name]
        request.tokens += tokens
        self.tokens += tokens
        if tokens:
            request.state = RequestState.DECODING

    def cancelled(self, name: str) -> None:
        """The client has closed the connection."""
        self.requests[name].was_cancelled = True

    def ended(self, name: str) -> None:
        """Nothing more will come for a request."""
        if name in self.requests:
            self.requests[name].state = RequestState.ENDED

    def tokens_on(self, pipeline: int | None) -> int:
        """Tokens received from a pipeline."""
        return sum(request.tokens for request in self.requests.values() if request.pipeline == pipeline)

    def steps_since(self, name: str) -> int:
        """Steps that its pipeline has certainly run since a request was sent: tokens of its fastest neighbour."""
        seen = self.requests[name]
        return max(
            (
                request.tokens - seen.others_at_start.get(other, 0)
                for other, request in self.requests.items()
                if other != name and request.pipeline == seen.pipeline
            ),
            default=0,
        )

    def decoding_on(self, pipeline: int) -> int:
        """Streams of a pipeline that are between their first token and their last."""
        return sum(
            request.pipeline == pipeline and request.state is RequestState.DECODING
            for request in self.requests.values()
        )


class Trigger(msgspec.Struct, frozen=True, tag=True):
    """Base of every trigger; the tag in JSON is the class name."""

    def due(self, progress: Progress) -> bool:
        """Whether the fault must strike now."""
        raise NotImplementedError

    def missed(self, progress: Progress) -> bool:
        """Whether the moment has passed without the trigger being due."""
        return False


class Idle(Trigger, frozen=True):
    """At once, before any request."""

    def due(self, progress: Progress) -> bool:
        """See `Trigger.due`."""
        return not any(request.state is not RequestState.ENDED for request in progress.requests.values())


class AfterTokens(Trigger, frozen=True):
    """When so many tokens have arrived on a pipeline and one of its streams is between two tokens."""

    pipeline: int
    count: int

    def due(self, progress: Progress) -> bool:
        """See `Trigger.due`."""
        return progress.tokens_on(self.pipeline) >= self.count and progress.decoding_on(self.pipeline) > 0


class DuringPrefill(Trigger, frozen=True):
    """When a request waits for its first token and its pipeline has run further steps for others meanwhile.

    Those steps show that the engine has had the request: with chunked prefill a long prompt is then under way.
    """

    request: str
    steps: int = 2

    def due(self, progress: Progress) -> bool:
        """See `Trigger.due`."""
        seen = progress.requests.get(self.request)
        if seen is None or seen.state is not RequestState.WAITING:
            return False
        return progress.steps_since(self.request) >= self.steps

    def missed(self, progress: Progress) -> bool:
        """See `Trigger.missed`."""
        seen = progress.requests.get(self.request)
        return seen is not None and seen.state is not RequestState.WAITING


class WhilePreempting(Trigger, frozen=True):
    """When the server has counted so many preemptions on a pipeline in this run, and it still decodes."""

    pipeline: int
    count: int = 1

    def due(self, progress: Progress) -> bool:
        """See `Trigger.due`."""
        counted = progress.preemptions.get(self.pipeline, 0)
        return counted >= self.count and progress.decoding_on(self.pipeline) > 0


class AfterCancel(Trigger, frozen=True):
    """When the client has just disconnected from a request."""

    request: str

    def due(self, progress: Progress) -> bool:
        """See `Trigger.due`."""
        seen = progress.requests.get(self.request)
        return seen is not None and seen.was_cancelled


class SeveralInFlight(Trigger, frozen=True):
    """When several streams of a pipeline decode at once: the engine then has several steps in flight."""

    pipeline: int
    streams: int = 3

    def due(self, progress: Progress) -> bool:
        """See `Trigger.due`."""
        return progress.decoding_on(self.pipeline) >= self.streams


AnyTrigger = Idle | AfterTokens | DuringPrefill | WhilePreempting | AfterCancel | SeveralInFlight
