"""The clients of a fleet: each asks for what the plan says, may hang up, and looks at every token that it gets."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kevlarflow.sim.errors import WrongTokens
from kevlarflow.sim.plan import Demand
from kevlarflow.sim.scheduler import Request

if TYPE_CHECKING:
    from kevlarflow.sim.engine import Engine
    from kevlarflow.sim.fleet import Fleet

FRONT_RETRY_SECONDS = 0.05
"""After which a client that found no engine asks again."""


@dataclass
class Client:
    """What became of a demand."""

    demand: Demand
    request: Request
    engine: Engine | None = None
    ended: bool = False
    error: str = ""


class Clients:
    """See the module's text."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._clients: dict[str, Client] = {}
        self.open = 0
        """Demands that have not ended, those to come included."""
        self.cancelled: set[str] = set()
        """Requests that nobody wants any more: what they read does not matter."""

    def __len__(self) -> int:
        return len(self._clients)

    def come(self, demands: Iterable[Demand]) -> None:
        """Each asks when the plan says so."""
        for demand in demands:
            self._fleet.timeline.after(demand.at, functools.partial(self._ask, demand))
            self.open += 1

    def demand_of(self, name: str) -> Demand | None:
        """What a request is for; None before it has found an engine."""
        client = self._clients.get(name)
        return client.demand if client is not None else None

    def complaints(self) -> Iterator[str]:
        """What is not as it should be in the end."""
        yield from (f"{name} has not ended" for name, client in self._clients.items() if not client.ended)
        if self.open > sum(not client.ended for client in self._clients.values()):
            yield "some request found no engine"

    @property
    def errors(self) -> int:
        """Requests that ended with an error."""
        return sum(bool(client.error) for client in self._clients.values())

    def errors_of(self, demands: Iterable[Demand]) -> list[str]:
        """Why requests for these did not end well."""
        clients = (self._clients[each.name] for each in demands)
        return [f"{client.demand.name}: {client.error}" for client in clients if client.error]

    def lose(self, engine: Engine) -> None:
        """An engine has died, and what it had is lost."""
        for client in self._clients.values():
            if client.engine is engine and not client.ended:
                self._end(client, "the engine died")

    def _ask(self, demand: Demand) -> None:
        """A request arrives at the front, which gives it to an engine, or asks it to come again."""
        count = len(self._fleet.engines)
        order = [self._fleet.engines[(demand.pipeline + index) % count] for index in range(count)]
        engine = next((each for each in order if each.alive and each.started), None)
        if engine is None:
            self._fleet.timeline.after(FRONT_RETRY_SECONDS, functools.partial(self._ask, demand))
            return
        prompt = list(demand.prompt)
        request = Request(demand.name, prompt, len(prompt), len(demand.expected) - len(prompt))
        client = self._clients[demand.name] = Client(demand, request, engine)
        engine.add(request)
        if demand.cancelled_after is not None:
            self._fleet.timeline.after(demand.cancelled_after, functools.partial(self._cancel, client))

    def _cancel(self, client: Client) -> None:
        if not client.ended and client.engine is not None:
            self._fleet.counts["requests cancelled"] += 1
            self.cancelled.add(client.demand.name)
            self._end(client, "")
            client.engine.abort(client.request)

    def end(self, request: Request, error: str) -> None:
        """The engine has ended a request."""
        client = self._clients[request.name]
        if client.ended:
            return
        if not error and tuple(request.tokens) != client.demand.expected:
            raise WrongTokens(f"{request.name}: {request.tokens} instead of {list(client.demand.expected)}")
        self._end(client, error)

    def _end(self, client: Client, error: str) -> None:
        client.ended, client.error = True, error
        self.open -= 1
        self._fleet.tell(client.demand.name, f"ends {error}")

    def check_tokens(self, request: Request) -> None:
        """What a client has so far is what it would have without failure."""
        expected = self._clients[request.name].demand.expected
        if tuple(request.tokens) != expected[: len(request.tokens)]:
            raise WrongTokens(f"{request.name}: {request.tokens} instead of {list(expected)}")
