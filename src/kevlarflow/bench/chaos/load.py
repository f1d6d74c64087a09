"""The load of a scenario: requests of mixed kinds, the same each time, and what their clients got."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import msgspec

from kevlarflow.bench.chaos.scenario import Kind, Load
from kevlarflow.bench.prompts import passage
from kevlarflow.bench.streams import Address, Request, Stream, Tokens, chat, completion, send

LONG_SENTENCES = 28
"""Some 450 tokens: several chunks of prefill where a step takes 256."""
CANCEL_SHARE = 3
_CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "country": {"type": "string", "maxLength": 12},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["name", "country", "population"],
    "additionalProperties": False,
}
_JSON = {"type": "json_schema", "json_schema": {"name": "city", "schema": _CITY}}
_CITIES = ("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi", "Perth", "Turin", "Kyoto")


class Task(msgspec.Struct, frozen=True):
    """A request, and how its client behaves."""

    request: Request
    cancel_after_tokens: int | None = None
    """The client hangs up then."""


class Answer(msgspec.Struct):
    """What a client got."""

    stream: Stream
    was_cancelled: bool = False
    tokens: Tokens = msgspec.field(default_factory=Tokens)

    def defect(self) -> str | None:
        """Why this request counts as lost; None when it does not."""
        if self.was_cancelled:
            return None
        return self.stream.defect()


def tasks(load: Load, pipelines: int, seed: str = "chaos") -> list[list[Task]]:
    """The tasks of each client, one after the other; kinds and pipelines are mixed evenly, unless clients stay."""
    return [
        [
            _task(
                load.kinds[(client // pipelines + number) % len(load.kinds)],
                f"client {client} request {number}",
                f"{seed}/{client}/{number}",
                load.tokens,
                (client + (0 if load.stay else number)) % pipelines,
            )
            for number in range(load.requests)
        ]
        for client in range(load.streams)
    ]


def _task(kind: Kind, name: str, seed: str, tokens: int, pipeline: int) -> Task:
    number = sum(map(ord, seed))
    if kind is Kind.JSON:
        city = _CITIES[number % len(_CITIES)]
        request = chat(name, f"Describe {city} as JSON. Note: {passage(seed, 1)}", tokens, pipeline)
        return Task(_with(request, response_format=_JSON))
    request = completion(name, passage(seed, LONG_SENTENCES if kind is Kind.LONG else 6), tokens, pipeline)
    if kind is Kind.SEEDED:
        return Task(_with(request, temperature=0.8, seed=number))
    if kind is Kind.LOGPROBS:
        return Task(_with(request, logprobs=3))
    if kind is Kind.CANCELLED:
        return Task(request, max(1, tokens // CANCEL_SHARE))
    return Task(request)


def _with(request: Request, **fields: Any) -> Request:
    return msgspec.structs.replace(request, body={**request.body, **fields})


async def run(
    address: Address, model: str, clients: list[list[Task]], listener: Callable[[Stream], None] | None = None
) -> list[Answer]:
    """All answers, client by client. `listener` is called at each event, on the event loop."""

    async def client(own: list[Task]) -> list[Answer]:
        return [await _ask(address, model, task, listener) for task in own]

    answers = await asyncio.gather(*map(client, clients))
    return [answer for each in answers for answer in each]


async def _ask(address: Address, model: str, task: Task, listener: Callable[[Stream], None] | None) -> Answer:
    limit = task.cancel_after_tokens
    seen: list[Stream] = []
    tokens = Tokens()

    def listen(stream: Stream) -> None:
        if listener is not None:
            listener(stream)
        if limit is not None and stream.tokens >= limit:
            seen[:] = [stream]
            asking.cancel()

    asking = asyncio.create_task(send(address, model, task.request, listen, tokens=tokens))
    try:
        stream = await asking
    except asyncio.CancelledError:
        if not seen:
            # It was not this client that hung up: the whole load is being given up.
            asking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asking
            raise
        return Answer(seen[0], was_cancelled=True, tokens=tokens)
    return Answer(stream, tokens=tokens)
