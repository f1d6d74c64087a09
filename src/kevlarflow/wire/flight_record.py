"""What a node is computing, written where it outlives the node: a small file of its own in the run folder.

The node maps the file into its memory. A store there costs no system call, and the kernel keeps what was stored when
the process is killed; then the controller reads the file, since a request may be to blame. It holds three numbers. The
first is that of the work, 0 for none; it is stored last when work begins, and alone when it ends, so that whatever
the moment of the death, what stands there was true. While the node lives, nobody can rely on it.

`node.sockets` removes the file when the node has a successor.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from kevlarflow.types import Computing, Epoch, Member, PipelineId

log = logging.getLogger(__name__)

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
    """The node's side. Where the disk has no room for the record there is none, and the node serves all the same."""

    def __init__(self, run_folder: Path, member: Member) -> None:
        try:
            memory = _map(path_of(run_folder, member))
        except OSError as error:
            log.warning("%s has no flight record: %s", member, error)
            memory = mmap.mmap(-1, FORMAT.size)
        self._words = memoryview(memory).cast("q")

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


def _map(path: Path) -> mmap.mmap:
    """A new file in our memory. Raises `OSError`, and leaves no record, when the disk does not take it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        # Written, not only made longer: a store into a page that the disk has no room for would end the process.
        if os.write(file, bytes(FORMAT.size)) < FORMAT.size:
            os.ftruncate(file, 0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return mmap.mmap(file, FORMAT.size)
    finally:
        os.close(file)
