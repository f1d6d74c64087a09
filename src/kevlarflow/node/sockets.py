"""The files in the run folder under which a node can be reached, and those that its former lives have left there.

A process that is killed cannot remove its sockets' files, nor its flight record (`wire.flight_record`). Its successor
in the same place does: by then the life before has been declared dead, its record has been read, and whoever bears an
older number is never connected to again.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from kevlarflow.types import Member
from kevlarflow.wire import flight_record


class Sockets(NamedTuple):
    """Paths of a member's sockets."""

    steps: Path
    """What engines send."""
    activations: Path
    """What the stage before sends."""
    replicas: Path
    """What the nodes send whose standby this is."""

    @classmethod
    def of(cls, run_folder: Path, member: Member) -> Sockets:
        """Those of `member`, whether they exist or not."""
        return cls(*(run_folder / f"{member.node}-{member.incarnation}.{field}" for field in cls._fields))


def remove_of_former_lives(run_folder: Path, member: Member) -> None:
    """Remove what earlier incarnations of `member` have left."""
    for field in (*Sockets._fields, flight_record.SUFFIX):
        for path in run_folder.glob(f"{member.node}-*.{field}"):
            incarnation = path.stem.removeprefix(f"{member.node}-")
            if incarnation.isdecimal() and int(incarnation) < member.incarnation:
                path.unlink(missing_ok=True)
