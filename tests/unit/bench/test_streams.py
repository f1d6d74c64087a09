"""The client, against a server that says exactly what the test wants."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest

from kevlarflow.bench.streams import Address, Request, Stream, Tokens, chat, completion, send

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str, *ids: int, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "token_ids": list(ids), "finish_reason": finish}])


USAGE = event(choices=[], usage={"completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def ask(
    answer: Sequence[bytes],
    request: Request | None = None,
    seen: list[bytes] | None = None,
    tokens: Tokens | None = None,
) -> Stream:
    """Send one request to a server that writes these pieces and closes the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split()[0])
        body = await reader.readexactly(length)
        if seen is not None:
            seen.extend((head, body))
        for piece in answer:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        writer.close()

    async def main() -> Stream:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
            what = request or completion("r", "once", 3)
            return await send(address, "m", what, timeout_seconds=5.0, tokens=tokens)

    return asyncio.run(main())


WHOLE = [HEAD, chunk(token("a", 1)), chunk(token("bc", 2, 3, finish="length")), chunk(USAGE + DONE), chunk(b"")]


def test_a_whole_stream():
    stream = ask(WHOLE)
    assert stream.defect(3) is None
    assert (stream.counts, stream.text, stream.finish_reason) == ([1, 2], "abc", "length")
    assert stream.sent_at < stream.times[0] < stream.times[1]


def test_tokens_and_logprobs_are_kept_for_those_who_ask():
    with_logprobs = event(
        choices=[{"index": 0, "text": "d", "token_ids": [4], "logprobs": {"token_logprobs": [-0.5], "tokens": ["d"]}}]
    )
    tokens = Tokens()
    ask([*WHOLE[:3], chunk(with_logprobs), *WHOLE[3:]], tokens=tokens)
    assert tokens == Tokens([1, 2, 3, 4], [-0.5])


def test_events_may_be_cut_anywhere_and_share_a_chunk():
    data = token("a", 1) + token("b", 2) + token("c", 3, finish="stop") + USAGE + DONE
    stream = ask([HEAD, chunk(data[:50]), chunk(data[50:71]), chunk(data[71:]), chunk(b"")])
    assert stream.defect(3) is None
    assert stream.text == "abc"


def test_chat_deltas_are_read_and_the_empty_first_one_is_no_token():
    first = event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
    said = event(choices=[{"index": 0, "delta": {"content": "hi"}, "token_ids": [5], "finish_reason": "stop"}])
    usage = event(choices=[], usage={"completion_tokens": 1})
    stream = ask([HEAD, chunk(first), chunk(said), chunk(usage + DONE), chunk(b"")], chat("c", "hello", 9))
    assert stream.defect() is None
    assert (stream.counts, stream.text) == ([1], "hi")


def test_a_connection_that_breaks_is_a_defect():
    stream = ask(WHOLE[:2])
    assert stream.failure is not None
    assert "closed in mid-stream" in str(stream.defect())


def test_a_stream_without_its_end_mark_is_a_defect():
    stream = ask([*WHOLE[:3], chunk(b"")])
    assert "ended early, after 3 tokens" in str(stream.defect(3))


def test_an_error_event_is_a_defect():
    stream = ask([HEAD, chunk(token("a", 1)), chunk(event(error={"message": "engine died"})), chunk(DONE), chunk(b"")])
    assert "engine died" in str(stream.defect())


def test_an_error_status_is_a_defect_with_what_the_server_said():
    stream = ask([b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 7\r\n\r\nno node"])
    assert stream.defect() == "r: HTTP 503: no node"


def test_a_token_too_few_is_a_defect():
    stream = ask(WHOLE)
    assert "3 tokens arrived and 4 were asked for" in str(stream.defect(4))


def test_a_token_that_the_server_counts_and_nobody_got_is_a_defect():
    lost = [HEAD, chunk(token("a", 1)), chunk(token("c", 3, finish="stop")), chunk(USAGE + DONE), chunk(b"")]
    assert "2 tokens arrived and the server counted 3" in str(ask(lost).defect())


def test_nobody_listens():
    stream = asyncio.run(send(Address("127.0.0.1", 1), "m", completion("r", "once", 3)))
    assert stream.failure is not None
    assert stream.failure.startswith("ConnectionRefusedError")


def test_a_server_that_says_nothing_is_given_up():
    async def main() -> Stream:
        async with await asyncio.start_server(lambda *_: asyncio.sleep(1), "127.0.0.1", 0) as server:
            address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
            return await send(address, "m", completion("r", "once", 3), timeout_seconds=0.1)

    assert asyncio.run(main()).failure == "no end after 0.1 s: 0 of 3 tokens came"


@pytest.mark.parametrize(("pause", "failure"), [(0.1, None), (10.0, "no token for 0.5 s: 1 of 3 tokens came")])
def test_a_slow_stream_is_given_up_when_no_token_comes_for_long(pause: float, failure: str | None):
    pieces = [HEAD, *(chunk(token("a", number)) for number in range(10)), chunk(token("", finish="length"))]

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number, piece in enumerate([*pieces, chunk(DONE), chunk(b"")]):
            writer.write(piece)
            await asyncio.sleep(0 if number == 0 else pause)
        writer.close()

    async def main() -> Stream:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = Address("127.0.0.1", server.sockets[0].getsockname()[1])
            request = completion("r", "once", 3)
            return await send(address, "m", request, timeout_seconds=0.5, silence_seconds=0.5)

    stream = asyncio.run(main())
    assert stream.failure == failure
    assert stream.done == (failure is None)


@pytest.mark.parametrize(("pipeline", "header"), [(1, b"X-data-parallel-rank: 1"), (None, b"")])
def test_what_is_sent(pipeline: int | None, header: bytes):
    seen: list[bytes] = []
    ask(WHOLE, completion("r", "once", 3, pipeline), seen)
    assert header in seen[0]
    assert (b"data-parallel" in seen[0]) == (pipeline is not None)
    body = json.loads(seen[1])
    assert (body["model"], body["prompt"], body["max_tokens"], body["ignore_eos"]) == ("m", "once", 3, True)
    assert (body["temperature"], body["stream"], body["stream_options"]) == (0, True, {"include_usage": True})
