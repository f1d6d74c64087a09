"""The demo: four stories are told twice, and the second time a node is killed in mid-sentence.

The first telling is the reference. In the second, SIGKILL hits the node that serves the last stage of pipeline 0,
which tells two of the stories. What counts in the end is what the client has seen: every stream whole, every text
identical, and how long the last of the affected streams stood still. A kill that did not happen, or a recovery that
the cluster has not recorded, makes the whole thing void.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from rich.console import Console

from kevlarflow.bench.experiment import POLL_SECONDS, until
from kevlarflow.bench.measure import gaps
from kevlarflow.bench.recipes import Recipe
from kevlarflow.bench.scene import Line, Scene, Story, Tone
from kevlarflow.bench.screen import announce
from kevlarflow.bench.streams import Request, Stream, chat, send
from kevlarflow.bench.systems import START_TIMEOUT_SECONDS, ServerProcess, SystemFailed, is_healthy
from kevlarflow.bench.watch import Watcher, is_settled, recovery_after
from kevlarflow.control.process import last_words
from kevlarflow.errors import KevlarFlowError
from kevlarflow.faults import KillServing, strike, verify

RECIPE = Recipe(eager=True, dtype="float32", max_model_len=2048, kv_cache_memory_bytes=128 * 2**20)
"""float32, so that two texts can be compared letter by letter."""
STORIES = (
    ("The lighthouse", "Tell me a short story about a lighthouse keeper who finds a message in a bottle."),
    ("The robot", "Tell me a short story about a robot that learns to paint the sea."),
    ("The baker", "Tell me a short story about a baker whose bread makes everybody tell the truth."),
    ("The garden", "Tell me a short story about a girl who plants a garden on the moon."),
)
STORY_TOKENS = 160
KILL_AFTER_TOKENS = 40
FAULT = KillServing(pipeline=0, stage=1)
FRAME_SECONDS = 0.05
PATIENCE_SECONDS = 60.0
"""How long nothing at all may come of what the demo waits for: no token of a stream, no status, no record of the
recovery. A busy machine may take any time for the whole."""
REJOIN_TIMEOUT_SECONDS = 20.0
"""How long the demo stays for the replacement, which it is not about."""


class DemoFailed(KevlarFlowError):
    """The demo did not show what it is there to show."""


class Outcome(NamedTuple):
    """What the demo has shown."""

    recovered_seconds: float
    """From SIGKILL to the token with which the last affected stream went on."""
    complete: int
    total: int
    is_identical: bool

    @property
    def is_success(self) -> bool:
        """Whether every stream is whole and every text identical."""
        return self.complete == self.total and self.is_identical

    def __str__(self) -> str:
        return (
            f"RECOVERED in {self.recovered_seconds * 1e3:.0f} ms, {self.complete} of {self.total} streams complete, "
            f"text identical: {'yes' if self.is_identical else 'no'}"
        )


def opening_scene() -> Scene:
    """The scene before anything has happened; stories take turns on the pipelines."""
    return Scene([Story(title, index % RECIPE.pipelines) for index, (title, _) in enumerate(STORIES)])


class Demo:
    """One performance on a server that the caller has started, and will stop."""

    def __init__(self, console: Console, scene: Scene, server: ServerProcess, watcher: Watcher) -> None:
        self._console = console
        self._scene = scene
        self._server = server
        self._watcher = watcher
        self._begun_at = time.monotonic()
        self._fault_unix_time = 0.0
        self._news_shown = 0

    async def perform(self) -> Outcome:
        """The whole play; raises `DemoFailed`, or another of our errors, when it cannot go on."""
        async with self._following():
            self._act("1 of 4: four nodes start, each alone with the weights of its stage")
            await self._until_ready()
            self._act("2 of 4: four stories without a failure, for comparison")
            await self._tell_without_failure()
            self._act("3 of 4: the same stories again, and a node is killed in mid-sentence")
            await self._tell_with_failure()
            record = await self._recovery()
            self._act("4 of 4: all streams have ended; the dead node has a replacement, or gets one now")
            await self._replacement()
            self._act("done")
        return self._judge(record)

    # ---- acts

    async def _until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not await asyncio.to_thread(is_healthy, self._server.address):
            self._server.require_alive()
            if time.monotonic() > deadline:
                words = last_words(self._server.log)
                raise DemoFailed(
                    f"the cluster was not ready after {START_TIMEOUT_SECONDS:.0f} s, and said last: {words}"
                )
            await asyncio.sleep(POLL_SECONDS)
        self._say("ready", Tone.GOOD)

    async def _tell_without_failure(self) -> None:
        streams = await self._tell()
        for stream in streams:
            defect = stream.defect()
            if defect is not None:
                raise DemoFailed(f"a stream failed before any node was killed: {defect}")
            if stream.tokens <= KILL_AFTER_TOKENS:
                raise DemoFailed(f"{stream.name} is only {stream.tokens} tokens long: too short to kill a node in it")
        for story, stream in zip(self._scene.stories, streams, strict=True):
            story.stream, story.reference = None, stream
        usual = sorted(gap for stream in streams for gap in gaps(stream))
        tokens = sum(stream.tokens for stream in streams)
        self._say(f"{len(streams)} streams, {tokens} tokens, one every {usual[len(usual) // 2] * 1e3:.0f} ms a stream")

    async def _tell_with_failure(self) -> None:
        telling = asyncio.create_task(self._tell())
        try:
            await self._kill(telling)
            for stream in await telling:
                defect = stream.defect()
                if defect is not None:
                    self._say(f"a stream has failed: {defect}", Tone.BAD)
        finally:
            telling.cancel()

    async def _tell(self) -> list[Stream]:
        """Stream all stories at once."""
        for story in self._scene.stories:
            story.stream = None
        return list(await asyncio.gather(*map(self._one, self._scene.stories, STORIES)))

    async def _one(self, story: Story, told: tuple[str, str]) -> Stream:
        request: Request = chat(told[0], told[1], STORY_TOKENS, story.pipeline)

        def show(stream: Stream) -> None:
            story.stream = stream

        stream = await send(self._server.address, self._server.model, request, show, silence_seconds=PATIENCE_SECONDS)
        story.stream = stream
        return stream

    async def _kill(self, telling: asyncio.Task[list[Stream]]) -> None:
        hit = [story for story in self._scene.stories if story.pipeline == FAULT.pipeline]

        def due() -> bool:
            return all(story.stream is not None and story.stream.tokens >= KILL_AFTER_TOKENS for story in hit)

        while not due():
            if telling.done():
                defects = [defect for stream in telling.result() if (defect := stream.defect()) is not None]
                raise DemoFailed(": ".join(["the streams ended before a node could be killed", *defects[:1]]))
            await asyncio.sleep(POLL_SECONDS)
        target = FAULT.aim(await until("a status of the cluster", lambda: self._watcher.latest, PATIENCE_SECONDS))
        self._fault_unix_time = time.time()
        struck = strike(target)
        self._scene.fault_at, self._scene.fault_pipeline = struck.at, FAULT.pipeline
        self._say(f"kill -9 {target.processes[0].pid}: {target.name.partition('#')[0]}, in mid-sentence", Tone.BAD)
        await asyncio.to_thread(verify, struck)

    async def _recovery(self) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            status = self._watcher.latest or {"recoveries": []}
            return recovery_after(status, self._fault_unix_time, FAULT.pipeline, FAULT.stage)

        record = await until("a record of the recovery", ended, PATIENCE_SECONDS)
        if record["state"] != "done":
            raise DemoFailed(f"the cluster records the recovery as {record['state']}")
        return record

    async def _replacement(self) -> None:
        """Wait a little for the replacement; it is not what the demo is about."""
        try:
            await until("everybody at home", self._is_settled, REJOIN_TIMEOUT_SECONDS)
        except SystemFailed:
            self._say(f"the replacement takes more than {REJOIN_TIMEOUT_SECONDS:.0f} s: it is not waited for")

    def _is_settled(self) -> bool:
        return self._watcher.latest is not None and is_settled(self._watcher.latest)

    def _judge(self, record: dict[str, Any]) -> Outcome:
        scene = self._scene
        pauses = [pause for story in scene.affected if (pause := story.pause(scene.fault_at)) is not None]
        if not pauses:
            raise DemoFailed("no stream of the killed node's pipeline was under way")
        seconds = record["seconds"]
        shares = ", ".join(f"{name} {seconds[name] * 1e3:.0f}" for name in seconds if name != "total")
        self._say(f"the cluster's own account, in ms: {shares}; {record['recomputed_tokens']} tokens recomputed")
        return Outcome(
            recovered_seconds=max(pause.resumed_seconds for pause in pauses),
            complete=sum(story.stream is not None and story.stream.defect() is None for story in scene.stories),
            total=len(scene.stories),
            is_identical=all(story.is_identical for story in scene.stories),
        )

    # ---- what the spectator sees

    @asynccontextmanager
    async def _following(self) -> AsyncIterator[None]:
        """Keep the scene up to date with the cluster."""
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
            self._take_news()

    async def _follow(self) -> None:
        while True:
            self._take_news()
            await asyncio.sleep(FRAME_SECONDS)

    def _take_news(self) -> None:
        self._scene.status = self._watcher.latest
        news = list(self._watcher.news)
        for item in news[self._news_shown :]:
            moment = self._begun_at + item.time - self._unix_begun()
            self._say(item.text, Tone.CLUSTER, moment)
        self._news_shown = len(news)

    def _unix_begun(self) -> float:
        return time.time() - (time.monotonic() - self._begun_at)

    def _act(self, text: str) -> None:
        self._take_news()
        self._scene.act = text
        self._say(text.partition(": ")[2] or text)

    def _say(self, text: str, tone: Tone = Tone.PLAIN, moment: float | None = None) -> None:
        """Add a line; after the kill, times count from it."""
        now = time.monotonic() if moment is None else moment
        fault_at = self._scene.fault_at
        if fault_at is None or now < fault_at:
            mark = f"{now - self._begun_at:.1f} s"
        else:
            mark = f"+{(now - fault_at) * 1e3:,.0f} ms"
        announce(self._console, self._scene, Line(mark, text, tone))
