"""scripts/setup over a Python that installs nothing: what it does with what an earlier run has left."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "setup"

PYTHON = """#!/usr/bin/env bash
# Says what it is asked for. An environment that it makes has itself as Python, and a file in place of pip.
printf '%s\\n' "$*" >>"$ASKED"
case $* in
    "-m venv .venv")
        mkdir -p .venv/bin
        cp "$0" .venv/bin/python
        touch .venv/pyvenv.cfg .venv/pip ;;
    "-m pip "*)
        [[ -e .venv/pip ]] || exit 1 ;;
    "-m kevlarflow.cli.compiler")
        printf '%s' "${ADVICE:-}" ;;
esac
"""

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="setup refuses other machines")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which setup can run, with all that it asks of the machine."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SETUP, tmp_path / "scripts")
    (tmp_path / "requirements.lock").write_text("vllm==1\n")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "tools").mkdir()
    programs = {"python": PYTHON, "df": "#!/bin/sh\nprintf 'head\\n- - - 9999\\n'\n", "grep": "#!/bin/sh\n"}
    for name, text in programs.items():
        (tmp_path / "tools" / name).write_text(text)
        (tmp_path / "tools" / name).chmod(0o755)
    return tmp_path


def set_up(clone: Path, **environment: str) -> str:
    """Run it, to its end; return what it says."""
    tools = clone / "tools"
    ours = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": str(tools / "python"), "ASKED": str(clone / "asked")}
    command = ["bash", str(clone / "scripts" / "setup")]
    variables = os.environ | ours | environment
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def made(clone: Path) -> int:
    """How often an environment was made."""
    return (clone / "asked").read_text().splitlines().count("-m venv .venv")


def test_an_environment_that_works_is_kept(clone: Path) -> None:
    set_up(clone)
    (clone / "requirements.lock").write_text("vllm==2\n")
    assert "creating .venv" not in set_up(clone)
    assert made(clone) == 1


def test_an_environment_that_an_interrupt_has_left_without_pip_is_made_again(clone: Path) -> None:
    set_up(clone)
    (clone / ".venv" / ".kevlarflow-setup").unlink()
    (clone / ".venv" / "pip").unlink()
    (clone / ".venv" / "half-a-package").touch()
    assert "pip of .venv does not work (was an earlier setup interrupted?): making .venv again" in set_up(clone)
    assert made(clone) == 2
    assert not (clone / ".venv" / "half-a-package").exists()
    # Whoever else waits for the lock has this very file open.
    assert (clone / ".venv" / ".setup.lock").exists()


def test_what_compiling_lacks_is_a_warning_and_no_error(clone: Path) -> None:
    assert "warning" not in set_up(clone)
    (clone / "requirements.lock").write_text("vllm==2\n")
    said = set_up(clone, ADVICE="g++ cannot be found")
    assert "\nsetup: warning: g++ cannot be found; make demo does not need it\n" in said
