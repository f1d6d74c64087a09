"""A journal that a controller has written replays here: the same events, a fresh cluster, every invariant after each.

The lines are those of `control.journal`. A line that marks a new life of the controller begins a new cluster. Where
lines are missing, since the disk was full, nothing can be told until the next life.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from kevlarflow.config import ServeConfig
from kevlarflow.errors import UsageError
from kevlarflow.recovery.cluster import Cluster
from kevlarflow.recovery.events import AnyEvent
from kevlarflow.recovery.invariants import Invariants
from kevlarflow.sim.words import words


class Line(msgspec.Struct):
    """One line of a journal."""

    at: float
    event: AnyEvent | None = None
    start: dict[str, Any] | None = None
    lost: int = 0


def replay(lines: Iterable[bytes]) -> Iterator[str]:
    """The story of a journal, line by line.

    Raises `Violated` where an invariant does not hold, `UsageError` or `msgspec.ValidationError` when it is none.
    """
    decoder = msgspec.json.Decoder(Line)
    cluster: Cluster | None = None
    is_torn = False
    for number, raw in enumerate(lines, 1):
        try:
            line = decoder.decode(raw)
        except msgspec.DecodeError as error:
            raise UsageError(f"line {number} is no line of a journal: {error}") from error
        if line.lost:
            is_torn = True
            yield f"{line.at:12.3f} {line.lost} lines are missing: the story goes on where the controller starts again"
        elif line.start is not None:
            is_torn = False
            config = msgspec.convert(line.start.get("config"), ServeConfig)
            cluster = Cluster(config, line.start.get("unix_offset", 0.0))
            invariants = Invariants(cluster)
            yield f"{line.at:12.3f} the controller starts"
        elif line.event is not None and not is_torn:
            if cluster is None:
                raise UsageError("the journal does not begin with a start of the controller: give the older file first")
            commands = cluster.handle(line.event, line.at)
            reply = f" -> {words(commands)}" if commands else ""
            yield f"{line.at:12.3f} {words(line.event)}{reply}"
            invariants.check(commands)
    if cluster is None and not is_torn:
        raise UsageError("it is empty")
