"""What the files of a model say, read without any library: is it there, how many layers, how many bytes.

MODEL is a folder, or a Hugging Face name. A name is looked up in the local cache, where ``vllm serve`` and
``hf download`` put what they fetch, and fetched into it when it is missing: once, here, and not by every node.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgspec

from kevlarflow.errors import ModelUnavailable

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
BYTES_PER_WEIGHT = {"float32": 4, "float16": 2, "bfloat16": 2}
HUGGING_FACE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LONGEST_REASON = 100
"""Characters of Hugging Face's message that are shown: it begins with the reason and goes on with advice."""
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
skipped = ["*.bin", "*.pt", "*.pth", "original/*", "*.gguf", "*.onnx*", "*.msgpack", "*.h5"]
name, revision, cache = sys.argv[1:]
try:
    snapshot_download(name, revision=revision or None, cache_dir=cache or None, ignore_patterns=skipped)
except Exception as error:
    sys.exit(print(" ".join(str(error).split())) or 1)
"""


class ModelFiles(msgspec.Struct, frozen=True):
    """A model on the local disk."""

    folder: Path
    layers: int | None
    """None when config.json does not say so in a way that is known here."""
    weight_bytes: int
    """Of all weights together, as they lie on the disk."""
    bytes_per_weight: int
    """2 unless config.json says float32."""


def find(model: str, revision: str | None = None, download_dir: str | None = None) -> ModelFiles:
    """Return what is known about a model; raise `ModelUnavailable` when it cannot be served."""
    if Path(model).expanduser().is_dir():
        return examine(Path(model).expanduser().absolute())
    if model.startswith((".", "~")) or not HUGGING_FACE_NAME.fullmatch(model):
        raise ModelUnavailable(
            f"there is no model {model}: name a folder with config.json and weights, or a Hugging Face model "
            "as owner/name"
        )
    folder = cached(model, revision, download_dir)
    if folder is None:
        download(model, revision, download_dir)
        folder = cached(model, revision, download_dir)
    if folder is None:
        raise ModelUnavailable(f"{model} was fetched and is not in the cache: pass its folder instead")
    return examine(folder)


def examine(folder: Path) -> ModelFiles:
    """Read a model's folder."""
    try:
        described: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelUnavailable(
            f"{folder} has no config.json: MODEL is a folder in Hugging Face form, or a Hugging Face name"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{folder / 'config.json'} cannot be read ({error}): fetch the model again") from error
    if not isinstance(described, dict):
        raise ModelUnavailable(f"{folder / 'config.json'} is no description of a model: fetch the model again")
    for pattern in WEIGHT_PATTERNS:
        if weights := [path for path in folder.glob(pattern) if path.is_file()]:
            break
    else:
        raise ModelUnavailable(f"{folder} has no weights (*.safetensors): fetch the model again, or name another")
    text = described.get("text_config") or described
    layers = next((text[key] for key in LAYER_KEYS if isinstance(text.get(key), int)), None)
    stored = str(described.get("dtype") or described.get("torch_dtype") or "")
    return ModelFiles(
        folder=folder,
        layers=layers,
        weight_bytes=sum(path.stat().st_size for path in weights),
        bytes_per_weight=BYTES_PER_WEIGHT.get(stored, 2),
    )


def cached(name: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Return the folder of a Hugging Face model in the local cache, if its configuration is there."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(download_dir or os.environ.get("HF_HUB_CACHE") or home / "hub")
    place = cache / ("models--" + name.replace("/", "--"))
    reference = place / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else (revision or "")
    folder = place / "snapshots" / commit
    return folder if commit and (folder / "config.json").is_file() else None


def download(name: str, revision: str | None, download_dir: str | None) -> None:
    """Fetch a model into the cache, in a child process, with Hugging Face's own progress bars."""
    advice = f"check the name, run hf download {name} where there is a network, or name a folder"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        raise ModelUnavailable(f"{name} is not in the local cache and HF_HUB_OFFLINE is set: {advice}")
    command = [sys.executable, "-c", DOWNLOAD, name, revision or "", download_dir or ""]
    # Progress goes to the terminal by standard error; standard output is for what went wrong.
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode != 0:
        why = textwrap.shorten(child.stdout, LONGEST_REASON, placeholder=" ...")
        raise ModelUnavailable(f"{name} is not in the local cache and cannot be fetched ({why}): {advice}")
