from __future__ import annotations

from pathlib import Path

import pytest

from kevlarflow.cli.flags import ServeFlags, parse, refuse_ours_in_file, value_given
from kevlarflow.errors import UsageError


def test_defaults_are_those_of_vllm() -> None:
    assert parse([]) == ServeFlags(model=None, stages=1, pipelines=1, ranks=1, host=None, port=8000)


@pytest.mark.parametrize(
    "words",
    [
        ["m", "-pp", "2", "-dp", "3", "--port", "9"],
        ["-pp=2", "-dp=3", "--port=9", "--model=m"],
        ["--pipeline-parallel-size", "2", "--data_parallel_size=3", "--port", "9", "m"],
        ["--pipeline_parallel_size", "2", "m", "--data-parallel-size", "3", "--port", "9"],
    ],
)
def test_names_are_read_as_vllm_reads_them(words: list[str]) -> None:
    assert parse(words) == ServeFlags(model="m", stages=2, pipelines=3, port=9)


def test_foreign_flags_pass_through_as_they_were_typed() -> None:
    words = [
        "m",
        "--max_model_len",
        "2048",
        "-pp",
        "2",
        "--enforce-eager",
        "--served-model-name",
        "a",
        "b",
        "-cc.mode=0",
    ]
    flags = parse(words)
    assert flags.vllm_args == [
        "--max_model_len", "2048", "--enforce-eager", "--served-model-name", "a", "b", "-cc.mode=0",
    ]  # fmt: skip
    assert (flags.model, flags.stages) == ("m", 2)


def test_a_word_behind_a_foreign_flag_is_not_the_model() -> None:
    assert parse(["--max-model-len", "2048"]).model is None
    assert parse(["--dtype=float32", "m"]).model == "m"


@pytest.mark.parametrize(
    ("text", "number"),
    [("1024", 1024), ("512M", 512 * 2**20), ("512m", 512_000_000), ("1.5g", 1_500_000_000), ("2G", 2**31)],
)
def test_large_numbers_are_read_as_vllm_reads_them(text: str, number: int) -> None:
    assert parse(["--kv-cache-memory-bytes", text]).kv_cache_memory_bytes == number


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["-pp", "x"], "-pp x is not a whole number"),
        (["-dp"], "-dp needs a value"),
        (
            ["--standby-memory-bytes", "1.5G"],
            "--standby-memory-bytes 1.5G is not a number of bytes, such as 512M or 2G",
        ),
        (["--port=http"], "--port http is not a whole number"),
    ],
)
def test_nonsense_is_named(words: list[str], line: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(words)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("words", "topic"), [(["--help"], ""), (["m", "-h"], ""), (["--help=all"], "all"), (["m"], None)]
)
def test_help(words: list[str], topic: str | None) -> None:
    assert parse(words).help == topic


def test_value_given() -> None:
    words = ["--dtype", "float32", "--served_model_name=x", "--enforce-eager"]
    assert value_given(words, "--dtype") == "float32"
    assert value_given(words, "--served-model-name") == "x"
    assert value_given(words, "--enforce-eager") is None
    assert value_given(words, "--seed") is None


def test_of_a_flag_that_comes_twice_the_last_value_counts_as_for_vllm(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("shutdown-timeout: 5\nshutdown_timeout: 60")
    words = ["--dtype", "float32", "--revision=a", "--dtype=bfloat16", "--revision", "b", "--config", str(file)]
    assert value_given(words, "--dtype") == "bfloat16"
    assert value_given(words, "--revision") == "b"
    assert value_given(words, "--shutdown-timeout") == "60"


def test_a_word_behind_a_switch_is_the_model() -> None:
    for switch in ("--enforce-eager", "--no-enable-prefix-caching", "--enforce_eager"):
        flags = parse([switch, "m", "-pp", "2"])
        assert (flags.model, flags.vllm_args) == ("m", [switch])
    assert parse(["--seed", "0"]).model is None


def test_what_was_not_typed_is_taken_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("tokenizer: owner/other\ndtype: float32\nserved_model_name: [a, b]\nenforce-eager: true\nseed: 1")
    words = ["--dtype", "bfloat16", "--config", str(file)]
    assert value_given(words, "--tokenizer") == "owner/other"
    assert value_given(words, "--dtype") == "bfloat16"
    assert value_given(words, "--served-model-name") == "a"
    assert value_given(words, "--revision") is None
    assert value_given([f"--config={file}"], "--tokenizer") is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: owner/name", "--model is not read from {} (--config): write it on the command line"),
        ("data_parallel_size: 2", "--data-parallel-size is not read from {} (--config): write it on the command line"),
        ("- a", "--config {} has no flags: write one a line, such as max-model-len: 2048"),
    ],
)
def test_what_the_file_cannot_say_is_refused(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        refuse_ours_in_file(["--config", str(file)])
    assert str(error.value) == line.format(file)


@pytest.mark.parametrize(("text", "why"), [(None, "No such file or directory"), ("a: [", "while parsing a flow .*")])
def test_a_file_that_cannot_be_read_is_named(text: str | None, why: str, tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=rf"^--config \S+ cannot be read \({why}\): name a YAML file of flags$"):
        value_given(["--config", str(file)], "--seed")


def test_what_vllm_itself_would_not_do_with_the_file_is_not_refused(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("port: 8000\ntensor-parallel-size: 1\nenforce-eager: true\nenable-lora: false\nmax-model-len: 64")
    refuse_ours_in_file(["--config", str(file)])
    refuse_ours_in_file(["--seed", "1"])
