"""What compiling needs from the machine: without --enforce-eager, torch writes C++ for each stage and has it compiled.

That needs a compiler and the headers of this Python, which fresh machines lack, and nodes would say so only minutes
later, in their logs. Whether a model is compiled at all is vLLM's to say (some are not), so this is advice and refuses
nothing. `scripts/setup` gives it as well: run as a program, this file prints it.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from kevlarflow.cli.flags import words_of_file
from kevlarflow.cli.vllm_flags import options

SAY_HOW = ("--enforce-eager", "--compilation-config", "-cc", "--optimization-level", "-O")
"""Flags by which somebody has decided whether to compile."""


def advice() -> str:
    """What is missing, and what to do; empty when nothing is."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    compiler = os.environ.get("CXX", "g++")
    missing = {}
    if shutil.which(compiler) is None:
        missing[f"the C++ compiler {compiler}{' (CXX)' * ('CXX' in os.environ)}"] = "g++"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing["Python.h"] = f"{python}-dev"
    if not missing:
        return ""
    return (
        f"torch compiles the model, and {' and '.join(missing)} cannot be found: install "
        f"{' and '.join(missing.values())} (as Debian calls them), or serve with --enforce-eager"
    )


def is_asked_for(vllm_args: list[str]) -> bool:
    """Whether vLLM compiles what it can, by these flags and by the environment."""
    words = [*vllm_args, *words_of_file(vllm_args)]
    says_how = any(name.startswith(SAY_HOW) for name in options(words))
    return not says_how and os.environ.get("TORCH_COMPILE_DISABLE") != "1"


if __name__ == "__main__":
    print(advice(), end="")
