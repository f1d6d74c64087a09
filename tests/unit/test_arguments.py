"""What vLLM's own parser and configuration make of flags. Importing vLLM takes 8 s, so these are marked slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kevlarflow.config import ServeConfig
from kevlarflow.errors import IncompatibleVllm, Unsupported, UsageError
from standins import make_config

pytestmark = pytest.mark.slow

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
    "max_position_embeddings": 512, "torch_dtype": "bfloat16",
}  # fmt: skip
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "kv_lora_rank": 16, "q_lora_rank": None,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 0,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "sliding_window": None,
}  # fmt: skip
MAMBA = {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 4,
         "state_size": 16, "vocab_size": 128, "torch_dtype": "float32"}  # fmt: skip
BERT = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 128, "torch_dtype": "float32"}  # fmt: skip


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a configuration for a model that has no weights; vLLM reads only its config.json here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)

    def make(*words: str, model: dict[str, Any] = LLAMA, **changes: Any) -> ServeConfig:
        (tmp_path / "config.json").write_text(json.dumps(model))
        words = ("--skip-tokenizer-init", *words)
        changes = {"model": str(tmp_path), "vllm_args": words, "kv_cache_memory_bytes": 2**26, **changes}
        return msgspec.structs.replace(make_config(tmp_path / "run", 8000), **changes)

    return make


def inspect(config: ServeConfig) -> Any:
    from kevlarflow.engine import arguments

    return arguments.inspect(config)


def test_what_is_learnt_about_the_model(configured: Any) -> None:
    facts = inspect(configured("--dtype", "float32", "--enforce-eager"))
    assert (facts.layers, facts.dtype, facts.max_model_len) == (4, "float32", 512)
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4  # layers of a stage, K and V, heads, head size, bytes
    assert facts.kv_tokens == 2**26 // facts.kv_bytes_per_token


def test_the_namespace_plugs_kevlarflow_in(configured: Any) -> None:
    from kevlarflow.engine.arguments import MIDDLEWARE, namespace
    from kevlarflow.engine.executor import KevlarExecutor

    config = configured("--max_model_len=256", "--middleware", "users.own", "--enable-prefix-caching")
    args = namespace(config)
    assert args.distributed_executor_backend is KevlarExecutor
    assert args.scheduler_cls == "kevlarflow.engine.scheduler.KevlarScheduler"
    assert args.async_scheduling is False
    assert args.middleware == ["users.own", MIDDLEWARE]
    assert (args.pipeline_parallel_size, args.data_parallel_size, args.max_model_len) == (2, 2, 256)
    assert args.served_model_name == ["stand-in"]
    assert namespace(configured("--served-model-name", "a", "b")).served_model_name == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--max-model-len", "many"], "argument --max-model-len: invalid"),
        (["--enable-auto-tool-choice"], "requires --tool-call-parser"),
        (["--dtype", "float7"], "argument --dtype: invalid choice: 'float7'"),
        (["--max-model-len", "4096"], "vLLM refuses these flags or this model: .*max_model_len"),
        (["--config", "/nowhere.yaml"], "No such file or directory: '/nowhere.yaml'"),
        (["--chat-template", "/nowhere"], "/nowhere"),
        (["--enforce-eager", "stray"], "'stray' stands alone: a model comes first"),
        (["--pipeline-parallel", "3"], "--pipeline-parallel-size has to be written in full"),
        (
            ["--enable-auto-tool-choice", "--tool-call-parser", "hermse"],
            "^vLLM refuses these flags: invalid tool call parser: hermse",
        ),
        (["--reasoning-parser", "qwen9"], "^vLLM refuses these flags: invalid reasoning parser: qwen9"),
        (["--tool-parser-plugin", "/nowhere.py"], "^--tool-parser-plugin /nowhere.py cannot be imported: FileNotFound"),
        (["--reasoning-parser-plugin", "no_module"], "^--reasoning-parser-plugin no_module cannot be imported"),
    ],
)
def test_what_vllm_refuses_is_one_line(configured: Any, words: list[str], line: str) -> None:
    with pytest.raises(UsageError, match=line) as error:
        inspect(configured(*words))
    assert "\n" not in str(error.value)


def test_a_plugin_with_a_mistake_is_one_line(configured: Any, tmp_path: Path) -> None:
    plugin = tmp_path / "mistaken.py"
    plugin.write_text("raise RuntimeError('two\\nlines')")
    with pytest.raises(UsageError) as error:
        inspect(configured("--tool-parser-plugin", str(plugin)))
    assert str(error.value) == f"--tool-parser-plugin {plugin} cannot be imported: RuntimeError: two lines"


def test_parsers_of_plugins_are_found(configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    from kevlarflow.engine.arguments import stage_config

    for manager, parsers in ((ToolParserManager, "tool_parsers"), (ReasoningParserManager, "reasoning_parsers")):
        monkeypatch.setattr(manager, parsers, dict(getattr(manager, parsers)))
    tools, thoughts = tmp_path / "own_tools.py", tmp_path / "own_thoughts.py"
    tools.write_text(
        "from vllm.tool_parsers import ToolParser, ToolParserManager\n"
        "ToolParserManager.register_module('own-tools', module=type('Tools', (ToolParser,), {}))\n"
    )
    thoughts.write_text(
        "from vllm.reasoning import ReasoningParser, ReasoningParserManager\n"
        "ReasoningParserManager.register_module('own-thoughts', module=type('Thoughts', (ReasoningParser,), {}))\n"
    )
    use_tools = ["--enable-auto-tool-choice", "--tool-call-parser", "own-tools"]
    with pytest.raises(UsageError, match="invalid tool call parser: own-tools"):
        inspect(configured(*use_tools))
    assert inspect(configured(*use_tools, "--tool-parser-plugin", str(tools))).layers == 4
    # A node that was started by hand does not come from a process that has inspected the flags.
    own = configured("--reasoning-parser", "own-thoughts", "--reasoning-parser-plugin", str(thoughts))
    assert stage_config(own).structured_outputs_config.reasoning_parser == "own-thoughts"
    assert inspect(own).layers == 4


@pytest.mark.parametrize(
    "words",
    [
        "--api-server-count 2", "--headless", "--nnodes 2", "--data-parallel-rank 0",
        "--data-parallel-start-rank 1", "--data-parallel-size-local 1", "--data-parallel-address 10.0.0.1",
        "--data-parallel-external-lb", "--data-parallel-hybrid-lb", "--data-parallel-backend ray",
        "--distributed-executor-backend ray", "--worker-cls my.Worker", "--worker-extension-cls my.Worker",
        "--scheduler-cls my.Scheduler", "--async-scheduling", "--grpc", "--uds /tmp/x",
        '--speculative-config {"method":"ngram","num_speculative_tokens":2}', "--enable-lora",
        "--lora-modules name=/adapter", "--enable-prompt-embeds",
        "--prefill-context-parallel-size 2", "--decode-context-parallel-size 2",
        '--kv-transfer-config {"kv_connector":"X","kv_role":"kv_both"}', "--kv-offloading-size 1",
        "--kv-sharing-fast-prefill", "--cpu-offload-gb 1", "--enable-sleep-mode", "--enable-eplb",
        "--enable-elastic-ep", "--enable-dbo", "--numa-bind", "--enable-fault-tolerance",
        "--node-rank 1", "--master-addr 10.0.0.1", "--master-port 29502",
        '--profiler-config {"profiler":"torch","torch_profiler_dir":"/tmp/x"}',
    ],
)  # fmt: skip
def test_what_is_not_yet_safe_is_refused_by_name(configured: Any, words: str) -> None:
    flag = words.split(maxsplit=1)[0]
    with pytest.raises(Unsupported) as error:
        inspect(configured(*words.split()))
    assert str(error.value).startswith(flag)
    assert "is not supported yet: " in str(error.value)


@pytest.mark.parametrize("variable", ["VLLM_USE_V2_MODEL_RUNNER", "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"])
def test_what_a_variable_asks_for_is_refused_by_its_name(
    configured: Any, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "0")
    assert inspect(configured()).layers == 4
    monkeypatch.setenv(variable, "1")
    with pytest.raises(Unsupported, match=f"^{variable}=1 is not supported yet: .*; unset it$"):
        inspect(configured())


@pytest.mark.parametrize(
    ("model", "words", "line"),
    [
        (MISTRAL, [], "a model whose KV cache is not one group of full attention"),
        (MAMBA, [], "a model whose KV cache is not one group of full attention"),
        (MIXTRAL, [], "a mixture-of-experts model with -dp above 1"),
        (DEEPSEEK, [], "a model with multi-head latent attention"),
        (BERT, [], "a pooling model"),
        (LLAMA, ["--runner", "pooling", "--convert", "embed"], "a pooling model"),
        (LLAMA, ["--dtype", "float32", "--kv-cache-dtype", "bfloat16"], "served with a --kv-cache-dtype that is not"),
    ],
)
def test_models_that_are_not_yet_safe(configured: Any, model: dict[str, Any], words: list[str], line: str) -> None:
    with pytest.raises(Unsupported, match=line):
        inspect(configured(*words, model=model, stages=1))


def test_what_makes_such_models_safe_is_accepted(configured: Any) -> None:
    assert inspect(configured("--disable-sliding-window", model=MISTRAL)).max_model_len == 128
    assert inspect(configured(model=MIXTRAL, pipelines=1)).layers == 4
    assert inspect(configured("--dtype", "bfloat16", "--kv-cache-dtype", "bfloat16")).layers == 4


def test_more_stages_than_layers(configured: Any) -> None:
    with pytest.raises(UsageError, match="-pp 5 asks for more stages than stand-in has layers"):
        inspect(configured(stages=5))


def test_a_lane_too_small_for_one_request(configured: Any) -> None:
    with pytest.raises(UsageError, match="use --kv-cache-memory-bytes 1M or --max-model-len 4"):
        inspect(configured("--dtype", "float32", kv_cache_memory_bytes=2**11))


def test_another_version_of_vllm_is_refused(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.version

    monkeypatch.setattr(vllm.version, "__version_tuple__", (0, 33, 1))
    monkeypatch.setattr(vllm.version, "__version__", "0.33.1")
    with pytest.raises(IncompatibleVllm, match=r"vLLM 0\.33\.1 is not supported: this KevlarFlow works with 0\.32\.x"):
        inspect(configured())


def test_a_seam_that_is_gone_is_named(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    monkeypatch.delattr(GenerateBaseServing, "_raise_if_error")
    with pytest.raises(IncompatibleVllm, match=r"has no vllm\.entrypoints\.generate\.base\.serving:.*_raise_if_error"):
        inspect(configured())


def test_a_seam_that_has_changed_is_named(configured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing

    monkeypatch.setattr(GenerateBaseServing, "_raise_if_error", lambda self, outputs: None)
    with pytest.raises(IncompatibleVllm, match=r"has changed .*_raise_if_error \(it lacks finish_reason, request_id\)"):
        inspect(configured())
