"""The file of vLLM's --config: flags with their values, in YAML. What was typed counts more.

vLLM opens it in every process that starts, but a cluster has one set of flags for as long as it runs. So what starts is
given a copy, and whatever becomes of the file (a ConfigMap that is updated, a folder that is tidied up) means nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from kevlarflow.errors import UsageError


def words(path: str) -> list[str]:
    """What a file says, as if it had been typed; raise `UsageError` when it cannot be read."""
    try:
        said = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(said, dict):
        raise UsageError(f"--config {path} has no flags: write one a line, such as max-model-len: 2048")
    return [word for key, value in said.items() for word in _typed(str(key), value)]


def copy(path: str, folder: str) -> str:
    """Copy a file into a folder; return the path of the copy, which ends as the file's does: vLLM looks at that."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    copied = Path(folder, "flags." + Path(path).name.rpartition(".")[2])
    copied.touch(0o600)
    copied.write_bytes(content)
    return str(copied)


def _unreadable(path: str, error: Exception) -> UsageError:
    why = getattr(error, "strerror", None) or " ".join(str(error).split())
    return UsageError(f"--config {path} cannot be read ({why}): name a YAML file of flags")


def _typed(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] * value
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
