"""Compiled code is loaded when it is there, whoever has compiled it, and compiled by one node at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
import torch

from kevlarflow.node import compiled
from kevlarflow.node.compiled import FORCE_LOAD, load_or_compile


class NotInCache(Exception):
    pass


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def never() -> None:
    pytest.fail("there was nothing to compile")


def test_what_torch_has_compiled_can_finish_loading_as_vllm_asks_it_to(tmp_path: Path) -> None:
    path = str(tmp_path / "model")
    ones = torch.ones(3)
    torch.compile(double, fullgraph=True).aot_compile(((ones,), {})).save_compiled_function(path)
    outcomes = []

    def load_as_vllm_does() -> None:
        with open(path, "rb") as file:
            loaded = torch.compiler.load_compiled_function(file)
        loaded._artifacts.compiled_fn.finalize_loading(None)
        outcomes.append(loaded(ones).tolist())

    with pytest.raises(AttributeError, match="finalize_loading"):
        load_as_vllm_does()
    load_or_compile(load_as_vllm_does, never, tmp_path / "lock")
    assert outcomes == [[2.0, 2.0, 2.0]]


def test_who_finds_nothing_compiles_alone_and_for_the_largest_batch(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    did = []

    def load() -> None:
        did.append(f"load, forced: {os.environ.get(FORCE_LOAD)}")
        raise NotInCache

    def compile_all() -> None:
        did.append(f"compile, forced: {os.environ.get(FORCE_LOAD)}")
        with lock.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)

    load_or_compile(load, compile_all, lock)
    assert did == ["load, forced: 1", "load, forced: 1", "compile, forced: None"]


def test_who_has_waited_for_another_node_loads_what_it_compiled(tmp_path: Path) -> None:
    tries = []

    def load() -> None:
        tries.append(1)
        if len(tries) == 1:
            raise NotInCache

    load_or_compile(load, never, tmp_path / "lock")
    assert len(tries) == 2


def test_without_a_cache_it_is_compiled_as_vllm_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLE_COMPILE_CACHE", "1")
    did = []
    load_or_compile(never, lambda: did.append("compile"), tmp_path / "lock")
    assert did == ["compile"]
    assert compiled.FORCE_LOAD not in os.environ
