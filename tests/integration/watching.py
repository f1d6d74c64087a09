"""What a cluster says of its replication while something else goes on."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from integration.cluster import Cluster
from kevlarflow.bench.watch import Watcher

LOOK_SECONDS = 0.05

Row = dict[str, Any]


@dataclasses.dataclass
class Seen:
    """The worst that was seen."""

    lowest_coverage: float = 1.0
    tokens_behind: float = 0.0
    """How many tokens of each running request, on average, were not on the standby."""
    most_bytes: int = 0
    """Of the lane's replicas."""
    most_dropped: int = 0
    """Replicas that there was no room for, as the node that served the lane counts them: the next one begins anew."""


@contextmanager
def watching(cluster: Cluster, pipeline: int, stage: int) -> Iterator[Seen]:
    """Look at one lane's row of the status, for the length of a block."""
    seen, over = Seen(), threading.Event()
    watcher = Watcher(cluster.run_folder)
    watcher.start()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            for row in rows(watcher.latest or {}, pipeline, stage):
                running = sum(engine["running"] for engine in watcher.latest["engines"])
                seen.lowest_coverage = min(seen.lowest_coverage, row["coverage"])
                seen.most_bytes = max(seen.most_bytes, row["bytes"])
                seen.most_dropped = max(seen.most_dropped, row["dropped"])
                seen.tokens_behind = max(seen.tokens_behind, row["lag_tokens"] / max(1, running))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
        watcher.close()


def rows(status: dict[str, Any], pipeline: int, stage: int) -> list[Row]:
    """The rows of a lane: one, or none while nothing was reported yet."""
    found = status.get("replication", ())
    return [row for row in found if (row["pipeline"], row["stage"]) == (pipeline, stage)]


def lane(cluster: Cluster, pipeline: int, stage: int) -> Row:
    """A lane's row now."""
    (row,) = rows(cluster.status(), pipeline, stage)
    return row
