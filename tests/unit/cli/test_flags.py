from __future__ import annotations

import pytest

from kevlarflow.cli.flags import ServeFlags, parse, value_given
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
