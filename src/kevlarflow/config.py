"""Every knob, with its unit, its default and the relations that must hold between them.

`ServeConfig` is made once by ``kevlarflow serve``, checked by `check`, written into the run folder and
read by every other process of the cluster, so that all of them agree.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from kevlarflow.errors import UsageError

RUN_FOLDER_VARIABLE = "KEVLARFLOW_RUN"
"""Environment variable that names the run folder; every process of a cluster carries it."""
RUN_ID_VARIABLE = "KEVLARFLOW_RUN_ID"
"""Environment variable with the run's random id; together they say who belongs to a cluster."""

TEMPORARY_FOLDER_VARIABLES = ("TMPDIR", "TEMP", "TMP")
TEMPORARY_FOLDERS = ("/tmp", "/var/tmp")
"""Where Python looks for a place for temporary files."""

DEFAULT_PORT = 8000

DEFAULT_SLOW_RATIO = 3.0
LEAST_SLOW_RATIO = 2.0
"""By so much the work of two steps may differ that count as equal (`kevlarflow.types.Pace`)."""
PACE_REPORTS = 5
"""What a node says of its pace is judged so many reports at a time."""

DEFAULT_REPLICATION_INTERVAL_TOKENS = 1
DEFAULT_BANDWIDTH = 128 << 20
"""Bytes a second that a node may send as copies."""

DEFAULT_REPLACEMENT_WAIT_S = 45.0
"""Seconds. A replacement is ready after 3 to 16 s, compiled after 20 s, so there is time for a second one if the first
dies; and the error comes before common proxies (nginx, load balancers) cut a connection that is silent for 60 s."""


SECRET_FLAGS = ("--api-key", "--hf-token", "--watermark-config")
"""Flags of vLLM's whose values it shows to nobody either. Some take several."""
WITHHELD = "(withheld)"
OPTION = re.compile(r"--?[A-Za-z][^ ]*$")
"""What vLLM's parser takes for a flag, not for a value."""


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """How long silence may last. See `check` for how they relate."""

    heartbeat_interval_ms: int = 100
    """How often a node beats."""
    watch_interval_ms: int = 5
    """How often the controller looks whether a local process has begun to exit, or is stopped."""
    suspect_after_ms: int = 1_000
    """Silence after which a node is suspect: nothing is moved yet. Time in which it waited for a CPU is no silence."""
    confirm_after_ms: int = 3_000
    """Silence after which a suspect is fenced (killed), and its lanes move."""
    stopped_after_ms: int = 300
    """After this long a process that is stopped (SIGSTOP, a debugger) is fenced."""
    step_floor_ms: int = 400
    """No step is overdue before it has computed nothing for this long, whatever its size."""
    stuck_after_ms: int = 100
    """A node whose step is overdue while its peers are idle is fenced after this long."""
    deaf_after_ms: int = 5_000
    """A node that beats, but does not hear the controller, is fenced after this long."""
    still_after_ms: int = 1_000
    """A pipeline whose engine waits while no node works for it is formed anew after this long; twice as long after each
    time within half a minute."""
    parted_ms: int = 60_000
    """How long a pipeline does without a node whose links to or from it broke again and again; twice as long after each
    further time within an hour."""
    engine_silent_after_ms: int = 2_000
    """An engine that has not reported for this long is shown as silent."""
    engine_lost_after_ms: int = 10_000
    """An engine that has not reported for this long is killed, so that it is started again; its requests are lost. So
    is a node that beats, and does not say to a restarted controller who it is."""
    settle_ms: int = 4_000
    """How long a restarted controller waits for nodes and engines that serve to introduce themselves before it says
    that nothing serves, fills places of which it knows nothing, or ends requests that have waited long enough."""
    controller_lost_after_ms: int = 10_000
    """A controller that has answered nothing for this long is killed by the supervisor, so that it is started again.
    One that has not spoken yet gets three times as long."""
    move_patience_ms: int = 8_000
    """How long a lane that moves though nobody died waits for its new node to hold (nearly) all of its KV, or at least
    to come nearer to it. After that it moves all the same, and more is recomputed."""
    pace_interval_ms: int = 1_000
    """How often a node says how long its steps have taken."""
    slow_after_ms: int = 10_000
    """How long a node has to be slower than its peers before its lanes move to others and it is replaced."""
    startup_timeout_s: int = 600
    """How long nodes and engines may take to get ready; compilation included."""
    report_interval_ms: int = 200
    """How often an engine reports its load."""
    stop_grace_s: int = 5
    """How long children may take to leave after SIGTERM before they are killed."""

    @property
    def pace_window_ms(self) -> int:
        """The time that the reports tell of which are judged together."""
        return PACE_REPORTS * self.pace_interval_ms


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one cluster is made of."""

    model: str
    """A Hugging Face folder or name, as vLLM takes it."""
    served_model_name: str
    host: str
    port: int
    stages: int
    """S: `-pp`."""
    pipelines: int
    """R: `-dp`."""
    ranks: int = 1
    """T: `-tp`; 1 for now."""
    kv_cache_memory_bytes: int
    """KV memory of one node, as vLLM's `--kv-cache-memory-bytes`; the pipelines that it serves share it."""
    standby_memory_bytes: int = 0
    """Host memory of each node for the replicas of other lanes; 0: no replication."""
    replication_interval_tokens: int = DEFAULT_REPLICATION_INTERVAL_TOKENS
    """Copy the tokens of a partly filled block so many at a time, in long contexts fewer; 0: copy full blocks only."""
    replication_bytes_per_second: int = DEFAULT_BANDWIDTH
    """What one node may send to its standbys: catching up must not take what decoding needs."""
    slow_ratio: float = DEFAULT_SLOW_RATIO
    """A node is slow when its steps take so many times as long as those of its peers; 0: none ever is."""
    replacement_wait_s: float = DEFAULT_REPLACEMENT_WAIT_S
    """How long requests wait for a replacement when a stage has no node left, and for more KV memory when they need
    more than their share; 0: they end at once."""
    vllm_args: tuple[str, ...] = ()
    """Flags passed through to vLLM as they were typed; without model, -pp, -dp, -tp, host and port. What --config names
    is a copy in the run folder."""
    timeouts: Timeouts = Timeouts()
    run_folder: str
    directory: str = ""
    """Where `serve` was started: relative paths among vLLM's flags begin there."""

    def path(self, name: str) -> str:
        """Path of a file or socket in the run folder."""
        return os.path.join(self.run_folder, name)

    @property
    def controller_address(self) -> str:
        """Where the controller's ROUTER socket is bound."""
        return "ipc://" + self.path("controller.sock")

    @property
    def scratch_folder(self) -> str:
        """Where temporary files are put; gone when the cluster is gone."""
        return self.path("tmp")

    @property
    def log_folder(self) -> str:
        """Where each process has its log; stands beside the run folder, and outlives it when something went wrong."""
        return self.run_folder + ".logs"

    @property
    def launcher_path(self) -> str:
        """Path of the zygote's Unix socket."""
        return self.path("launcher.sock")


def check(config: ServeConfig) -> None:
    """Raise `UsageError` for values that cannot work, and say what to write instead."""
    if config.ranks != 1:
        raise UsageError(f"-tp {config.ranks} is not supported yet: KevlarFlow serves with -tp 1 for now")
    for flag, value in (("-pp", config.stages), ("-dp", config.pipelines)):
        if value < 1:
            raise UsageError(f"{flag} {value} makes no pipeline: use {flag} 1 or more")
    if config.replication_interval_tokens < 0:
        raise UsageError(
            f"--replication-interval-tokens {config.replication_interval_tokens} is negative: use 0 (full blocks only) "
            "or more"
        )
    if config.replication_bytes_per_second < 1:
        raise UsageError(
            f"--replication-bandwidth {config.replication_bytes_per_second} copies nothing: use a number of bytes, "
            f"such as {DEFAULT_BANDWIDTH >> 20}M, or turn replication off with --standby-memory-bytes 0"
        )
    # Not a number compares as false.
    if config.slow_ratio != 0 and not config.slow_ratio > LEAST_SLOW_RATIO:
        raise UsageError(
            f"--slow-node-ratio {config.slow_ratio:g} would blame nodes for their work, which may differ by a factor "
            f"of {LEAST_SLOW_RATIO:g} between steps that are compared: use more than that, or 0 to leave slow "
            "nodes alone"
        )
    if not 0 <= config.replacement_wait_s < math.inf:
        raise UsageError(
            f"--replacement-wait {config.replacement_wait_s:g} is no bound: use a number of seconds, such as "
            f"{DEFAULT_REPLACEMENT_WAIT_S:g}, or 0 (requests end at once)"
        )
    check_timeouts(config.timeouts)


def check_timeouts(times: Timeouts) -> None:
    """Raise `UsageError` when timeouts do not relate as docs/assumptions.md says."""
    for what, smaller, larger in (
        ("2 x heartbeat_interval_ms < suspect_after_ms", 2 * times.heartbeat_interval_ms, times.suspect_after_ms),
        ("suspect_after_ms < confirm_after_ms", times.suspect_after_ms, times.confirm_after_ms),
        ("4 x watch_interval_ms < stopped_after_ms", 4 * times.watch_interval_ms, times.stopped_after_ms),
        ("2 x heartbeat_interval_ms < step_floor_ms", 2 * times.heartbeat_interval_ms, times.step_floor_ms),
        ("confirm_after_ms < deaf_after_ms", times.confirm_after_ms, times.deaf_after_ms),
        ("confirm_after_ms < settle_ms", times.confirm_after_ms, times.settle_ms),
        ("4 x report_interval_ms < engine_silent_after_ms", 4 * times.report_interval_ms, times.engine_silent_after_ms),
        ("4 x report_interval_ms < still_after_ms", 4 * times.report_interval_ms, times.still_after_ms),
        ("4 x heartbeat_interval_ms < still_after_ms", 4 * times.heartbeat_interval_ms, times.still_after_ms),
        ("still_after_ms < parted_ms", times.still_after_ms, times.parted_ms),
        ("step_floor_ms < still_after_ms", times.step_floor_ms, times.still_after_ms),
        ("engine_silent_after_ms < engine_lost_after_ms", times.engine_silent_after_ms, times.engine_lost_after_ms),
        ("settle_ms < engine_lost_after_ms", times.settle_ms, times.engine_lost_after_ms),
        ("settle_ms < controller_lost_after_ms", times.settle_ms, times.controller_lost_after_ms),
        ("heartbeat_interval_ms < pace_interval_ms", times.heartbeat_interval_ms, times.pace_interval_ms),
        (f"{PACE_REPORTS} x pace_interval_ms < slow_after_ms", times.pace_window_ms, times.slow_after_ms),
        ("confirm_after_ms < slow_after_ms", times.confirm_after_ms, times.slow_after_ms),
        ("2 x report_interval_ms < move_patience_ms", 2 * times.report_interval_ms, times.move_patience_ms),
        ("move_patience_ms < startup_timeout_s", times.move_patience_ms, 1_000 * times.startup_timeout_s),
    ):
        if not 0 < smaller < larger:
            raise UsageError(f"timeouts must satisfy {what}, but {smaller} is not less than {larger} ms (and above 0)")


def run_folder_of(port: int) -> Path:
    """The private folder of the cluster on a port: sockets and configuration. Its logs and its lock stand beside it.

    Raises `UsageError` where there is no place for it that every command finds.
    """
    base = os.environ.get("XDG_RUNTIME_DIR") or _temporary_folder()
    return Path(base) / f"kevlarflow-{os.getuid()}" / str(port)


def _temporary_folder() -> str:
    with contextlib.suppress(FileNotFoundError):
        folder = tempfile.gettempdir()
        named = filter(None, map(os.environ.get, TEMPORARY_FOLDER_VARIABLES))
        # Python takes the working folder where it can write nowhere else: that is another one for the next command.
        if folder in TEMPORARY_FOLDERS or folder in map(os.path.abspath, named) or folder != os.getcwd():
            return folder
    raise UsageError(
        f"neither {' nor '.join(TEMPORARY_FOLDERS)} can be written: set XDG_RUNTIME_DIR to a private folder that can, "
        "for all commands"
    )


def default_cache_dir() -> Path:
    """The folder under which KevlarFlow keeps what it can make again."""
    if chosen := os.environ.get("KEVLARFLOW_CACHE"):
        return Path(chosen).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser().absolute() / "kevlarflow"
    return Path.home() / ".cache" / "kevlarflow"


def save(config: ServeConfig) -> None:
    """Write the configuration into its run folder."""
    Path(config.path("config.json")).write_bytes(msgspec.json.encode(config))


def without_secrets(config: ServeConfig) -> ServeConfig:
    """The configuration as others may see it, who read a journal that somebody has copied."""
    return msgspec.structs.replace(config, vllm_args=tuple(_without_secrets(config.vllm_args)))


def _without_secrets(words: Iterable[str]) -> Iterator[str]:
    is_secret = False
    for word in words:
        if OPTION.match(word) is None:
            yield WITHHELD if is_secret else word
            continue
        name, equals, _ = word.partition("=")
        # vLLM's parser takes underscores for dashes, the beginning of a name for the name, and a key behind a dot.
        # In doubt (--watermark is a flag as well) a value is withheld.
        flag = name.partition(".")[0].replace("_", "-")
        is_secret = any(secret.startswith(flag) for secret in SECRET_FLAGS)
        yield f"{name}={WITHHELD}" if equals and is_secret else word


def load(run_folder: str | None = None) -> ServeConfig:
    """The configuration of the cluster that this process belongs to."""
    folder = run_folder or os.environ[RUN_FOLDER_VARIABLE]
    return msgspec.json.decode((Path(folder) / "config.json").read_bytes(), type=ServeConfig)
