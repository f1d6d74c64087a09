from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from kevlarflow.cli.vllm_flags import known, refuse_unknown
from kevlarflow.errors import UsageError

SCRIPT = Path(__file__).parents[3] / "scripts" / "vllm_flags.py"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--frobnicate"], "there is no flag --frobnicate: kevlarflow serve --help=all lists all flags"),
        (["--enforce-egaer"], "no flag --enforce-egaer: did you mean --enforce-eager? kevlarflow serve --help"),
        (["--max_model_length=9"], "there is no flag --max-model-length: did you mean --max-model-len?"),
        (["--no-enforce-eagr"], "there is no flag --no-enforce-eagr: did you mean --no-enforce-eager?"),
        (["--seed", "1", "--dtyp1", "auto"], "there is no flag --dtyp1: did you mean --dtype?"),
        (["--compilation-confg.mode", "0"], "did you mean --compilation-config?"),
        (["--standby-memory", "1G"], "there is no flag --standby-memory: did you mean --standby-memory-bytes?"),
        (["-xy", "2"], "there is no flag -xy"),
    ],
)
def test_a_flag_that_vllm_does_not_have_is_named(words: list[str], line: str) -> None:
    with pytest.raises(UsageError) as error:
        refuse_unknown(words, ["--standby-memory-bytes"])
    assert line in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        "--max-model-len 2048", "--max_model_len=2048", "--no-enable-prefix-caching", "--enforce-eager stray",
        "--max-model 2048", "--seed -1", "--gpu-memory-utilization -0.5", "-O3", "-O", "-O=2", "-O 1", "-tp=1",
        "-cc.mode=0", "-cc.mode 0", "--compilation-config.pass_config.fuse_norm_quant --strange",
        "--compilation_config.cudagraph_capture_sizes+ 1,2", "--served-model-name a b", "-q awq", "-qawq", "-",
        "--seed 1 -- --frobnicate",
    ],
)  # fmt: skip
def test_what_vllm_may_take_is_left_to_it(words: str) -> None:
    refuse_unknown(words.split())


def test_a_value_with_spaces_is_no_flag() -> None:
    refuse_unknown(["--chat-template", "- {{ messages }}", '--override-generation-config={"temperature": 0}'])


@pytest.mark.slow
def test_the_list_is_that_of_the_installed_vllm() -> None:
    assert sorted(known()) == runpy.run_path(str(SCRIPT))["names"](), "run scripts/vllm_flags.py"
