"""From what the user typed to what vLLM is started with, and every check that needs vLLM on the way.

`namespace` is vLLM's own parser over the flags that KevlarFlow does not take for itself, plus the few values that
plug KevlarFlow in: the executor class, the scheduler class, the middleware. `inspect` runs once, in the zygote,
before anything is forked: it looks for the seams of vLLM that KevlarFlow needs, refuses what is not yet safe, lets
vLLM derive its configuration, and returns what start-up wants to know about the model. Everything that is wrong
with flags or model comes to light here, as one line.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect as inspection
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.exceptions import VLLMError
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.import_utils import import_from_path
from yaml import YAMLError

from kevlarflow.config import ServeConfig
from kevlarflow.engine.unsupported import refuse_flags, refuse_model
from kevlarflow.errors import IncompatibleVllm, UsageError

SUPPORTED_VERSION = (0, 32)
MIDDLEWARE = "kevlarflow.engine.availability.AvailabilityMiddleware"
SCHEDULER = "kevlarflow.engine.scheduler.KevlarScheduler"

SEAMS = {
    "vllm.engine.arg_utils:AsyncEngineArgs.create_engine_config": ("usage_context",),
    "vllm.v1.engine.async_llm:AsyncLLM.from_vllm_config": ("vllm_config", "usage_context"),
    "vllm.entrypoints.launchers.launcher:setup_server": ("args", "reuse_port"),
    "vllm.entrypoints.launchers.launcher:validate_api_server_args": ("args",),
    "vllm.utils.import_utils:import_from_path": ("module_name", "file_path"),
    "vllm.entrypoints.launchers.api_server.entry:build_and_serve": (
        "engine_client",
        "listen_address",
        "sock",
        "args",
    ),
    "vllm.entrypoints.generate.base.serving:GenerateBaseServing._raise_if_error": (
        "self",
        "finish_reason",
        "request_id",
    ),
    "vllm.entrypoints.generate.label_reads:merge_async_iterators": ("iterators",),
    "vllm.distributed.utils:create_tcp_store": ("host", "port"),
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": ("self", "engine_core_outputs"),
    "vllm.v1.executor.abstract:Executor.execute_model": ("self", "scheduler_output", "non_block"),
    "vllm.v1.executor.abstract:Executor.sample_tokens": ("self", "grammar_output", "non_block"),
    "vllm.v1.executor.abstract:Executor.collective_rpc": ("self", "method", "timeout", "args", "kwargs"),
}
"""What KevlarFlow calls or replaces in vLLM's front half, with the parameters that it counts on."""

TAKEN = {
    "model": "--model",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "data_parallel_size": "--data-parallel-size",
    "tensor_parallel_size": "--tensor-parallel-size",
    "port": "--port",
    "host": "--host",
    "kv_cache_memory_bytes": "--kv-cache-memory-bytes",
}
"""Flags that `kevlarflow serve` takes for itself, by their name in vLLM's namespace."""


class ModelFacts(msgspec.Struct, frozen=True):
    """What the supervisor tells the user about the model."""

    layers: int
    max_model_len: int
    dtype: str
    kv_bytes_per_token: int
    """On the stage with the most layers."""
    kv_tokens: int
    """Tokens that one lane has KV memory for."""


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, which raises where it would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        advice = ": kevlarflow serve --help=all lists all flags" * message.startswith("unrecognized")
        raise UsageError(one_line(message) + advice)


def inspect(config: ServeConfig) -> ModelFacts:
    """Check vLLM, flags and model; raise one of our errors, with one line, for whatever cannot work."""
    check_vllm()
    args = namespace(config)
    _check_parsers(args)
    _import_model_class(config.model)
    try:
        vllm_config = vllm_config_of(args)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError, AssertionError) as error:
        raise UsageError(f"vLLM refuses these flags or this model: {one_line(error)}") from error
    refuse_model(vllm_config)
    return _facts(config, vllm_config)


def vllm_config_of(args: Namespace) -> VllmConfig:
    """vLLM's configuration of all engines. Its defaults depend on who asks: it is always the server."""
    # vLLM looks a parser of reasoning up in each process.
    _import_plugin("--reasoning-parser-plugin", args.reasoning_parser_plugin)
    return AsyncEngineArgs.from_cli_args(args).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def stage_config(config: ServeConfig) -> VllmConfig:
    """vLLM's configuration of one pipeline, as its workers see it: its engines are not their business."""
    vllm_config = vllm_config_of(namespace(config))
    vllm_config.parallel_config.reconfigure_for_independent_dp_rank()
    vllm_config.parallel_config.distributed_executor_backend = "mp"
    return vllm_config


def _import_model_class(folder: str) -> None:
    """Import the model's class in this process, for all forks.

    vLLM would ask a fresh interpreter about it, the first time on a machine, so as not to touch a GPU in a process
    that forks. That takes 9 s, and on a CPU there is nothing to be careful of.
    """
    if not current_platform.is_cpu():
        return
    # What is wrong with the model is vLLM's to say, in a moment.
    with contextlib.suppress(OSError, ValueError, ImportError):
        described = json.loads(Path(folder, "config.json").read_bytes())
        for architecture in described.get("architectures") or []:
            if known := ModelRegistry.models.get(architecture):
                ModelRegistry.register_model(architecture, known.load_model_cls())


def _check_parsers(args: Namespace) -> None:
    """Look for the parsers of tool calls and of reasoning: vLLM's server does so late, and ends over it."""
    _import_plugin("--tool-parser-plugin", args.tool_parser_plugin)
    _import_plugin("--reasoning-parser-plugin", args.reasoning_parser_plugin)
    # Where vLLM's check looks, --reasoning-parser is put only when the configuration is made.
    reasoning = args.reasoning_parser or args.structured_outputs_config.reasoning_parser
    checked = {**vars(args), "structured_outputs_config": Namespace(reasoning_parser=reasoning)}
    try:
        validate_api_server_args(Namespace(**checked))
    except KeyError as error:
        raise UsageError(f"vLLM refuses these flags: {one_line(error.args[0])}") from error


@functools.cache
def _import_plugin(flag: str, plugin: str | None) -> None:
    """Import a module or a file that has parsers in it, once for all forks, as `setup_server` does.

    vLLM only logs what is wrong with a file.
    """
    if not plugin or len(plugin) <= 3:
        # To vLLM a shorter one is none.
        return
    try:
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError:
            if Path(plugin).suffix != ".py":
                raise  # It may be a module that lacks another one.
            import_from_path(Path(plugin).stem, plugin)
    except Exception as error:
        # It is the user's code, and may raise anything.
        raise UsageError(f"{flag} {plugin} cannot be imported: {type(error).__name__}: {one_line(error)}") from error


def check_vllm() -> None:
    """Raise `IncompatibleVllm` unless the installed vLLM is a supported one and has every seam that is used."""
    try:
        from vllm.version import __version__, __version_tuple__
    except ImportError as error:
        raise IncompatibleVllm(f"vLLM is not installed ({error}): run make setup") from error
    if tuple(__version_tuple__[:2]) != SUPPORTED_VERSION:
        wanted = ".".join(map(str, SUPPORTED_VERSION))
        raise IncompatibleVllm(
            f"vLLM {__version__} is not supported: this KevlarFlow works with {wanted}.x; run make setup"
        )
    for seam, parameters in SEAMS.items():
        missing = set(parameters) - _parameters_of(seam, __version__)
        if missing:
            raise IncompatibleVllm(
                f"vLLM {__version__} has changed {seam} (it lacks {', '.join(sorted(missing))}), which KevlarFlow "
                "plugs into: run make setup to get the tested version"
            )


def _parameters_of(seam: str, version: str) -> set[str]:
    module, _, path = seam.partition(":")
    try:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise IncompatibleVllm(
            f"vLLM {version} has no {seam}, which KevlarFlow plugs into: run make setup to get the tested version"
        ) from error
    return set(inspection.signature(found).parameters)  # type: ignore[arg-type]


def namespace(config: ServeConfig) -> Namespace:
    """vLLM's namespace for the API server and its engines, with KevlarFlow plugged in."""
    args = _parse(config)
    refuse_flags(args)
    from kevlarflow.engine.executor import KevlarExecutor

    args.model = config.model
    if args.served_model_name is None:
        args.served_model_name = [config.served_model_name]
    args.host, args.port = config.host, config.port
    args.pipeline_parallel_size = config.stages
    args.data_parallel_size = config.pipelines
    args.tensor_parallel_size = config.ranks
    args.kv_cache_memory_bytes = config.kv_cache_memory_bytes
    # The class itself: vLLM asks it for `supports_pp` before it would resolve a name.
    args.distributed_executor_backend = KevlarExecutor
    args.scheduler_cls = SCHEDULER
    args.async_scheduling = False
    args.api_server_count = None
    # The last one is the outermost: it answers before authentication, tracing and user middleware.
    args.middleware = [*args.middleware, MIDDLEWARE]
    return args


def _parse(config: ServeConfig) -> Namespace:
    parser = make_arg_parser(_Parser(prog="kevlarflow serve"))
    defaults = parser.parse_args([])
    try:
        args: Namespace = parser.parse_args(list(config.vllm_args))
        validate_parsed_serve_args(args)
    except (ValueError, TypeError, OSError, YAMLError, VLLMError) as error:
        raise UsageError(one_line(error)) from error
    if args.model_tag is not None:
        raise UsageError(f"{args.model_tag!r} stands alone: a model comes first, as in kevlarflow serve MODEL -pp 2")
    for name, flag in TAKEN.items():
        if getattr(args, name) != getattr(defaults, name):
            raise UsageError(f"{flag} has to be written in full, on the command line of kevlarflow serve")
    return args


def _facts(config: ServeConfig, vllm_config: Any) -> ModelFacts:
    model = vllm_config.model_config
    layers = model.get_total_num_hidden_layers()
    if config.stages > layers:
        raise UsageError(
            f"-pp {config.stages} asks for more stages than {config.served_model_name} has layers ({layers}): "
            f"use -pp {layers} or less"
        )
    per_token = _kv_bytes_per_token(config, vllm_config)
    tokens = config.kv_cache_memory_bytes // per_token
    if tokens < model.max_model_len:
        needed = -(-model.max_model_len * per_token // 2**20)
        shorter = f" or --max-model-len {tokens}" * (tokens > 0)
        raise UsageError(
            f"one request of {model.max_model_len} tokens needs {needed} MiB of KV memory and a lane has "
            f"{config.kv_cache_memory_bytes // 2**20} MiB, enough for {tokens} tokens: "
            f"use --kv-cache-memory-bytes {needed}M{shorter}"
        )
    return ModelFacts(
        layers=layers,
        max_model_len=model.max_model_len,
        dtype=str(model.dtype).removeprefix("torch."),
        kv_bytes_per_token=per_token,
        kv_tokens=tokens,
    )


def _kv_bytes_per_token(config: ServeConfig, vllm_config: Any) -> int:
    """KV bytes of a token on the stage with the most layers; what a block really takes is the node's to say."""
    from vllm.distributed.utils import get_pp_indices
    from vllm.utils.torch_utils import get_kv_cache_torch_dtype

    model = vllm_config.model_config
    layers = model.get_total_num_hidden_layers()
    ranges = [get_pp_indices(layers, stage, config.stages) for stage in range(config.stages)]
    most = max(end - start for start, end in ranges)
    dtype = get_kv_cache_torch_dtype(vllm_config.cache_config.cache_dtype, model.dtype)
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    return int(most * 2 * heads * model.get_head_size() * dtype.itemsize)


def one_line(error: object) -> str:
    """The message of an error as one line; of pydantic's reports, the first complaint."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        return " ".join(filter(None, (where and f"{where}:", re.sub(r"^Value error, ", "", first["msg"]))))
    return " ".join(str(error).split())
