"""What a server and its cluster say of KV memory: blocks and copies. Pure readings, but for one request."""

from __future__ import annotations

import http.client
import re
from typing import NamedTuple

from kevlarflow.bench.streams import Address
from kevlarflow.bench.systems import SystemFailed
from kevlarflow.bench.watch import StatusDocument


class KvCache(NamedTuple):
    """The KV memory of one engine."""

    blocks: int
    """That the scheduler sees."""
    block_size: int
    """Tokens of one."""


class Sent(NamedTuple):
    """Bytes that all nodes have copied to their standbys so far."""

    full: int
    partial: int


def read_page(address: Address, path: str) -> str:
    """The body of a page. Raises `SystemFailed` when it is not served."""
    connection = http.client.HTTPConnection(*address, timeout=20.0)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise SystemFailed(f"{path} was not served: {error}") from error
    finally:
        connection.close()


def kv_cache(page: str, engines: int) -> KvCache:
    """What vLLM's own metrics say of the KV memory of one of so many engines: vLLM tells the sum of their blocks."""
    found = re.findall(r"^vllm:cache_config_info\{(.*)\} ", page, re.MULTILINE)
    if not found:
        raise SystemFailed("/metrics does not tell the number of KV blocks (vllm:cache_config_info)")
    return KvCache(_label(found[0], "num_gpu_blocks") // engines, _label(found[0], "block_size"))


def _label(labels: str, name: str) -> int:
    match = re.search(rf'\b{name}="(\d+)"', labels)
    if match is None:
        raise SystemFailed(f"/metrics does not tell {name}")
    return int(match[1])


def counted(page: str, name: str) -> int:
    """Sum of a counter of vLLM's over the engines."""
    values = re.findall(rf"^{re.escape(name)}(?:_total)?(?:\{{.*\}})? (\S+)$", page, re.MULTILINE)
    return round(sum(map(float, values)))


def sent(status: StatusDocument) -> Sent:
    """What has been copied, over all lanes."""
    rows = status["replication"]
    return Sent(sum(row["full_block_bytes_sent"] for row in rows), sum(row["partial_block_bytes_sent"] for row in rows))


def lag_tokens(status: StatusDocument, pipeline: int, stage: int) -> int | None:
    """Live tokens of a lane that its standby does not have; None while there is no standby."""
    for row in status["replication"]:
        if (row["pipeline"], row["stage"]) == (pipeline, stage) and row["standby"] is not None:
            return int(row["lag_tokens"])
    return None


def fullest_standby(status: StatusDocument) -> int:
    """Bytes of replicas on the standby that holds most."""
    held: dict[str, int] = {}
    for row in status["replication"]:
        if row["standby"] is not None:
            held[row["standby"]] = held.get(row["standby"], 0) + row["bytes"]
    return max(held.values(), default=0)
