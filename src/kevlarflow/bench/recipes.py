"""The two systems that are compared today: stock vLLM's own server, and KevlarFlow, with the same flags.

Stock vLLM is ``vllm serve``, unchanged. Two things have to be put beside it, in a folder that its Python finds:

* the CPU wheel ships no metadata under the name ``vllm``, without which ``vllm serve`` ends at once: the metadata;
* with ``--enforce-eager`` and more than one stage, its CPU model runner never makes the buffer for what comes from
  the stage before (``assert self.intermediate_tensors is not None``): a worker extension, through vLLM's public
  ``--worker-extension-cls``, that makes it at its first use. Compiled, stock needs none and gets none.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kevlarflow.bench.systems import HOST, SAME_FOR_ALL, ServerProcess
from kevlarflow.default_model import DEFAULT_MODEL_NAME, ensure_default_model

STOCK = "stock vLLM"
KEVLARFLOW = "KevlarFlow"
NAMES = (STOCK, KEVLARFLOW)
REMEDY_NOTE = (
    "Stock vLLM runs eagerly with a one-line remedy (a worker extension that makes the buffer between stages): "
    "without it `--enforce-eager` with more than one stage fails on the CPU."
)

LONGEST_SOCKET_PATH = 107
"""Linux'."""
LONGEST_SOCKET_NAME = 1 + 36
"""vLLM's: a slash and a UUID."""
METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"
REMEDY = '''\
"""Makes the buffer between stages that vLLM's eager CPU runner lacks; imported in workers only."""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner

original = GPUModelRunner.sync_and_gather_intermediate_tensors


def with_buffer(self, *args, **kwargs):
    if self.intermediate_tensors is None:
        self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
            batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
        )
    return original(self, *args, **kwargs)


GPUModelRunner.sync_and_gather_intermediate_tensors = with_buffer


class Remedy:
    """vLLM wants a class; the deed was done above."""
'''


class Recipe(msgspec.Struct, frozen=True):
    """What both systems are started with."""

    model: str | None = None
    """None is KevlarFlow's default model."""
    stages: int = 2
    pipelines: int = 2
    eager: bool = False
    dtype: str | None = None
    max_model_len: int = 2048
    kv_cache_memory_bytes: int = 512 * 2**20
    """Of one pipeline on one node."""
    extra: tuple[str, ...] = ()
    """Further flags of ``vllm serve``."""
    ours: tuple[str, ...] = ()
    """Further flags that only KevlarFlow gets."""

    @property
    def served_name(self) -> str:
        """The model's name in requests."""
        return self.model or DEFAULT_MODEL_NAME

    def flags(self) -> list[str]:
        """The flags that both get, word for word."""
        flags = [
            *("-pp", str(self.stages), "-dp", str(self.pipelines)),
            *("--max-model-len", str(self.max_model_len), "--seed", "0"),
            *("--kv-cache-memory-bytes", str(self.kv_cache_memory_bytes)),
        ]
        flags += ["--enforce-eager"] * self.eager
        flags += ["--dtype", self.dtype] if self.dtype else []
        return [*flags, *self.extra]


def make(name: str, recipe: Recipe, folder: Path, caches: Path | None = None) -> ServerProcess:
    """A system by its name. Logs go to `folder`, and what it compiles to `caches`, or to where it always goes."""
    environment = dict(SAME_FOR_ALL)
    if caches is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(caches / "inductor")
        environment["VLLM_CACHE_ROOT"] = str(caches / "vllm")
    if name == KEVLARFLOW:
        return kevlarflow(recipe, environment, folder)
    return stock_vllm(recipe, environment, folder)


def own_caches(folder: Path, name: str) -> Path:
    """A folder for what one system compiles: systems must not warm each other."""
    return folder / "caches" / name.replace(" ", "-").lower()


def kevlarflow(
    recipe: Recipe, environment: dict[str, str], folder: Path, own_flags: Sequence[str] = ()
) -> ServerProcess:
    """KevlarFlow, as ``kevlarflow serve`` starts it; `own_flags` are those that stock vLLM does not have."""
    model = [recipe.model] if recipe.model else []

    def command(port: int) -> list[str]:
        serve = [sys.executable, "-m", "kevlarflow.cli.main", "serve", *model]
        return [*serve, "--host", HOST, "--port", str(port), *recipe.flags(), *recipe.ours, *own_flags]

    return ServerProcess(KEVLARFLOW, recipe.served_name, command, environment, folder / "kevlarflow.log")


def stock_vllm(
    recipe: Recipe, environment: dict[str, str], folder: Path, port: int | None = None, name: str = STOCK
) -> ServerProcess:
    """Stock vLLM, as ``vllm serve`` starts it. A PYTHONPATH in `environment` comes behind what it needs itself."""
    shim = _write_shim(folder)
    # A Hugging Face name is left to vLLM.
    model = recipe.model or str(ensure_default_model())
    remedy = ["--worker-extension-cls", "kevlarflow_bench_remedy.Remedy"] * (recipe.eager and recipe.stages > 1)

    def command(port: int) -> list[str]:
        serve = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
        named = ["--served-model-name", recipe.served_name, "--host", HOST, "--port", str(port)]
        return [*serve, *named, *recipe.flags(), *remedy]

    path = os.pathsep.join(filter(None, (str(shim), environment.get("PYTHONPATH"))))
    completed = environment | {"PYTHONPATH": path, "VLLM_RPC_BASE_PATH": str(_sockets(folder))}
    log = folder / f"{name.replace(' ', '-').lower()}.log"
    return ServerProcess(name, recipe.served_name, command, completed, log, port)


def _sockets(folder: Path) -> Path:
    """Where stock vLLM's sockets go: to its folder, or, where their names would be too long for the kernel, to /tmp."""
    if len(str(folder)) + LONGEST_SOCKET_NAME < LONGEST_SOCKET_PATH:
        return folder
    short = Path(tempfile.mkdtemp(prefix="kevlarflow-bench-"))
    atexit.register(shutil.rmtree, short, ignore_errors=True)
    return short


def _write_shim(folder: Path) -> Path:
    """Write what has to stand beside stock vLLM; see the module's text."""
    shim = folder / "stock"
    metadata = shim / "vllm-0.32.0+cpu.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(METADATA)
    (shim / "kevlarflow_bench_remedy.py").write_text(REMEDY)
    return shim
