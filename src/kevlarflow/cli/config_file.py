"""The file of vLLM's --config: flags with their values, in YAML. What was typed counts more."""

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
        why = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UsageError(f"--config {path} cannot be read ({why}): name a YAML file of flags") from error
    if not isinstance(said, dict):
        raise UsageError(f"--config {path} has no flags: write one a line, such as max-model-len: 2048")
    return [word for key, value in said.items() for word in _typed(str(key), value)]


def _typed(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] * value
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
