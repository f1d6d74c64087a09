"""Compiled code of a stage: taken from vLLM's cache where it is there, else compiled by one node for all of its stage.

vLLM keeps what it compiles on disk. Two things about that are made good here. vLLM 0.32 asks whatever it loads from
that cache to finish loading, which only code of its own compiler backend can; on the CPU it compiles with torch's, so
that each load fails and each start compiles everything again. And after a load it still runs the largest batch that is
allowed, for a memory profile that the CPU makes no use of: a few seconds a node.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import vllm.envs as envs

log = logging.getLogger(__name__)

FORCE_LOAD = "VLLM_FORCE_AOT_LOAD"


def load_or_compile(run_a_little: Callable[[], object], compile_all: Callable[[], object], lock: Path) -> None:
    """Leave a stage compiled. `run_a_little` runs the model on a small batch, `compile_all` does what vLLM would do.

    Who finds nothing to load takes the lock, a file that all nodes of the stage share, and looks again: another node
    may have compiled by then.
    """
    with _loads_succeed():
        if _loads(run_a_little):
            return
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _loads(run_a_little):
                compile_all()


def _loads(run_a_little: Callable[[], object]) -> bool:
    """Whether the model runs with code from the cache."""
    if not envs.VLLM_USE_AOT_COMPILE or envs.VLLM_DISABLE_COMPILE_CACHE:
        return False
    before = os.environ.get(FORCE_LOAD)
    # A small batch must not be what the code is compiled for.
    os.environ[FORCE_LOAD] = "1"
    try:
        run_a_little()
    except Exception as reason:
        log.info("no compiled code is loaded: %s", reason)
        return False
    finally:
        del os.environ[FORCE_LOAD]
        if before is not None:
            os.environ[FORCE_LOAD] = before
    return True


@contextmanager
def _loads_succeed() -> Iterator[None]:
    load = torch.compiler.load_compiled_function

    def load_completely(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda _: None  # All of it is there.
        return loaded

    torch.compiler.load_compiled_function = load_completely
    try:
        yield
    finally:
        torch.compiler.load_compiled_function = load
