"""Which requests of a pipeline are set aside, since when, and what the scheduler has to be told of it.

The rules are in `recovery.capacity`; this is their memory. The scheduler hears of a change before its next step, but a
step that is being scheduled meanwhile does not know of it. So everything here bears the count of formations at which it
was said, and a step that was scheduled under a smaller count is held against the rules once more when it is issued.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from kevlarflow.recovery.books import Books
from kevlarflow.recovery.capacity import Fallout, choose_usable, fallout, tables_of, without
from kevlarflow.recovery.coverage import Replica, advance
from kevlarflow.recovery.ledger import Step
from kevlarflow.recovery.pipeline_events import Aside, Command, SetAside, UseBlocks

MOST_CHOICES = 16
"""That are remembered apart."""


class GivingWay:
    """See the module's text."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self.usable: frozenset[int] | None = None
        """KV blocks that the pipeline may use; None: all."""
        self._choices: dict[int, frozenset[int]] = {}
        """Blocks that it could use for a while, by the count at which that was said, until the scheduler has done so.

        It does everything in turn: what a choice has left out must not be in use then, even if it is given back next.
        """
        self._aside: dict[str, _Told] = {}
        self._former: dict[str, list[int]] = {}
        """Block tables of those as they would be: a step that does not know of it yet goes on in them."""
        self._spoilt: frozenset[int] = frozenset()
        self._changed_at = 0

    def clear(self) -> None:
        """All requests have been ended."""
        self._aside.clear()
        self._former.clear()
        self._spoilt = frozenset()

    def may_use(self, replicas: Mapping[int, Replica]) -> dict[int, Replica]:
        """Those of blocks that the pipeline may use, and whose content the scheduler is right about."""
        usable, spoilt = self.usable, self._spoilt
        return {b: r for b, r in replicas.items() if b not in spoilt and (usable is None or b in usable)}

    def share(self, blocks: int, shares: int, doomed: Mapping[str, str], count: int) -> list[Command]:
        """Choose the blocks to use from now on, and set aside whoever has no room in them, and the `doomed`.

        `doomed` maps requests to the reason for which they end; `count` is the count of formations.
        """
        before, books = self.usable, self._books
        self.usable, surplus = choose_usable(
            tables_of(books.ledger), list(books.in_flight), before, blocks, shares, books.generations.__getitem__
        )
        commands: list[Command] = []
        if self.usable != before:
            self._changed_at = count
            if self.usable is not None:
                self._choices[count] = self.usable
                # A block that is given up holds nothing when it comes back, whatever was copied of it.
                books.generations.void(self.usable)
                self._forget_details()
            commands.append(UseBlocks(self.usable))
        return commands + self.set_aside(dict.fromkeys(surplus, "") | dict(doomed), count)

    def _forget_details(self) -> None:
        """Have two of many choices count as one until the later one is done: an idle engine may be formed for ever."""
        if len(self._choices) > MOST_CHOICES:
            first, second, *_ = self._choices
            self._choices[second] &= self._choices.pop(first)

    def set_aside(self, reasons: Mapping[str, str], count: int) -> list[Command]:
        """Set requests aside, and those that count on what they would have filled, before the nodes start afresh.

        An empty reason is for one that is to go on later.
        """
        known = Fallout(frozenset(reasons) | frozenset(self._aside), self._spoilt)
        books = self._books
        found = fallout(tables_of(books.ledger), list(books.in_flight), self.usable, known, books.block_size)
        books.ledger.preempt(found.requests)
        self._take_tables(found.requests)
        books.in_flight.leave_out(found.requests, books.block_size)
        return self._tell(found, reasons, count)

    def leave_out(self, step: Step, requests: Set[str], count: int) -> tuple[Step, list[Command]]:
        """A step that is issued, without requests that are set aside, and without these; those are from now on.

        They and whoever follows from them bear `count`. What was issued before the step runs as it is.
        """
        self._acknowledge(step.formation)
        if step.formation >= self._changed_at and not requests:
            return step, []
        known = Fallout(frozenset(self._aside) | requests, self._spoilt)
        choices = [each for each in (self.usable, *self._choices.values()) if each is not None]
        usable = frozenset.intersection(*choices) if choices else None
        tables = self._books.tables.tables | self._former
        found = fallout(tables, (step,), usable, known, self._books.block_size)
        self._take_tables(found.requests)
        advance(self._former, step)
        self._former = {request: table for request, table in self._former.items() if request in found.requests}
        return without(step, found.requests, self._books.block_size), self._tell(found, {}, count)

    def _take_tables(self, requests: Iterable[str]) -> None:
        tables = self._books.tables
        self._former.update((request, tables.tables[request]) for request in requests if request in tables.tables)
        tables.forget(requests)

    def _acknowledge(self, formation: int) -> None:
        """The scheduler has done what it was told to until then: who was set aside may run again."""
        self._aside = {request: told for request, told in self._aside.items() if told.formation > formation}
        self._former = {request: table for request, table in self._former.items() if request in self._aside}
        self._choices = {count: usable for count, usable in self._choices.items() if count > formation}
        if not self._aside:
            self._spoilt = frozenset()

    def _tell(self, found: Fallout, reasons: Mapping[str, str], count: int) -> list[Command]:
        introduced = {each.request for step in self._books.in_flight for each in step.admissions}
        aside = []
        for request in sorted(found.requests):
            known = request in self._books.ledger or request in introduced
            before = self._aside.get(request)
            if before is None or before.known != known or reasons.get(request):
                aside.append(Aside(request, reasons.get(request, ""), known))
                self._aside[request] = _Told(count, known)
        more_spoilt = not found.spoilt <= self._spoilt
        self._spoilt = found.spoilt
        self._books.generations.forget(found.spoilt)
        if not aside and not more_spoilt:
            return []
        self._changed_at = count
        return [SetAside(tuple(aside), found.spoilt)]


class _Told(NamedTuple):
    """What the scheduler was told of a request that is set aside."""

    formation: int
    """The count of formations then."""
    known: bool
    """Whether the nodes had heard of it."""
