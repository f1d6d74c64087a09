"""What the nodes may be computing: all that was sent to them and is not known to be over.

A step that is sent again after a loss keeps its number, but requests may have been taken out of it meanwhile, while
some node still computes it as it was. So what was sent is kept by number and epoch, and by these a lost node has
written it down. No two nodes are ever lost while they compute the same number in the same epoch, since a stage begins
when the one before is done; so what was found once is forgotten, and a loss that is told of twice counts once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from kevlarflow.recovery.ledger import Step
from kevlarflow.recovery.recompute import Chunk
from kevlarflow.recovery.suspicion import Requests, of_chunk, of_step
from kevlarflow.types import Computing, Epoch, Loss, NodeInfo, Stage


class Dispatched:
    """See the module's text. Chunks have negative numbers."""

    def __init__(self) -> None:
        self._epoch = Epoch(0)
        self._requests: dict[tuple[Epoch, int], Requests] = {}
        self._chunk_numbers = itertools.count(1)

    def clear(self) -> None:
        """Nobody cares any more."""
        self._requests.clear()

    def begin(self, epoch: Epoch) -> None:
        """What is sent from now on is sent in this epoch."""
        self._epoch = epoch

    def add_step(self, step: Step) -> None:
        """A step is sent."""
        if step.scheduled:
            self._requests[self._epoch, step.sequence] = of_step(step)

    def add_chunks(self, chunks: Iterable[Chunk]) -> dict[int, Chunk]:
        """Chunks are sent; returns them with the numbers that they get, which are positive here."""
        numbered = {next(self._chunk_numbers): chunk for chunk in chunks}
        self._requests |= {(self._epoch, -number): of_chunk(chunk) for number, chunk in numbered.items()}
        return numbered

    def done(self, sequence: int) -> None:
        """The last stage has computed it, so all have, and all have left older epochs."""
        for key in [key for key in self._requests if key[1] == sequence]:
            del self._requests[key]

    def settle(self) -> None:
        """All nodes have taken the newest order: nothing older is computed any more."""
        self._requests = {key: each for key, each in self._requests.items() if key[0] == self._epoch}

    def take(self, computing: Computing) -> Requests:
        """The requests that a lost node was computing, once."""
        return self._requests.pop((computing.epoch, computing.sequence), Requests())


def last_words(
    nodes: Sequence[NodeInfo], stages: Iterable[Stage], losses: Iterable[Loss]
) -> dict[Stage, Computing | None]:
    """What the nodes of these stages were computing when they were lost; None where nobody knows.

    Those that somebody has stopped or killed are left out.
    """
    known = {loss.member: loss for loss in losses}
    found = {stage: known.get(nodes[stage].member) for stage in stages if stage < len(nodes)}
    return {
        stage: loss.computing if loss is not None else None
        for stage, loss in found.items()
        if loss is None or not loss.from_outside
    }
