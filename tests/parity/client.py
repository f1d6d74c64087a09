"""Replays a workload against an OpenAI server and records every event, with its time.

The recording is plain data, so that the reference can be kept on disk and damaged on purpose in tests. While it
runs, the replay keeps a `Progress` for the triggers of `kevlarflow.faults`, and tells an observer about each change.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from kevlarflow.faults import FaultDidNotHappen, Progress
from parity.workload import Request

REQUEST_TIMEOUT_SECONDS = 240.0
"""No request of a workload may take longer, failover included: longer means that it hangs."""

Observer = Callable[[Progress, float], None]
"""Is called on the event loop right after each change, with the seconds since the start; must not block."""


@dataclasses.dataclass
class Recording:
    """What one request got."""

    name: str
    status: int = 0
    """HTTP status; 0 when there was no answer."""
    retry_after: str | None = None
    events: list[Any] = dataclasses.field(default_factory=list)
    """The JSON of each event in the order of arrival; of the whole body when the request does not stream."""
    times: list[float] = dataclasses.field(default_factory=list)
    """Seconds from the start of the replay to each event."""
    sent_at: float = 0.0
    done: bool = False
    """Whether the stream ended with its end mark (for a request that does not stream: whether the body is whole)."""
    cancelled: bool = False
    """Whether this client closed the connection on purpose."""
    failure: str | None = None
    """Why the connection broke or the answer could not be read, if so."""

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring events, the first counted from the request."""
        marks = [self.sent_at, *self.times]
        return [later - earlier for earlier, later in itertools.pairwise(marks)]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for the disk."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recording:
        """The reverse of `to_json`."""
        return cls(**data)


def tokens_in(event: Any) -> int:
    """Output tokens that an event carries, over all its choices."""
    return sum(len(choice.get("token_ids") or ()) for choice in event.get("choices", ()))


class Replay:
    """One run of a workload against one server."""

    def __init__(
        self,
        base_url: str,
        requests: Sequence[Request],
        *,
        pipelines: int = 1,
        observer: Observer | None = None,
        timeout: float = REQUEST_TIMEOUT_SECONDS,
    ) -> None:
        self._base_url = base_url
        self._requests = requests
        self._pipelines = pipelines
        self._observer = observer or (lambda progress, now: None)
        self._timeout = timeout
        self.progress = Progress()
        self.over = False
        """Whether every request has ended."""
        self._changed = asyncio.Event()
        self._finished = {request.name: asyncio.Event() for request in requests}

    async def run(self) -> dict[str, Recording]:
        """Send every request at its time; return when all have ended."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(self._timeout)
        self._start = time.monotonic()
        async with httpx.AsyncClient(base_url=self._base_url, limits=limits, timeout=timeout) as client:
            recordings = await asyncio.gather(*(self._one(client, request) for request in self._requests))
        self.over = True
        self._changed.set()
        return {recording.name: recording for recording in recordings}

    async def reached(self, condition: Callable[[Progress], bool]) -> bool:
        """Wait until the progress meets a condition; False if everything ended first. For one waiter."""
        while not condition(self.progress):
            if self.over:
                return False
            self._changed.clear()
            await self._changed.wait()
        return True

    async def _one(self, client: httpx.AsyncClient, request: Request) -> Recording:
        recording = Recording(request.name)
        try:
            if request.after is not None:
                await self._finished[request.after].wait()
                await asyncio.sleep(request.at)
            else:
                await asyncio.sleep(self._start + request.at - time.monotonic())
            recording.sent_at = self.now()
            self._tell(lambda: self.progress.sent(request.name, self._pipeline(request)))
            async with asyncio.timeout(self._timeout):
                await self._exchange(client, request, recording)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            recording.failure = f"{type(error).__name__}: {error}"
        finally:
            self._finished[request.name].set()
            self._tell(lambda: self.progress.ended(request.name))
        return recording

    async def _exchange(self, client: httpx.AsyncClient, request: Request, recording: Recording) -> None:
        pipeline = self._pipeline(request)
        headers = {} if pipeline is None else {"X-data-parallel-rank": str(pipeline)}
        async with client.stream("POST", request.path, json=request.body, headers=headers) as response:
            recording.status = response.status_code
            recording.retry_after = response.headers.get("Retry-After")
            if not request.streams or response.status_code != httpx.codes.OK:
                self._record(recording, json.loads(await response.aread()))
                recording.done = True
                return
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    recording.done = True
                elif line.startswith("data: "):
                    self._record(recording, json.loads(line.removeprefix("data: ")))
                    if len(recording.events) == request.cancel_after_events:
                        recording.cancelled = True
                        break
        # The connection is closed only now: this is the moment that counts as the cancellation.
        if recording.cancelled:
            self._tell(lambda: self.progress.cancelled(request.name))

    def _record(self, recording: Recording, event: Any) -> None:
        recording.events.append(event)
        recording.times.append(self.now())
        count = tokens_in(event)
        self._tell(lambda: self.progress.received(recording.name, count))

    def _tell(self, change: Callable[[], None]) -> None:
        change()
        self._changed.set()
        self._observer(self.progress, self.now())

    def _pipeline(self, request: Request) -> int | None:
        return None if request.pipeline is None else request.pipeline % self._pipelines

    def now(self) -> float:
        """Seconds since the start of the replay."""
        return time.monotonic() - self._start


def replay(
    base_url: str,
    requests: Sequence[Request],
    *,
    pipelines: int = 1,
    observer: Observer | None = None,
    timeout: float = REQUEST_TIMEOUT_SECONDS,
    beside: Callable[[Replay], Awaitable[None]] | None = None,
) -> dict[str, Recording]:
    """Run a workload to its end, and `beside` next to it to its own, which must come soon once `over` is set."""

    async def main() -> dict[str, Recording]:
        run = Replay(base_url, requests, pipelines=pipelines, observer=observer, timeout=timeout)
        async with asyncio.TaskGroup() as group:
            recordings = group.create_task(run.run())
            if beside:
                group.create_task(beside(run))
        return recordings.result()

    try:
        return asyncio.run(main())
    except ExceptionGroup as group:
        failures = [each for each in group.exceptions if isinstance(each, FaultDidNotHappen | AssertionError)]
        # One failure is enough to tell; pytest shows it better alone.
        raise failures[0] if failures else group from None


def in_lanes(requests: Sequence[Request], lanes: int) -> list[Request]:
    """The same requests, none cancelled, in so many queues: at any time at most that many run."""
    queued: list[Request] = []
    for index, request in enumerate(requests):
        after = queued[index - lanes].name if index >= lanes else None
        queued.append(dataclasses.replace(request, at=0.0, after=after, cancel_after_events=None))
    return queued
