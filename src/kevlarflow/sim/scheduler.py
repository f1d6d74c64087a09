"""A toy of vLLM's scheduler, with the habits that make recovery hard.

Blocks are cached when they are given out, before the step has run, so that a request hits what another one computes in
the same step; a request that is in flight can be preempted, and its token is delivered all the same; its blocks may be
given away at once; a request may be aborted while it is in flight; prompts are cut into chunks, of which several may be
in flight; a resumed request hits its own old blocks; one that owes log-probabilities of its prompt hits nothing, and
others hit its blocks. A worker is told a prompt once, and later differences only.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kevlarflow.recovery.ledger import Admission, Continuation, Step
from kevlarflow.recovery.pipeline_events import Aside, EvictPrefixCache, SetAside, UseBlocks
from kevlarflow.sim.errors import WrongBlocks

Table = list[int]
CHUNKS = (3, 5, 1_000)
"""How many tokens of a request a step computes at most: `--long-prefill-token-threshold`."""
OWES_LOGPROBS = 0.1
"""How often a request owes log-probabilities of its prompt."""


@dataclass
class Request:
    """A request as the scheduler keeps it."""

    name: str
    tokens: list[int]
    prompt_length: int
    max_tokens: int
    blocks: Table = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0
    known_to_workers: bool = False
    owes_logprobs: bool | None = None
    """Whether it owes log-probabilities of its prompt; None until it is scheduled for the first time."""
    aborted: bool = False
    error: str = ""
    """Why it ended, when it did not end by itself."""

    @property
    def outputs(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def done(self) -> bool:
        """Whether it has all its tokens."""
        return self.outputs >= self.max_tokens


class Blocks:
    """A block pool with a prefix cache over full blocks. Block 0 is never given out, as in vLLM."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.free: list[int] = list(range(1, count))
        self.withheld: list[int] = []
        """Blocks that may not be given out for now."""
        self.users: dict[int, int] = {}
        self.hash_of: dict[int, tuple[int, ...]] = {}
        self.cached: dict[tuple[int, ...], int] = {}

    def hit(self, tokens: Sequence[int]) -> Table:
        """Cached blocks of the longest known prefix; at least one token is left to compute."""
        table: Table = []
        for end in range(self.size, len(tokens), self.size):
            block = self.cached.get(tuple(tokens[:end]))
            if block is None:
                break
            table.append(block)
        return table

    def take(self, hits: Table, fresh: int) -> Table | None:
        """Use `hits` and `fresh` new blocks; None when there are not enough."""
        if not hits and not fresh:
            return []
        free = [block for block in self.free if block not in hits]
        if len(free) < fresh:
            return None
        new, self.free = free[:fresh], free[fresh:]
        for block in new:
            self._forget(block)
        for block in [*hits, *new]:
            self.users[block] = self.users.get(block, 0) + 1
        return new

    def cache(self, table: Table, tokens: Sequence[int], computed: int) -> None:
        """Remember full blocks, as vLLM does: when they are scheduled, not when they are computed."""
        for index in range(computed // self.size):
            if table[index] in self.hash_of:
                continue
            key = tuple(tokens[: (index + 1) * self.size])
            if key not in self.cached:
                self.cached[key] = table[index]
                self.hash_of[table[index]] = key

    def release(self, table: Table) -> None:
        """Give blocks back; cached ones stay hittable until they are taken."""
        for block in reversed(table):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free.append(block)

    def evict_unheld(self, keep: frozenset[int]) -> None:
        """Forget every cached block that nobody uses, but `keep`."""
        for block in self.free:
            if block not in keep:
                self._forget(block)

    def use(self, usable: frozenset[int] | None) -> None:
        """Give out these only; None: all. Raises `WrongBlocks` when another one is in use."""
        everything = sorted([*self.free, *self.withheld])
        self.withheld = [block for block in everything if usable is not None and block not in usable]
        self.free = [block for block in everything if block not in self.withheld]
        self.forget(self.withheld)
        strays = [b for b, users in self.users.items() if users and usable is not None and b not in usable]
        if strays:
            raise WrongBlocks(f"blocks {strays} are in use and not among {sorted(usable or ())}")

    def forget(self, blocks: Iterable[int]) -> None:
        """Take blocks out of the cache."""
        for block in blocks:
            self._forget(block)

    @property
    def capacity(self) -> int:
        """Blocks that may be given out, in use or not."""
        return len(self.free) + sum(1 for users in self.users.values() if users)

    def _forget(self, block: int) -> None:
        key = self.hash_of.pop(block, None)
        if key is not None:
            self.cached.pop(key, None)


def completed(output: dict[str, list[int]] | None, left_out: frozenset[str]) -> dict[str, list[int]]:
    """See `engine.translate.completed`."""
    return {request: tokens for request, tokens in (output or {}).items() if request not in left_out}


class ToyScheduler:
    """See the module's text. `budget` is tokens a step."""

    def __init__(self, rng: random.Random, blocks: Blocks, budget: int, max_running: int, first_step: int = 0) -> None:
        self.rng = rng
        self.blocks = blocks
        self.budget = budget
        self.max_running = max_running
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.ended: list[Request] = []
        self.held: list[Request] = []
        """Requests that do not fit into the blocks that may be used, until there are more."""
        self._finished: set[str] = set()
        self._preempted: set[str] = set()
        self._preempted_before: set[str] = set()
        """Preempted between two steps."""
        self._sequence = first_step
        self._chunk = rng.choice(CHUNKS)
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether a step could do or say something."""
        return bool(self.waiting or self.running or self._finished)

    @property
    def unfinished(self) -> list[Request]:
        """Requests that have not ended."""
        return [*self.running, *self.waiting, *self.held]

    def schedule(self, formation: int, *, paused: bool = False) -> tuple[Step, dict[str, list[int]]]:
        """The next step, and all known tokens of the requests in it; nobody's while `paused`."""
        self._sequence += 1
        self._preempted = self._preempted_before
        self._preempted_before = set()
        self._hold_back()
        room = 0 if paused else self.budget
        scheduled: dict[str, int] = {}
        continuations: list[Continuation] = []
        before = len(self._preempted)
        for request in list(self.running):
            if request not in self.running or room == 0:
                continue
            count = min(len(request.tokens) - request.computed, room, self._chunk)
            if count == 0:
                continue  # Its token is under way; a prompt's next chunk need not wait for that.
            new = self._grow(request, count)
            if new is None:
                break
            continuations.append(Continuation(request.name, False, tuple(new), request.computed, request.outputs))
            scheduled[request.name] = count
            room -= count
        preempted_now = len(self._preempted) > before
        admissions: list[Admission] = []
        while self.waiting and room and not preempted_now and len(self.running) < self.max_running:
            if self.waiting[0].in_flight:
                break  # Its token is still to be delivered; resuming it now could sample that position again.
            started = self._start(self.waiting[0], room, admissions, continuations)
            if started is None:
                break
            scheduled[self.waiting[0].name] = started
            room -= started
            self.running.append(self.waiting.pop(0))
        return self._finish_step(scheduled, admissions, continuations, formation)

    def _finish_step(
        self,
        scheduled: dict[str, int],
        admissions: list[Admission],
        continuations: list[Continuation],
        formation: int,
    ) -> tuple[Step, dict[str, list[int]]]:
        known = {}
        for request in self.running:
            count = scheduled.get(request.name, 0)
            if count:
                known[request.name] = list(request.tokens)
                request.computed += count
                request.in_flight += count
        finished, self._finished = frozenset(self._finished), set()
        step = Step(
            self._sequence,
            tuple(admissions),
            tuple(continuations),
            scheduled,
            finished,
            frozenset(self._preempted),
            formation,
        )
        return step, known

    def _grow(self, request: Request, count: int) -> Table | None:
        """New blocks for `count` more tokens, preempting from the back; None when the request itself had to go."""
        need = -(-(request.computed + count) // self.blocks.size) - len(request.blocks)
        while True:
            new = self.blocks.take([], need)
            if new is not None:
                request.blocks += new
                self.blocks.cache(request.blocks, request.tokens, request.computed + count)
                return new
            victims = [r for r in self.running if r.name not in self._scheduled_now(request)]
            victim = victims[-1]
            self._preempt(victim)
            if victim is request:
                return None

    def _scheduled_now(self, request: Request) -> set[str]:
        """Requests before this one in the queue: they are part of the step already and are not preempted."""
        return {r.name for r in self.running[: self.running.index(request)]}

    def _preempt(self, request: Request) -> None:
        self.preemptions += 1
        self.running.remove(request)
        self.blocks.release(request.blocks)
        request.blocks, request.computed = [], 0
        self._preempted.add(request.name)
        self.waiting.insert(0, request)

    def _start(
        self, request: Request, room: int, admissions: list[Admission], continuations: list[Continuation]
    ) -> int | None:
        if request.owes_logprobs is None:
            request.owes_logprobs = self.rng.random() < OWES_LOGPROBS
        hits = [] if request.owes_logprobs else self.blocks.hit(request.tokens)
        computed = len(hits) * self.blocks.size
        count = min(len(request.tokens) - computed, room, self._chunk)
        fresh = -(-(computed + count) // self.blocks.size) - len(hits)
        new = self.blocks.take(hits, fresh)
        if new is None:
            return None
        request.blocks, request.computed = [*hits, *new], computed
        self.blocks.cache(request.blocks, request.tokens, computed + count)
        if request.known_to_workers:
            continuations.append(Continuation(request.name, True, tuple(request.blocks), computed, request.outputs))
        else:
            prompt, blocks = tuple(request.tokens[: request.prompt_length]), tuple(request.blocks)
            admissions.append(Admission(request.name, prompt, blocks, computed, None, request.owes_logprobs))
            request.known_to_workers = True
        return count

    def update(self, step: Step, tokens: dict[str, list[int]]) -> None:
        """Take a step's output."""
        for request in self.unfinished:
            if request.name not in step.scheduled:
                continue
            request.in_flight = max(0, request.in_flight - step.scheduled[request.name])
            request.tokens += tokens.get(request.name, [])
            if request.done:
                self._end(request)

    def set_aside(self, aside: Iterable[Aside], spoilt: frozenset[int]) -> None:
        """Preempt or end requests, as the hook in vLLM's scheduler does."""
        self.blocks.forget(spoilt)
        # Each that is preempted goes to the front of the queue.
        places = {request.name: place for place, request in enumerate(self.running)}
        for each in sorted(aside, key=lambda each: -places.get(each.request, -1)):
            request = self._find(each.request)
            if request is None:
                continue
            if each.reason:
                request.error = each.reason
                self._end(request)
                continue
            if request in self.running:
                self._preempt(request)
                self._preempted.discard(request.name)
                self._preempted_before.add(request.name)
            if not each.known:
                request.known_to_workers = False

    def obey(self, told: Sequence[EvictPrefixCache | SetAside | UseBlocks]) -> None:
        """Do what the core has told, in the order of the hook in vLLM's scheduler."""
        for each in told:
            if isinstance(each, SetAside):
                self.set_aside(each.requests, each.spoilt)
        for each in told:
            match each:
                case UseBlocks(usable):
                    self.use_blocks(usable)
                case EvictPrefixCache(keep):
                    self.blocks.evict_unheld(keep)

    def has(self, request: Request) -> bool:
        """Whether it has not ended."""
        return any(request in queue for queue in (self.running, self.waiting, self.held))

    def _find(self, name: str) -> Request | None:
        return next((request for request in self.unfinished if request.name == name), None)

    def use_blocks(self, usable: frozenset[int] | None) -> None:
        """Give out these blocks only; None: all."""
        self.blocks.use(usable)
        self.waiting = self.held + self.waiting
        self.held = []

    def _hold_back(self) -> None:
        if not self.waiting:
            return
        room = self.blocks.capacity * self.blocks.size
        for request in list(self.waiting):
            if len(request.tokens) + 1 > room:
                self.waiting.remove(request)
                self.held.append(request)

    def abort(self, request: Request) -> None:
        """The client has gone."""
        request.aborted = True
        self._end(request)

    def _end(self, request: Request) -> None:
        next(queue for queue in (self.running, self.waiting, self.held) if request in queue).remove(request)
        self.blocks.release(request.blocks)
        request.blocks = []
        if request.known_to_workers:
            self._finished.add(request.name)
        self.ended.append(request)
