"""Steps that were issued and have not completed: in which order they go out, and when.

All that are due leave at once; those with requests that may have cost a node (`recovery.suspicion`) one at a time.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from kevlarflow.recovery.capacity import without
from kevlarflow.recovery.coverage import Effects
from kevlarflow.recovery.dispatched import Dispatched
from kevlarflow.recovery.forming import Forming
from kevlarflow.recovery.ledger import Step, StepResult
from kevlarflow.recovery.pipeline_events import Execute, Recompute
from kevlarflow.recovery.suspicion import Requests, Suspicion, of_chunk, of_step, together
from kevlarflow.types import Computing, Epoch, Stage

NOTHING = StepResult(tokens={}, generators={})


class InFlight:
    """See the module's text. Iterates over the steps, oldest first."""

    def __init__(self) -> None:
        self._steps: collections.OrderedDict[int, Step] = collections.OrderedDict()
        self._effects: dict[int, Effects] = {}
        self._results: dict[int, StepResult] = {}
        self._left_out: dict[int, frozenset[str]] = {}
        self._sent: set[int] = set()
        self._first: dict[int, tuple[Recompute, ...]] = {}
        """What has to be computed right before a step, by the step's number."""
        self._recalled: dict[Stage, dict[int, Step]] = {}
        """What the node of a stage may have been running when another order came; nothing once somebody was blamed."""
        self._held: set[int] = set()
        self._heard: set[int] = set()
        """Steps that were over before the last order."""
        self._suspicion = Suspicion()
        self.dispatched = Dispatched()
        self.hold_back = False
        """Whether steps that are added wait until `recall`."""

    def __iter__(self) -> Iterator[Step]:
        return iter(list(self._steps.values()))

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._steps

    def __getitem__(self, sequence: int) -> Step:
        return self._steps[sequence]

    @property
    def sequences(self) -> tuple[int, ...]:
        """Their numbers, in order."""
        return tuple(self._steps)

    @property
    def requests(self) -> set[str]:
        """All that take part in any of them."""
        return {request for step in self._steps.values() for request in step.scheduled}

    def clear(self) -> None:
        """None will ever complete."""
        books = (self._steps, self._effects, self._results, self._left_out, self._recalled)
        for part in (*books, self._first, self._sent, self._held, self._heard):
            part.clear()
        self._suspicion.clear()
        self.dispatched.clear()
        self.hold_back = False

    # ---- coming and going

    def add(self, step: Step, effects: Effects, left_out: frozenset[str], *, overtakes: bool = False) -> None:
        """A step was issued, without the requests in `left_out`, which are set aside.

        One that `overtakes` goes out though others are held back.
        """
        self._steps[step.sequence] = step
        self._effects[step.sequence] = effects
        self._left_out[step.sequence] = left_out
        if self.hold_back and not overtakes:
            self._held.add(step.sequence)

    def precede(self, sequence: int, chunks: Iterable[Recompute]) -> None:
        """These go out right before a step, and behind those before it: they may take blocks that those still read."""
        self._first[sequence] = tuple(chunks)

    def leave_out(self, requests: frozenset[str], block_size: int) -> None:
        """Take requests out of every step: they are set aside."""
        for sequence, step in self._steps.items():
            leaving = requests & step.scheduled.keys()
            self._left_out[sequence] |= leaving
            self._steps[sequence] = without(step, requests, block_size)

    def executed(self, sequence: int, result: StepResult) -> None:
        """The last stage has sampled."""
        self._results[sequence] = result

    def executed_before(self, results: Mapping[int, StepResult]) -> None:
        """The last stage had sampled these before a new epoch began.

        They count as far as they come first: what was computed behind a step that has lost requests since comes again.
        """
        for sequence, step in self._steps.items():
            if step.scheduled and (sequence not in results or self._left_out[sequence]):
                return
            if step.scheduled:
                self._results[sequence] = results[sequence]
                self._heard.add(sequence)

    def complete(self) -> tuple[Step, StepResult, frozenset[str]] | None:
        """Take the oldest step, its result and what was left out of it, if it is done; one without tokens always is."""
        for sequence, step in self._steps.items():
            if step.scheduled and sequence not in self._results:
                return None
            del self._steps[sequence]
            self._effects.pop(sequence)
            self._sent.discard(sequence)
            self._held.discard(sequence)
            # What was over before the order clears nobody who goes on: the node may have died of it a moment later.
            self._suspicion.acquit(dataclasses.replace(step, scheduled={}) if sequence in self._heard else step)
            self._heard.discard(sequence)
            if step.scheduled:
                self.dispatched.done(sequence)
            self._note_done(step)
            return step, self._results.pop(sequence, NOTHING), self._left_out.pop(sequence)
        return None

    # ---- going out

    def recall(
        self, epoch: Epoch, staying: set[Stage], lost: Mapping[Stage, Computing | None], forming: Forming | None
    ) -> dict[str, str]:
        """What was sent is void: a new epoch begins, while `forming` was under way, or nothing.

        The nodes of the stages `staying` are to go on; those of `lost` were lost, and not by somebody's hand, which is
        held against what they were computing, or, where that is not known (None), against what they may have been.
        Returns the requests that must not run again, each with the reason.
        """
        doomed = self._blame(lost, forming) if lost else {}
        prepared = staying if forming is None else set(filter(forming.may_run, staying))
        # Who has taken the order before this one has with it left what it ran then, and who is new has run nothing.
        behind = staying & forming.to_join if forming is not None else set[Stage]()
        self._recalled = {stage: steps for stage, steps in self._recalled.items() if stage in behind}
        for stage in set[Stage]() if lost else prepared:
            # As they are: requests that give way for the new order may be taken out of them.
            self._recalled.setdefault(stage, {}).update((sequence, self._steps[sequence]) for sequence in self._sent)
        self._sent.clear()
        # Whatever the step hits is part of the plan now.
        self._first.clear()
        self._held.clear()
        self.hold_back = False
        self.dispatched.begin(epoch)
        return doomed

    @property
    def may_be_sampled(self) -> bool:
        """Whether a step with tokens was sent, in the current epoch."""
        return any(self._steps[sequence].scheduled for sequence in self._sent)

    @property
    def running(self) -> bool:
        """Whether there is a step that is not held back."""
        return len(self._held) < len(self._steps)

    def due(self) -> list[Recompute | Execute]:
        """Steps to send now, in order, with what comes right before them; they count as sent."""
        due: list[Recompute | Execute] = []
        for sequence, step in self._steps.items():
            if sequence in self._sent or sequence in self._held:
                continue
            running = [self._steps[other] for other in self._sent if self._steps[other].scheduled]
            suspicious = any(map(self._suspicion.falls_on, (step, *running)))
            if step.scheduled and running and suspicious:
                break
            self._sent.add(sequence)
            self.dispatched.add_step(step)
            due += (*self._first.pop(sequence, ()), self._as_sent(step))
        return due

    def _as_sent(self, step: Step) -> Execute:
        effects = self._effects[step.sequence]
        return Execute(
            step.sequence,
            has_tokens=bool(step.scheduled),
            # Of a request that was taken out nothing is written.
            writes=tuple(r for request, each in effects.writes.items() if request in step.scheduled for r in each),
            left_out=self._left_out[step.sequence],
            use=effects.use,
        )

    def _blame(self, lost: Mapping[Stage, Computing | None], forming: Forming | None) -> dict[str, str]:
        caught = [self.dispatched.take(computing) for computing in lost.values() if computing is not None]
        unknown = {stage for stage, computing in lost.items() if computing is None}
        if unknown:
            caught.append(self._may_have_run(unknown, forming))
        possible = self._may_have_run(set(lost), forming)
        self._recalled = {}
        return self._suspicion.blame(together(caught), possible)

    def _may_have_run(self, lost: set[Stage], forming: Forming | None) -> Requests:
        if forming is None or any(map(forming.may_run, lost)):
            return together(of_step(self._steps[sequence]) for sequence in self._sent)
        # What a node was still preparing for, it has not run; but that order may have come before the news of its end.
        if lost <= forming.to_join:
            return together(of_step(step) for stage in lost for step in self._recalled.get(stage, {}).values())
        chunk = forming.next_chunk() if not lost.isdisjoint(forming.to_restore) else None
        return of_chunk(chunk) if chunk is not None else Requests()

    def _note_done(self, step: Step) -> None:
        """Of a step that was recalled only those are still of interest that were taken out of it since."""
        for recalled in self._recalled.values():
            then = recalled.pop(step.sequence, None)
            left_out = {r: n for r, n in then.scheduled.items() if r not in step.scheduled} if then is not None else {}
            if then is not None and left_out:
                recalled[step.sequence] = dataclasses.replace(then, scheduled=left_out)
