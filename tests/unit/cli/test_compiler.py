"""Whether the machine can compile, and who is told so."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from kevlarflow.cli import compiler

PACKAGE = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"


@pytest.fixture
def headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with everything; its Python.h is here."""
    (tmp_path / "g++").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    return tmp_path


def test_who_has_everything_is_told_nothing(headers: Path) -> None:
    assert compiler.advice() == ""


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (["g++"], "the C++ compiler g++ cannot be found: install g++ ("),
        (["Python.h"], f"Python.h cannot be found: install {PACKAGE} ("),
        (["g++", "Python.h"], f"compiler g++ and Python.h cannot be found: install g++ and {PACKAGE} ("),
    ],
)
def test_what_is_missing_is_named_with_its_package(headers: Path, missing: list[str], words: str) -> None:
    for name in missing:
        (headers / name).unlink()
    assert words in compiler.advice()
    assert compiler.advice().endswith("or serve with --enforce-eager")


def test_another_compiler_is_looked_for_where_one_is_named(headers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++")
    assert "compiler clang++ (CXX) cannot be found" in compiler.advice()
    (headers / "clang++").touch(mode=0o755)
    assert compiler.advice() == ""


@pytest.mark.parametrize(
    ("words", "compiled"),
    [
        ("", True),
        ("--max-model-len 64", True),
        ("--no-enforce-eager", True),
        ("--enforce_eager", False),
        ("-O0", False),
        ("-O 3", False),
        ("-cc.mode=0", False),
        ("--optimization-level 0", False),
        ('--compilation-config {"mode":0}', False),
    ],
)
def test_who_has_thought_of_compiling_is_not_told(words: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    assert compiler.is_asked_for(words.split()) is compiled


def test_what_turns_compiling_off_in_the_file_or_the_environment_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("enforce-eager: true")
    assert not compiler.is_asked_for(["--config", str(file)])
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert not compiler.is_asked_for([])
