"""One streamed completion, and the record of it: when each token arrived at the client.

Client and servers share the machine, so a heavy client would be part of what it measures. This one speaks just
enough HTTP/1.1 for a server-sent event stream and decodes each event once, at a few microseconds each.

What goes wrong with a stream is written into its record, never raised: whether a failure counts is for the
experiment to say.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import msgspec

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
REQUEST_TIMEOUT_SECONDS = 180.0
"""No stream may take longer, failover included."""
PIPELINE_HEADER = "X-data-parallel-rank"
"""vLLM's own: which engine has to serve the request."""
HTTP_OK = 200
LONGEST_ERROR = 300


class Address(NamedTuple):
    """Where a server listens."""

    host: str
    port: int


class Request(msgspec.Struct, frozen=True):
    """One request to stream."""

    name: str
    path: str
    body: dict[str, Any]
    pipeline: int | None = None
    """The pipeline that has to serve it; None leaves the choice to the server."""


class Stream(msgspec.Struct):
    """What one request got. Times are `time.monotonic()`, in seconds."""

    name: str
    sent_at: float
    pipeline: int | None = None
    times: list[float] = msgspec.field(default_factory=list)
    """When each event that carries tokens or text arrived."""
    counts: list[int] = msgspec.field(default_factory=list)
    """How many tokens each of these events carried; 0 for the rest of a character."""
    pieces: list[str] = msgspec.field(default_factory=list)
    """The text of each of these events."""
    usage_tokens: int | None = None
    """Output tokens as the server counted them, in its last event."""
    finish_reason: str | None = None
    done: bool = False
    """Whether the end mark arrived."""
    ended_at: float | None = None
    """When nothing more would come, for whatever reason."""
    failure: str | None = None

    @property
    def tokens(self) -> int:
        """Output tokens that arrived."""
        return sum(self.counts)

    @property
    def text(self) -> str:
        """The whole text that arrived."""
        return "".join(self.pieces)

    def defect(self, tokens: int | None = None) -> str | None:
        """Why this is not one whole stream (of `tokens` tokens, when that is known); None when it is."""
        if self.failure is not None:
            return f"{self.name}: {self.failure}"
        if not self.done or self.finish_reason is None:
            return f"{self.name}: the stream ended early, after {self.tokens} tokens"
        if self.usage_tokens != self.tokens:
            return f"{self.name}: {self.tokens} tokens arrived and the server counted {self.usage_tokens}"
        if tokens is not None and self.tokens != tokens:
            return f"{self.name}: {self.tokens} tokens arrived and {tokens} were asked for"
        return None


class Tokens(msgspec.Struct):
    """What a stream consists of, for those who compare: the record of its times does without."""

    ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[float | None] = msgspec.field(default_factory=list)
    """Of a completion's tokens, if it was asked for any."""


Listener = Callable[[Stream], None]
"""Is called on the event loop after each event that carries tokens or text; must not block."""


class _Delta(msgspec.Struct):
    content: str | None = None


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None] = []


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


def completion(name: str, prompt: str, tokens: int, pipeline: int | None = None) -> Request:
    """A text completion of exactly so many tokens."""
    return Request(name, COMPLETIONS, {"prompt": prompt, "ignore_eos": True, **_body(tokens)}, pipeline)


def chat(name: str, question: str, tokens: int, pipeline: int | None = None) -> Request:
    """A chat completion of at most so many tokens."""
    messages = [{"role": "user", "content": question}]
    return Request(name, CHAT, {"messages": messages, **_body(tokens)}, pipeline)


def _body(tokens: int) -> dict[str, Any]:
    return {
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


async def send(
    address: Address,
    model: str,
    request: Request,
    listener: Listener | None = None,
    timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    silence_seconds: float | None = None,
    tokens: Tokens | None = None,
) -> Stream:
    """Send a request and record its stream to the end, or to its failure, and what it consists of in `tokens`.

    With `silence_seconds` it may take any time in all, as long as the next token comes within that.
    """
    stream = Stream(request.name, time.monotonic(), request.pipeline)
    try:
        async with asyncio.timeout(silence_seconds or timeout_seconds) as limit:
            hears = listener if silence_seconds is None else _postponing(limit, silence_seconds, listener)
            take = functools.partial(_take, stream, hears, tokens)
            await _exchange(address, model, request, stream, take)
    except TimeoutError:
        missed = f"end after {timeout_seconds:g} s" if silence_seconds is None else f"token for {silence_seconds:g} s"
        stream.failure = f"no {missed}: {stream.tokens} of {request.body['max_tokens']} tokens came"
    except (OSError, EOFError, ValueError, msgspec.DecodeError, asyncio.LimitOverrunError) as error:
        stream.failure = f"{type(error).__name__}: {error}"
    stream.ended_at = time.monotonic()
    return stream


def _postponing(limit: asyncio.Timeout, seconds: float, listener: Listener | None) -> Listener:
    """A listener that puts the limit off with each token, and passes it on."""

    def hear(stream: Stream) -> None:
        limit.reschedule(asyncio.get_running_loop().time() + seconds)
        if listener is not None:
            listener(stream)

    return hear


async def _exchange(
    address: Address, model: str, request: Request, stream: Stream, take: Callable[[bytes], None]
) -> None:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(_head_and_body(address, model, request))
        status, is_chunked = await _read_head(reader)
        content = _chunks(reader) if is_chunked else _until_end(reader)
        if status != HTTP_OK:
            body = b"".join([chunk async for chunk in content])
            stream.failure = f"HTTP {status}: {body[:LONGEST_ERROR].decode(errors='replace')}"
            return
        async for data in _events(content):
            take(data)
    finally:
        writer.close()


def _head_and_body(address: Address, model: str, request: Request) -> bytes:
    body = msgspec.json.encode({"model": model, **request.body})
    lines = [
        f"POST {request.path} HTTP/1.1",
        f"Host: {address.host}:{address.port}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if request.pipeline is not None:
        lines.append(f"{PIPELINE_HEADER}: {request.pipeline}")
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """The status code, and whether the content comes in chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    return int(head.split(maxsplit=2)[1]), "transfer-encoding: chunked" in head


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        size = await reader.readline()
        if not size:
            raise EOFError("the connection was closed in mid-stream")
        length = int(size.partition(b";")[0], 16)
        data = await reader.readexactly(length + 2)
        if length == 0:
            return
        yield data[:-2]


async def _until_end(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while data := await reader.read(2**16):
        yield data


async def _events(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event."""
    pending = b""
    async for data in content:
        *events, pending = (pending + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event.removeprefix(b"data: ")


def _take(stream: Stream, listener: Listener | None, tokens: Tokens | None, data: bytes) -> None:
    if data == b"[DONE]":
        stream.done = True
        return
    now = time.monotonic()
    event = _decoder.decode(data)
    if event.error is not None:
        stream.failure = f"error event: {str(event.error)[:LONGEST_ERROR]}"
    if event.usage is not None:
        stream.usage_tokens = event.usage.completion_tokens
    for choice in event.choices:
        stream.finish_reason = choice.finish_reason or stream.finish_reason
        text = choice.text if choice.delta is None else choice.delta.content
        count = len(choice.token_ids or ())
        if tokens is not None:
            tokens.ids += choice.token_ids or ()
            tokens.logprobs += choice.logprobs.token_logprobs if choice.logprobs is not None else ()
        if count or text:
            stream.times.append(now)
            stream.counts.append(count)
            stream.pieces.append(text or "")
            if listener is not None:
                listener(stream)
