"""What a node is computing, written where it outlives the node: a small file of its own in the run folder.

The node maps the file into its memory. A store there costs no system call, and the kernel keeps what was stored when
the process is killed; then the controller reads the file, since a request may be to blame. It holds three numbers. The
first is that of the work, 0 for none; it is stored last when work begins, and alone when it ends, so that whatever
the moment of the death, what stands there was true. While the node lives, nobody can rely on it.

`node.sockets` removes the file when the node has a successor.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from kevlarflow.types import Computing, Epoch, Member, PipelineId

SUFFIX = "computing"
SEQUENCE, PIPELINE, EPOCH = range(3)
FORMAT = struct.Struct("=3q")


def path_of(run_folder: Path, member: Member) -> Path:
    """Where the record of `member` is."""
    return run_folder / f"{member.node}-{member.incarnation}.{SUFFIX}"


def read(run_folder: Path, member: Member) -> Computing | None:
    """What a member that is dead was computing when it died; None when it has left no record."""
    try:
        sequence, pipeline, epoch = FORMAT.unpack(path_of(run_folder, member).read_bytes())
    except (OSError, struct.error):
        return None
    return Computing(PipelineId(pipeline), Epoch(epoch), sequence) if sequence else Computing()


class FlightRecorder:
    """The node's side. Raises `OSError` when the file cannot be made."""

    def __init__(self, run_folder: Path, member: Member) -> None:
        file = os.open(path_of(run_folder, member), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # Written, not only made longer: a store into a page that the disk has no room for would end the process.
            os.write(file, bytes(FORMAT.size))
            self._words = memoryview(mmap.mmap(file, FORMAT.size)).cast("q")
        finally:
            os.close(file)

    @contextlib.contextmanager
    def computing(self, pipeline: PipelineId, epoch: Epoch, sequence: int) -> Iterator[None]:
        """The body computes a step, or a chunk, whose number is negative."""
        words = self._words
        words[PIPELINE], words[EPOCH] = pipeline, epoch
        words[SEQUENCE] = sequence
        try:
            yield
        finally:
            words[SEQUENCE] = 0
