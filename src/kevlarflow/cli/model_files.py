"""What the files of a model say, read without any library: is it there, how many layers, how many bytes.

MODEL is a folder, or a Hugging Face name. A name is looked up in the local cache, where ``vllm serve`` and
``hf download`` put what they fetch, and fetched into it when it is missing: once, here, and not by every node.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from kevlarflow.errors import ModelUnavailable
from kevlarflow.kinship import die_with_parent

WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
BYTES_PER_WEIGHT = {"float32": 4, "float16": 2, "bfloat16": 2}
HUGGING_FACE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
LONGEST_REASON = 100
"""Characters of Hugging Face's message that are shown: it begins with the reason and goes on with advice."""
INDEX = "model.safetensors.index.json"
"""Names the files of the weights, where there are several."""
CONSOLIDATED = "consolidated*"
"""Some repositories hold the weights a second time, in another form."""
NO_WEIGHTS = ("*.pth", "original/*", "*.gguf", "*.onnx*", "*.msgpack", "*.h5")
DOWNLOAD = """
import sys
from huggingface_hub import HfApi, snapshot_download
from kevlarflow.cli.model_files import unneeded
name, revision, cache = sys.argv[1:]
try:
    skipped = unneeded(HfApi().list_repo_files(name, revision=revision or None))
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


def find(
    model: str, revision: str | None = None, download_dir: str | None = None, token: str | None = None
) -> ModelFiles:
    """Return what is known about a model; raise `ModelUnavailable` when it cannot be served.

    `token` is Hugging Face's, for a model that not everybody may fetch.
    """
    try:
        return _find(model, revision, download_dir, token)
    except OSError as error:
        # Whether something is there cannot be told where a folder above it may not be searched.
        what = error.filename or model
        raise ModelUnavailable(
            f"{what} cannot be read ({error.strerror}): let this user read it, or name another model"
        ) from error


def _find(model: str, revision: str | None, download_dir: str | None, token: str | None) -> ModelFiles:
    named = Path(os.path.expanduser(model))
    if named.is_dir():
        return examine(named.absolute())
    if model.startswith((".", "~")) or not HUGGING_FACE_NAME.fullmatch(model):
        raise ModelUnavailable(
            f"there is no model {model}: name a folder with config.json and weights, or a Hugging Face model "
            "as owner/name"
        )
    folder = cached(model, revision, download_dir)
    if folder is None or not is_whole(folder):
        # What was fetched before it was broken off is not fetched again.
        download(model, revision, download_dir, token)
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
    weights = weight_files(folder)
    if not weights:
        raise ModelUnavailable(f"{folder} has no weights (*.safetensors): fetch the model again, or name another")
    if missing := [path.name for path in weights if not path.is_file()]:
        raise ModelUnavailable(
            f"{folder} lacks {len(missing)} of {len(weights)} files of weights ({missing[0]}): fetch the model again"
        )
    text = described.get("text_config") or described
    layers = next((text[key] for key in LAYER_KEYS if isinstance(text.get(key), int)), None)
    stored = str(described.get("dtype") or described.get("torch_dtype") or "")
    return ModelFiles(
        folder=folder,
        layers=layers,
        weight_bytes=sum(path.stat().st_size for path in weights),
        bytes_per_weight=BYTES_PER_WEIGHT.get(stored, 2),
    )


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, each weight once; those that an index names may be missing."""
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            return [folder / name for name in sorted(set(index["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelUnavailable(f"{folder / INDEX} cannot be read ({error}): fetch the model again") from error
    for pattern in WEIGHT_PATTERNS:
        found = [path for path in folder.glob(pattern) if path.is_file()]
        if once := [path for path in found if not path.match(CONSOLIDATED)] or found:
            return once
    return []


def is_whole(folder: Path) -> bool:
    """Whether the weights are there, as far as can be told."""
    weights = weight_files(folder)
    return bool(weights) and all(path.is_file() for path in weights)


def unneeded(files: Sequence[str]) -> list[str]:
    """Patterns of what need not be fetched of a repository: weights in other forms than vLLM's first choice."""
    tensors = [name for name in files if name.endswith(".safetensors") and "/" not in name]
    again = [CONSOLIDATED] if any(not name.startswith(CONSOLIDATED.rstrip("*")) for name in tensors) else []
    return [*NO_WEIGHTS, *(["*.bin", "*.pt"] if tensors else []), *again]


def cache_folder() -> Path:
    """Where Hugging Face's library keeps what it has fetched, by the same variables; without its import."""
    environment = os.environ
    base = environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = environment.get("HF_HOME") or os.path.join(base, "huggingface")
    hub = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(hub)))


def cached(name: str, revision: str | None, download_dir: str | None) -> Path | None:
    """Return the folder of a Hugging Face model in the local cache, if its configuration is there."""
    cache = Path(download_dir) if download_dir else cache_folder()
    place = cache / ("models--" + name.replace("/", "--"))
    reference = place / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else (revision or "")
    folder = place / "snapshots" / commit
    return folder if commit and (folder / "config.json").is_file() else None


def download(name: str, revision: str | None, download_dir: str | None, token: str | None = None) -> None:
    """Fetch a model into the cache, in a child process, with Hugging Face's own progress bars."""
    advice = f"check the name, run hf download {name} where there is a network, or name a folder"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in {"1", "ON", "YES", "TRUE"}:
        raise ModelUnavailable(f"{name} is not, or not wholly, in the local cache and HF_HUB_OFFLINE is set: {advice}")
    command = [sys.executable, "-c", DOWNLOAD, name, revision or "", download_dir or ""]
    # Progress goes to the terminal by standard error; standard output is for what went wrong.
    child = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | ({"HF_TOKEN": token} if token else {}),
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
    )
    if child.returncode != 0:
        why = textwrap.shorten(child.stdout, LONGEST_REASON, placeholder=" ...")
        raise ModelUnavailable(
            f"{name} is not, or not wholly, in the local cache and cannot be fetched ({why}): {advice}"
        )
