from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kevlarflow.bench.systems import free_port
from kevlarflow.cli import model_files, preflight
from kevlarflow.cli.preflight import GIB, MIB, Size
from kevlarflow.errors import ModelUnavailable, NotEnoughMemory, UsageError


def make_model(folder: Path, weights: str | None = "model.safetensors", **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, **config}))
    if weights:
        (folder / weights).write_bytes(b"0" * 500)
    return folder


# ---- the model


@pytest.mark.parametrize(
    ("config", "layers", "width"),
    [
        ({}, 4, 2),
        ({"dtype": "float32"}, 4, 4),
        ({"torch_dtype": "float16"}, 4, 2),
        ({"text_config": {"n_layer": 7}}, 7, 2),
        ({"num_hidden_layers": None}, None, 2),
    ],
)
def test_a_folder_is_examined(tmp_path: Path, config: dict[str, Any], layers: int | None, width: int) -> None:
    files = model_files.find(str(make_model(tmp_path / "m", **config)))
    assert (files.layers, files.bytes_per_weight, files.weight_bytes) == (layers, width, 500)


def test_weights_in_two_forms_are_counted_once(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"0" * 500)
    assert model_files.find(str(folder)).weight_bytes == 500


def test_weights_in_two_kinds_of_safetensors_are_counted_once(tmp_path: Path) -> None:
    """As in Mistral's repositories."""
    folder = make_model(tmp_path / "m")
    (folder / "consolidated.safetensors").write_bytes(b"0" * 500)
    assert model_files.find(str(folder)).weight_bytes == 500
    (folder / "model.safetensors").unlink()
    assert model_files.find(str(folder)).weight_bytes == 500


def shard(folder: Path, present: int, of: int) -> Path:
    """Of the files of weights that the index names, only the first ones are there."""
    names = [f"model-{number:05}-of-{of:05}.safetensors" for number in range(1, of + 1)]
    (folder / model_files.INDEX).write_text(json.dumps({"weight_map": {f"layer {n}": n for n in names}}))
    for name in names[:present]:
        (folder / name).write_bytes(b"0" * 100)
    return folder


def test_a_file_of_weights_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = shard(make_model(tmp_path / "m"), present=2, of=3)
    with pytest.raises(ModelUnavailable, match=r"lacks 1 of 3 files of weights \(model-00003-of-00003\.safetensors\)"):
        model_files.find(str(folder))


@pytest.mark.parametrize("there", ["no weights", "the first of two"])
def test_a_download_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = make_model(tmp_path / "models--owner--name" / "snapshots" / "abc123", weights=None)
    if there != "no weights":
        shard(folder, present=1, of=2)
    finish = f"open({str(folder / 'model-00002-of-00002.safetensors')!r}, 'wb').write(b'0' * 100)"
    monkeypatch.setattr(model_files, "DOWNLOAD", finish)
    assert model_files.find("owner/name", revision="abc123").weight_bytes == (100 if there == "no weights" else 200)


def test_the_token_of_a_download_is_in_its_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    tell = "import os, sys; print('with', os.environ.get('HF_TOKEN'), 'hf_x' in ' '.join(sys.argv)); sys.exit(1)"
    monkeypatch.setattr(model_files, "DOWNLOAD", tell)
    with pytest.raises(ModelUnavailable, match=r"cannot be fetched \(with hf_x False\)"):
        model_files.find("owner/name", token="hf_x")


@pytest.mark.parametrize(
    ("files", "fetched"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "tf_model.h5"], ["pytorch_model.bin"]),
        (["consolidated.safetensors", "params.json"], ["consolidated.safetensors", "params.json"]),
    ],
)
def test_weights_are_fetched_in_one_form(files: list[str], fetched: list[str]) -> None:
    patterns = model_files.unneeded(files)
    assert [name for name in files if not any(map(Path(name).match, patterns))] == fetched


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/data/cache"},
        {"HF_HOME": "~/hf"},
        {"HF_HOME": "$WHERE/hf", "XDG_CACHE_HOME": "/data/cache"},
        {"HUGGINGFACE_HUB_CACHE": "/data/old"},
        {"HF_HUB_CACHE": "/data/new", "HUGGINGFACE_HUB_CACHE": "/data/old", "HF_HOME": "/data/home"},
    ],
    ids=str,
)
def test_the_cache_is_where_hugging_faces_library_has_it(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WHERE": "/where", **variables}.items():
        monkeypatch.setenv(name, value)
    theirs = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    said = subprocess.run([sys.executable, "-c", theirs], capture_output=True, text=True, check=True).stdout.strip()
    assert str(model_files.cache_folder()) == said


def test_a_cached_name_is_found_without_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--owner--name"
    folder = make_model(place / "snapshots" / "abc123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc123")
    assert model_files.find("owner/name").folder == folder
    assert model_files.find("owner/name", revision="abc123").folder == folder
    assert model_files.cached("owner/name", "other", None) is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/no/such/folder", "there is no model /no/such/folder"),
        ("./nope", "there is no model ./nope"),
        ("a b", "there is no model a b"),
        ("~nobody-of-that-name/model", "there is no model ~nobody-of-that-name/model"),
        ("owner/name", "owner/name is not, or not wholly, in the local cache and HF_HUB_OFFLINE is set"),
    ],
)
def test_an_unknown_model(model: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailable, match=words):
        model_files.find(model)


TOO_LONG = "/" + 300 * "a"
"""No user may look at that, not even root, who may look at everything else."""


@pytest.mark.parametrize(("model", "cache"), [(TOO_LONG, "/nowhere"), ("owner/name", TOO_LONG)])
def test_what_may_not_be_looked_at_is_named(model: str, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", cache)
    with pytest.raises(ModelUnavailable, match=rf"^{TOO_LONG}\S* cannot be read \(File name too long\): let this user"):
        model_files.find(model)


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(model_files, "DOWNLOAD", "import sys; print('no route'); sys.exit(1)")
    with pytest.raises(ModelUnavailable, match=r"cannot be fetched \(no route\): check the name"):
        model_files.find("owner/name")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="has no weights"):
        model_files.find(str(make_model(tmp_path / "m", weights=None)))


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"has no config\.json"):
        model_files.find(str(tmp_path))


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match="cannot be read"):
        model_files.find(str(folder))


def test_a_configuration_that_is_no_description_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    with pytest.raises(ModelUnavailable, match=r"config.json is no description of a model: fetch the model again"):
        model_files.examine(tmp_path)


def test_more_stages_than_layers(tmp_path: Path) -> None:
    files = model_files.find(str(make_model(tmp_path / "m")))
    preflight.check_layers(4, files)
    with pytest.raises(UsageError, match="-pp 5 asks for more stages than the model has layers"):
        preflight.check_layers(5, files)


@pytest.mark.parametrize(
    ("stored", "asked", "factor"),
    [("bfloat16", "float32", 2), ("bfloat16", "float", 2), ("float32", "float32", 1), ("bfloat16", None, 1)],
)
def test_weights_in_memory(tmp_path: Path, stored: str, asked: str | None, factor: int) -> None:
    files = model_files.find(str(make_model(tmp_path / "m", dtype=stored)))
    assert preflight.loaded_bytes(files, asked) == 500 * factor


# ---- memory

SIZE = Size(stages=2, pipelines=2, weight_bytes=500 * MIB)


def test_more_for_replicas_than_the_machine_has_is_refused_with_the_numbers() -> None:
    preflight.check_memory(SIZE, 512 * MIB, 16 * GIB, 512 * MIB)
    with pytest.raises(NotEnoughMemory) as refusal:
        preflight.check_memory(SIZE, 512 * MIB, 16 * GIB, 64 * GIB)
    said = str(refusal.value)
    for number in ("4 nodes", "64.0 GiB for replicas", "16.0 GiB are free", "--standby-memory-bytes"):
        assert number in said, said
    most = int(re.search(r"(\d+)M or less", said)[1]) * MIB
    preflight.check_memory(SIZE, 512 * MIB, 16 * GIB, most)


def test_all_that_is_chosen_fits_into_its_share() -> None:
    for available in (8 * GIB, 12 * GIB, 16 * GIB):
        kv_bytes = preflight.choose_kv_bytes(SIZE, available)
        taken = SIZE.bytes_without_kv + SIZE.nodes * kv_bytes
        assert taken <= preflight.DEFAULT_SHARE * available
        assert taken > preflight.DEFAULT_SHARE * available - SIZE.nodes * MIB or kv_bytes == GIB


def test_a_large_machine_is_not_filled() -> None:
    assert preflight.choose_kv_bytes(SIZE, 1000 * GIB) == GIB


def test_too_little_for_any_kv_memory() -> None:
    with pytest.raises(NotEnoughMemory, match=r"4 nodes need .* GiB of memory and 4\.0 GiB are free"):
        preflight.choose_kv_bytes(SIZE, 4 * GIB)


def test_too_little_for_what_was_asked() -> None:
    preflight.check_memory(SIZE, GIB, SIZE.bytes_without_kv + 4 * GIB)
    with pytest.raises(NotEnoughMemory, match="lower -dp, --kv-cache-memory-bytes"):
        preflight.check_memory(SIZE, GIB, SIZE.bytes_without_kv + 4 * GIB - 1)


def test_the_advice_names_only_what_can_be_lowered() -> None:
    alone = Size(stages=2, pipelines=1, weight_bytes=0)
    with pytest.raises(NotEnoughMemory) as error:
        preflight.check_memory(alone, GIB, GIB)
    assert "--standby-memory-bytes" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "max", "memory.current": "5000", "memory.stat": "inactive_file 1000"}, None),
        ({"memory.max": "9000", "memory.current": "5000", "memory.stat": "anon 3000\ninactive_file 1000"}, 5000),
        (
            {
                "memory/memory.limit_in_bytes": "9000",
                "memory/memory.usage_in_bytes": "5000",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 1000",
            },
            5000,
        ),
        ({}, None),
    ],
)
def test_what_a_containers_limit_leaves_is_without_what_the_kernel_keeps_of_files(
    tmp_path: Path, files: dict[str, str], left: int | None
) -> None:
    (tmp_path / "memory").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content + "\n")
    assert preflight.left_in_groups(tmp_path, "4:memory:/\n0::/\n") == left


def limit(folder: Path, most: str, used: int, version: int = 2) -> None:
    """Make a cgroup of which nothing is files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    for name, content in zip((*names, "memory.stat"), (most, str(used), "anon 1"), strict=True):
        (folder / name).write_text(f"{content}\n")


def test_the_limit_of_a_unit_is_seen_and_those_of_all_around_it(tmp_path: Path) -> None:
    """As under ``systemd-run -p MemoryMax=...``; the machine's root has no limit."""
    ours = "0::/user.slice/run-1.service\n"
    limit(tmp_path / "user.slice" / "run-1.service", "9000", 1000)
    assert preflight.left_in_groups(tmp_path, ours) == 8000
    limit(tmp_path / "user.slice", "9500", 4000)
    assert preflight.left_in_groups(tmp_path, ours) == 5500
    limit(tmp_path / "user.slice" / "run-1.service", "max", 1000)
    assert preflight.left_in_groups(tmp_path, ours) == 5500
    limit(tmp_path / "other.slice", "10", 0)
    assert preflight.left_in_groups(tmp_path, ours) == 5500


def test_the_limit_of_a_unit_is_seen_in_cgroups_of_version_1(tmp_path: Path) -> None:
    limit(tmp_path / "memory", str(2**63 - 4096), 0, version=1)
    limit(tmp_path / "memory" / "docker" / "a:b", "9000", 1000, version=1)
    limit(tmp_path / "unified" / "docker", "7000", 1000)
    limit(tmp_path / "cpu" / "elsewhere", "10", 0, version=1)
    ours = "5:cpu,cpuacct:/elsewhere\n4:memory:/docker/a:b\n1:name=systemd:/\n"
    assert preflight.left_in_groups(tmp_path, ours) == 8000
    assert preflight.left_in_groups(tmp_path, ours + "0::/docker/c\n") == 6000


def test_a_container_that_sees_its_own_cgroups_only_under_the_hosts_names(tmp_path: Path) -> None:
    limit(tmp_path / "memory", "9000", 1000, version=1)
    assert preflight.left_in_groups(tmp_path, "4:memory:/docker/a\n0::/../b\n") == 8000


def test_available_memory_is_plausible() -> None:
    assert 100 * MIB < preflight.available_memory() < 2**50


# ---- the port


def test_a_free_port_is_accepted() -> None:
    port = free_port()
    preflight.check_port("127.0.0.1", port)
    preflight.check_port("0.0.0.0", port)


def test_the_owner_of_a_port_is_named() -> None:
    script = (
        "import socket, time; listener = socket.create_server(('127.0.0.1', 0)); "
        "print(listener.getsockname()[1], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        port = int(owner.stdout.readline())
        with pytest.raises(UsageError, match=rf"port {port} is in use by python\S* \(process {owner.pid}\): choose"):
            preflight.check_port("127.0.0.1", port)
        owner.kill()


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port(port: int) -> None:
    with pytest.raises(UsageError, match=f"--port {port} is no port"):
        preflight.check_port("127.0.0.1", port)


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1"):
        preflight.check_port("192.0.2.1", 12345)


# Containers often let everybody.
ANYBODY_MAY = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1


@pytest.mark.skipif(os.getuid() == 0 or ANYBODY_MAY, reason="we may listen anywhere")
def test_a_privileged_port() -> None:
    with pytest.raises(UsageError, match="needs privileges"):
        preflight.check_port("127.0.0.1", 1)
