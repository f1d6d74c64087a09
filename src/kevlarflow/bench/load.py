"""Load: which requests are under way at what time.

In a **closed loop** so many clients each send their next request when the last one has ended; it shows what a system
can do. In an **open loop** requests come when they come, whether or not the system keeps up; it shows what users see
when it does not.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator, Sequence

from kevlarflow.bench.streams import REQUEST_TIMEOUT_SECONDS, Address, Listener, Request, Stream, send

FAILURE_PAUSE_SECONDS = 1.0
"""A client whose request has failed waits for so long: a server that is gone refuses thousands a second."""


async def closed_loop(
    address: Address,
    model: str,
    clients: Sequence[Sequence[Request]],
    listener: Listener | None = None,
    over: Callable[[], bool] = lambda: False,
) -> list[Stream]:
    """Each client sends its requests one after the other, no further one once it is `over`; all of their streams."""

    async def client(requests: Sequence[Request]) -> list[Stream]:
        wanted = itertools.takewhile(lambda _: not over(), requests)
        return [await send(address, model, request, listener) for request in wanted]

    streams = await asyncio.gather(*(client(requests) for requests in clients))
    return [stream for each in streams for stream in each]


async def endless_loop(
    address: Address,
    model: str,
    clients: Sequence[Iterator[Request]],
    take: Listener,
    is_over: Callable[[], bool],
    timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
) -> None:
    """A closed loop until `is_over`, when each client ends with the request that it waits for. `take` gets each stream
    that has ended."""

    async def client(requests: Iterator[Request]) -> None:
        while not is_over():
            stream = await send(address, model, next(requests), timeout_seconds=timeout_seconds)
            take(stream)
            if stream.failure is not None:
                await asyncio.sleep(FAILURE_PAUSE_SECONDS)

    await asyncio.gather(*map(client, clients))


async def open_loop(
    address: Address,
    model: str,
    requests: Sequence[Request],
    start_seconds: Sequence[float],
    listener: Listener | None = None,
    timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
) -> list[Stream]:
    """Each request is sent at its time, in seconds from now; all of their streams. None takes longer than allowed."""

    async def later(request: Request, seconds: float) -> Stream:
        await asyncio.sleep(seconds)
        return await send(address, model, request, listener, timeout_seconds)

    pairs = zip(requests, start_seconds, strict=True)
    return list(await asyncio.gather(*(later(request, seconds) for request, seconds in pairs)))
