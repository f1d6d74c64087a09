"""What is refused because it is not yet safe under failover: three tables, one line each.

The first table reads the flags alone, and the second the environment, so their refusals come before the model is looked
at. The third reads the configuration that vLLM derived from flags and model. Each row names the flag or the variable to
change, or the model's property that neither can change. vLLM is not imported here: rows look at attributes by name, and
one that does not exist in the installed vLLM is an `AttributeError` at every start, not a check that silently passes.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from kevlarflow.errors import Unsupported

V2_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
KEEP_ALIVE_VARIABLE = "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH"


class Row(NamedTuple):
    """One feature: who asks for it, whether it is asked for, and what to do instead."""

    name: str
    asked: Callable[[Any], bool]
    advice: str


def _given(attribute: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, attribute))


def _above_one(attribute: str) -> Callable[[Any], bool]:
    return lambda args: (getattr(args, attribute) or 1) > 1


def _not_none(attribute: str) -> Callable[[Any], bool]:
    return lambda args: getattr(args, attribute) is not None


def _other_than(attribute: str, default: object) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, attribute) != default)


ONE_HOST = "all pipelines and nodes run on this machine; leave it out"
OWN_PART = "KevlarFlow puts its own in that place; leave it out"
STEP_STATE = "its state cannot be rebuilt after a failure yet; leave it out"
WEIGHTS = "a replacement node loads the weights from the model's folder; leave it out"
ADAPTERS = "adapters are not part of what is rebuilt; leave it out"
KV_MOVES = "it moves KV blocks behind KevlarFlow's back; leave it out"

FLAGS = (
    Row("--api-server-count", _above_one("api_server_count"), "one API server serves all engines; use 1"),
    Row("--headless", _given("headless"), ONE_HOST),
    Row("--nnodes", _above_one("nnodes"), ONE_HOST),
    Row("--node-rank", _other_than("node_rank", 0), ONE_HOST),
    Row("--master-addr", _other_than("master_addr", "127.0.0.1"), ONE_HOST),
    Row("--master-port", _other_than("master_port", 29501), ONE_HOST),
    Row("--data-parallel-rank", _not_none("data_parallel_rank"), ONE_HOST),
    Row("--data-parallel-start-rank", _not_none("data_parallel_start_rank"), ONE_HOST),
    Row("--data-parallel-size-local", _not_none("data_parallel_size_local"), ONE_HOST),
    Row("--data-parallel-address", _not_none("data_parallel_address"), ONE_HOST),
    Row("--data-parallel-external-lb", _given("data_parallel_external_lb"), ONE_HOST),
    Row("--data-parallel-hybrid-lb", _given("data_parallel_hybrid_lb"), ONE_HOST),
    Row(
        "--data-parallel-multi-port-external-lb",
        _given("data_parallel_multi_port_external_lb"),
        "one API server serves all engines; leave it out",
    ),
    Row(
        "--data-parallel-backend ray",
        _other_than("data_parallel_backend", "mp"),
        "KevlarFlow starts local processes; leave it out",
    ),
    Row("--distributed-executor-backend", _not_none("distributed_executor_backend"), OWN_PART),
    Row("--worker-cls", _other_than("worker_cls", "auto"), OWN_PART),
    Row("--worker-extension-cls", _given("worker_extension_cls"), OWN_PART),
    Row("--scheduler-cls", _not_none("scheduler_cls"), OWN_PART),
    Row(
        "--async-scheduling",
        lambda args: args.async_scheduling is True,
        "a step is issued only after the one before it is known; leave it out",
    ),
    Row(
        "--profiler-config",
        lambda args: args.profiler_config is not None and args.profiler_config.profiler is not None,
        "nodes have no profiler that could be started while they serve; leave it out",
    ),
    Row("--grpc", _given("grpc"), "only the HTTP server is supported; leave it out"),
    Row("--uds", _not_none("uds"), "a cluster is found by its port; use --port"),
    Row("--speculative-config", _given("speculative_config"), STEP_STATE),
    Row("--spec-method", _given("spec_method"), STEP_STATE),
    Row("--spec-model", _given("spec_model"), STEP_STATE),
    Row("--diffusion-config", _given("diffusion_config"), STEP_STATE),
    Row("--enable-lora", _given("enable_lora"), ADAPTERS),
    Row("--lora-modules", _given("lora_modules"), ADAPTERS),
    Row("--enable-prompt-embeds", _given("enable_prompt_embeds"), STEP_STATE),
    Row(
        "--prefill-context-parallel-size",
        _above_one("prefill_context_parallel_size"),
        "context parallelism splits a stage's KV; leave it out",
    ),
    Row(
        "--decode-context-parallel-size",
        _above_one("decode_context_parallel_size"),
        "context parallelism splits a stage's KV; leave it out",
    ),
    Row("--kv-transfer-config", _not_none("kv_transfer_config"), KV_MOVES),
    Row("--ec-transfer-config", _not_none("ec_transfer_config"), KV_MOVES),
    Row("--kv-offloading-size", _not_none("kv_offloading_size"), KV_MOVES),
    Row("--kv-sharing-fast-prefill", _given("kv_sharing_fast_prefill"), STEP_STATE),
    Row("--cpu-offload-gb", _given("cpu_offload_gb"), WEIGHTS),
    Row("--enable-sleep-mode", _given("enable_sleep_mode"), WEIGHTS),
    Row("--weight-transfer-config", _not_none("weight_transfer_config"), WEIGHTS),
    Row("--enable-eplb", _given("enable_eplb"), WEIGHTS),
    Row("--enable-elastic-ep", _given("enable_elastic_ep"), ONE_HOST),
    Row("--enable-dbo", _given("enable_dbo"), STEP_STATE),
    Row("--numa-bind", _given("numa_bind"), "it needs processes that are not forked; leave it out"),
    Row("--enable-fault-tolerance", _given("enable_fault_tolerance"), OWN_PART),
)


def _set(variable: str) -> Callable[[Any], bool]:
    return lambda environment: environment.get(variable, "0") not in {"", "0"}


VARIABLES = (
    Row(V2_RUNNER_VARIABLE, _set(V2_RUNNER_VARIABLE), "requests are rebuilt in vLLM's V1 model runner"),
    Row(
        KEEP_ALIVE_VARIABLE,
        _set(KEEP_ALIVE_VARIABLE),
        "engines that died are back once their API server has ended, which it would not do",
    ),
)


def _other_attention(config: Any) -> bool:
    """Whether some layer keeps less, or something else, than keys and values of all tokens."""
    model = config.model_config
    if model.is_attention_free or model.is_hybrid or model.has_inner_state or model.is_encoder_decoder:
        return True
    if model.attention_chunk_size is not None:
        return True
    if model.disable_sliding_window:
        return False
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ["full_attention"])
    return model.get_sliding_window() is not None or kinds != {"full_attention"}


def _stores_another_type(config: Any) -> bool:
    """Whether keys and values are kept in a type that the CPU's attention does not convert to: it checks nothing."""
    kept: str = config.cache_config.cache_dtype
    return (
        kept != "auto" and not kept.startswith("fp8") and kept != str(config.model_config.dtype).removeprefix("torch.")
    )


MODEL = (
    Row(
        "a pooling model (--runner pooling)",
        lambda config: config.model_config.runner_type != "generate",
        "only generation is supported; serve a generative model",
    ),
    Row(
        "a multimodal model",
        lambda config: config.model_config.is_multimodal_model,
        "images, audio and streaming input cannot be rebuilt after a failure yet; serve a text model",
    ),
    Row(
        "a diffusion model",
        lambda config: config.model_config.is_diffusion,
        "its steps cannot be repeated yet; serve an autoregressive model",
    ),
    Row(
        "a model whose KV cache is not one group of full attention (sliding window, hybrid, Mamba)",
        _other_attention,
        "serve another model, or add --disable-sliding-window if it has one",
    ),
    Row(
        "a model with multi-head latent attention (MLA)",
        lambda config: config.model_config.use_mla,
        "vLLM sorts its batch, and stages that rebuild it must not come to differ; serve another model",
    ),
    Row(
        "a mixture-of-experts model with -dp above 1",
        lambda config: config.model_config.is_moe and config.parallel_config.data_parallel_size > 1,
        "its engines wait for each other; use -dp 1 or a dense model",
    ),
    Row(
        "served with a --kv-cache-dtype that is not the type that it computes with",
        _stores_another_type,
        "leave it out",
    ),
    Row(
        "the V2 model runner",
        lambda config: config.use_v2_model_runner,
        f"unset {V2_RUNNER_VARIABLE}, and leave out flags that need it",
    ),
)


def refuse_flags(args: Namespace) -> None:
    """Raise `Unsupported` for the first flag, or the first variable, that asks for what is not yet safe."""
    _refuse(FLAGS, args, "{name} is not supported yet: {advice}")
    _refuse(VARIABLES, os.environ, "{name}=1 is not supported yet: {advice}; unset it")


def refuse_model(vllm_config: Any) -> None:
    """Raise `Unsupported` when the model, with these flags, cannot be rebuilt after a failure."""
    model = vllm_config.model_config.model
    _refuse(MODEL, vllm_config, f"{model} is {{name}}, which is not supported yet: {{advice}}")


def _refuse(rows: tuple[Row, ...], subject: Any, sentence: str) -> None:
    for row in rows:
        if row.asked(subject):
            raise Unsupported(sentence.format(name=row.name, advice=row.advice))
