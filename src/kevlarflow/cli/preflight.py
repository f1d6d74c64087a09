"""Before anything is started: can this work at all, and with how much KV memory?

Only what a look at files, ports and memory can tell, in a moment; what needs vLLM is checked by the zygote. The sum
for memory is deliberately simple and on the safe side, and each of its terms was measured.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from kevlarflow.cli.model_files import ModelFiles
from kevlarflow.command_line import LAST_PORT
from kevlarflow.errors import NotEnoughMemory, UsageError

CGROUPS = Path("/sys/fs/cgroup")
OUR_CGROUPS = Path("/proc/self/cgroup")
MIB = 2**20
GIB = 2**30

NODE_BYTES = 450 * MIB
"""What a node takes besides weights and KV: activations, buffers, its unshared part of the zygote's pages."""
ENGINE_BYTES = 250 * MIB
"""What an engine takes; it holds no weights."""
FIXED_BYTES = 1200 * MIB
"""The zygote, the API server with its tokenizer, the controller."""
LARGEST_DEFAULT_KV_BYTES = GIB
SMALLEST_DEFAULT_KV_BYTES = 64 * MIB
DEFAULT_SHARE = 0.7
"""How much of the free memory a cluster takes when nobody says how much KV memory it should have."""


class Size(msgspec.Struct, frozen=True):
    """What a cluster is to consist of."""

    stages: int
    pipelines: int
    weight_bytes: int
    """Of one whole pipeline, in the type it computes with."""

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return self.stages * self.pipelines

    @property
    def bytes_without_kv(self) -> int:
        """What everything but KV takes."""
        per_pipeline = self.weight_bytes + self.stages * NODE_BYTES + ENGINE_BYTES
        return FIXED_BYTES + self.pipelines * per_pipeline


def check_layers(stages: int, files: ModelFiles) -> None:
    """Raise `UsageError` when there are more stages than layers."""
    if files.layers is not None and stages > files.layers:
        raise UsageError(
            f"-pp {stages} asks for more stages than the model has layers ({files.layers}): "
            f"use -pp {files.layers} or less"
        )


def loaded_bytes(files: ModelFiles, dtype: str | None) -> int:
    """Bytes of the weights in memory: on disk they may be half as wide."""
    wide = dtype in {"float", "float32"}
    return files.weight_bytes * 4 // files.bytes_per_weight if wide else files.weight_bytes


def choose_kv_bytes(size: Size, available: int) -> int:
    """KV bytes of a lane when nobody asked for a size; raise `NotEnoughMemory` when there is too little for any."""
    budget = int(available * DEFAULT_SHARE) - size.bytes_without_kv
    chosen = min(LARGEST_DEFAULT_KV_BYTES, budget // size.nodes) // MIB * MIB
    if chosen < SMALLEST_DEFAULT_KV_BYTES:
        needed = int((size.bytes_without_kv + size.nodes * SMALLEST_DEFAULT_KV_BYTES) / DEFAULT_SHARE)
        raise NotEnoughMemory(_too_little(size, needed, available))
    return chosen


def check_memory(size: Size, kv_bytes: int, available: int, standby_bytes: int = 0) -> None:
    """Raise `NotEnoughMemory` when the cluster cannot fit. `standby_bytes` is each node's memory for replicas."""
    without_standby = size.bytes_without_kv + size.nodes * kv_bytes
    needed = without_standby + size.nodes * standby_bytes
    if needed > available >= without_standby:
        most = (available - without_standby) // size.nodes
        raise NotEnoughMemory(
            f"{size.nodes} nodes with {gib(standby_bytes)} for replicas each need {gib(needed)} of memory and "
            f"{gib(available)} are free: use --standby-memory-bytes {most // MIB}M or less, or 0 for no replication"
        )
    if needed > available:
        flags = ["--kv-cache-memory-bytes", *["--standby-memory-bytes"] * (standby_bytes > 0)]
        raise NotEnoughMemory(_too_little(size, needed, available, flags))


def choose_standby_bytes(size: Size, kv_bytes: int, available: int) -> int:
    """Memory of a node for replicas when nobody asked for a size: a lane's worth, or less where there is less; 0: none.

    With one pipeline nobody could take over, so there is nothing to replicate for.
    """
    if size.pipelines == 1:
        return 0
    left = available - size.bytes_without_kv - size.nodes * kv_bytes
    return max(0, min(kv_bytes, left // (2 * size.nodes))) // MIB * MIB


def _too_little(size: Size, needed: int, available: int, flags: Sequence[str] = ()) -> str:
    nodes = "1 node needs" if size.nodes == 1 else f"{size.nodes} nodes need"
    lower = ["-dp", *flags] if size.pipelines > 1 else flags
    advice = f"lower {', '.join(lower)}" if lower else "use a smaller model"
    return f"{nodes} {gib(needed)} of memory and {gib(available)} are free: {advice}"


def available_memory() -> int:
    """Bytes that can be had without swapping: of the machine, or of the container or unit if that is less."""
    meminfo = Path("/proc/meminfo").read_text()
    machine = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    container = left_in_groups(CGROUPS, OUR_CGROUPS.read_text() if OUR_CGROUPS.exists() else "")
    return machine if container is None else min(machine, container)


class _Accounts(NamedTuple):
    """What the files of a cgroup are called."""

    limit: str
    used: str
    files: str
    """The row of memory.stat that the kernel would give back."""


_VERSION_2 = _Accounts("memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Accounts("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def left_in_groups(mount: Path, ours: str) -> int | None:
    """Bytes that the limits of cgroups leave, of version 2 or 1; None when there is no limit.

    `ours` is /proc/self/cgroup. A limit holds for all that is below it, and is shared by all of that.
    """
    left = [_left_in(mount, _VERSION_2), _left_in(mount / "memory", _VERSION_1)]
    for line in ours.splitlines():
        _, controllers, place = line.split(":", 2)
        if not controllers:
            # On its own, or beside those of version 1.
            roots, accounts = [mount, mount / "unified"], _VERSION_2
        elif "memory" in controllers.split(","):
            roots, accounts = [mount / "memory", mount / controllers], _VERSION_1
        else:
            continue
        # Where only a part of the hierarchy is mounted, as in many containers, that part's root is ours.
        for folder in (root / place.lstrip("/") for root in roots):
            left += [_left_in(each, accounts) for each in (folder, *folder.parents) if each.is_relative_to(mount)]
    return min((each for each in left if each is not None), default=None)


def _left_in(folder: Path, accounts: _Accounts) -> int | None:
    """What the kernel keeps of files, and would give back, is not used."""
    try:
        most, now = int((folder / accounts.limit).read_text()), int((folder / accounts.used).read_text())
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        idle = sum(int(value) for name, value in rows if name == accounts.files)
    except (OSError, ValueError):
        return None
    return max(0, most - now + idle)


def check_port(host: str, port: int) -> None:
    """Raise `UsageError` when the API server could not listen there."""
    if not 0 < port <= LAST_PORT:
        raise UsageError(f"--port {port} is no port: use 1 to {LAST_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise UsageError(_cannot_listen(host, port, error)) from error


def _cannot_listen(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use{_owner_of(port)}: choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges: choose one above 1023 with --port"
    return f"cannot listen on {host} port {port} ({error.strerror}): change --host or --port"


def _owner_of(port: int) -> str:
    import psutil

    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None or connection.pid == os.getpid():
                    continue
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        pass
    return ""


def gib(number: int) -> str:
    """A number of bytes, for people."""
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number // MIB} MiB"
