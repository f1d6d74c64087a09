"""KV memory and headers for tests of replication."""

from kevlarflow.node.thread_clock import ThreadClock
from kevlarflow.replication.standby import Bounds
from kevlarflow.types import Member, NodeInfo
from kevlarflow.wire import replicas

BLOCK_SIZE = 4
BOUNDS = Bounds(pipelines=2, blocks=100, block_size=BLOCK_SIZE, block_bytes=8, token_bytes=2)


class Memory:
    """KV memory of 8-byte blocks."""

    block_bytes = BOUNDS.block_bytes
    token_bytes = BOUNDS.token_bytes

    def __init__(self):
        self.blocks = {}
        self.backed = []

    def read(self, block, into):
        into[:] = self.blocks.get(block, bytes(8))

    def read_tokens(self, block, start, end, into):
        into[:] = self.blocks.get(block, bytes(8))[2 * start : 2 * end]

    def merge_tokens(self, data, start, end, into):
        into[2 * start : 2 * end] = data

    def write(self, copies):
        self.blocks.update((block, bytes(data)) for block, data in copies)

    def populate(self, block):
        self.backed.append(block)
        return True


def standby_info(address, name="b"):
    return NodeInfo(Member(name, 1), 0, "here", 1, (1,), "", "", 2, 50, address)


def header(payload=b"12345678", copies=None, **changes):
    """Of a message; `changes` of its fields, or of its one copy."""
    copy = {"block": 1, "generation": 1, "start": 0, "filled": 4, "depth": 0}
    copy |= {name: changes.pop(name) for name in [*changes] if name in replicas.Copy.__struct_fields__}
    copies = (replicas.Copy(**copy),) if copies is None else copies
    fields = {
        "number": 1, "pipeline": 0, "epoch": 5, "stage": 0, "copies": copies,
        "length": len(payload), "checksum": 0,
    } | changes  # fmt: skip
    message = replicas.Store(**fields)
    return replicas.encode(message) if "checksum" in changes else replicas.seal(message, memoryview(payload))


NO_MESSAGES = {
    "bytes": b"\xff\x00nonsense",
    "bad UTF-8 in a tag": replicas.encode(replicas.Closed("why")).replace(b"Closed", b"Close\xff"),
    "lists in lists": b"\x82\xa4type\xa5Store\xa4junk" + b"\x91" * 5_000 + b"\xc0",
}
"""What no peer sends."""


def content(store, pipeline, replica):
    """What a store has of exactly this content, or None."""
    found, _ = store.find(pipeline, [replica])
    return bytes(found[0][1]) if found else None


def asleep(clock: ThreadClock) -> float:
    """Seconds of a thread that went neither into computing nor into waiting for a CPU."""
    spent = clock.spent()
    return spent.at - spent.computing - spent.waiting
