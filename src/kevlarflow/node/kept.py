"""What a stage has computed in steps that may come again, since another stage's node can be lost before they complete.

Then the steps in flight are issued once more, to all stages. One that stays has done its part of some of them: their KV
is in its memory. So the output that it passed on is kept, and passed on again, at no cost; and what the last stage has
sampled goes to the engine with `Joined`, since an answer of the old epoch is not believed any more.

An output may be passed on again only if who comes after it finds the KV that this step has written. It does as long as
the steps come as they came before, byte for byte: the first that differs (a request was taken out of it) is computed,
and so are all after it. So is a step that wrote a block which a later one was given, and has overwritten already. What
is put in place for a recovery makes all of them void; so does what is computed for it, if it goes into a block that one
of them was given: otherwise it writes what is there already.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from kevlarflow.types import Epoch

MAX_STEPS = 16
"""Steps whose outputs are kept, the newest ones; an engine has as many in flight as there are stages."""
MAX_RESULTS = 4
"""Results that are kept. They travel with every `Joined`, and hardly ever has a last stage run further ahead."""
MAX_BYTES = 64 << 20
"""Of a lane's outputs together, or of its results: long prompts are computed again rather than fill the memory."""


class _Kept(NamedTuple):
    asked: Any
    """The step as it came."""
    output: Any
    size: int
    """In bytes."""
    writes: Mapping[int, int]
    """The KV blocks that it has written, with the generation of each."""


class KeptSteps:
    """See the module's text: one lane's. A stage keeps outputs, or, if it is the last one, results."""

    def __init__(self) -> None:
        self._before: dict[int, _Kept] = {}
        """Of earlier epochs, and still good."""
        self._now: collections.OrderedDict[int, _Kept] = collections.OrderedDict()
        """Of this epoch, by the step's number."""
        self._results: collections.OrderedDict[tuple[Epoch, int], _Kept] = collections.OrderedDict()

    def renew(self) -> None:
        """The lane is opened under a new epoch: steps may come again."""
        self._before |= self._now
        self._now.clear()

    def spoil(self) -> None:
        """The lane's KV is not what those steps have left."""
        self._before.clear()
        self._now.clear()

    def recomputed(self, blocks: Iterable[int], oldest: int) -> None:
        """These blocks were computed again for whom the ledger says they are of; steps before `oldest` are over."""
        kept = self._before | self._now
        # A block's generation is the number of the step that was given it. If that is over, the block has not changed
        # hands since the ledger was written, and holds what it held.
        given = {
            block for each in kept.values() for block, step in each.writes.items() if step >= oldest and step in kept
        }
        if not given.isdisjoint(blocks):
            self.spoil()

    # ---- outputs

    def output(self, sequence: int, asked: Any) -> Any | None:
        """What may be passed on for a step that comes as `asked`; None if it has to be computed."""
        kept = self._before.get(sequence)
        return kept.output if kept is not None and kept.asked == asked and self._is_there(sequence, kept) else None

    def _is_there(self, sequence: int, kept: _Kept) -> bool:
        """Whether no later step that has run was given a block that this one wrote: who comes between may read it."""
        later = [each.writes for number, each in self._before.items() if number > sequence]
        return all(writes.get(block, own) == own for writes in later for block, own in kept.writes.items())

    def passed_on(self, sequence: int, output: Any) -> None:
        """The step's output was passed on again, like this."""
        self._now[sequence] = self._before.pop(sequence)._replace(output=output)
        _trim(self._now)

    def computed(self, sequence: int, asked: Any, output: Any, size: int, writes: Mapping[int, int]) -> None:
        """A step was computed, not passed on; `output` is of `size` bytes. `writes`: its blocks, with generations."""
        # What comes after it, it may have changed.
        self._before.clear()
        self._now[sequence] = _Kept(asked, output, size, writes)
        _trim(self._now)

    # ---- results

    @property
    def results(self) -> Mapping[tuple[Epoch, int], Any]:
        """What was sampled in the newest steps, by the epoch in which they ran and their numbers."""
        return {key: kept.output for key, kept in self._results.items()}

    def sampled(self, epoch: Epoch, sequence: int, result: Any, size: int) -> None:
        """The last stage has sampled, and answered the engine."""
        self._results[epoch, sequence] = _Kept(None, result, size, {})
        _trim(self._results, MAX_RESULTS)


def _trim(kept: collections.OrderedDict[Any, _Kept], most: int = MAX_STEPS) -> None:
    """Give up the oldest until the rest may be kept."""
    while kept and (len(kept) > most or sum(each.size for each in kept.values()) > MAX_BYTES):
        kept.popitem(last=False)
