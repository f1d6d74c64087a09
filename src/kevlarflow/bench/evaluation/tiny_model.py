"""The model of the emulated setting: a Llama with one small layer a stage, random weights, a real tokenizer.

What it costs on the CPU is a fraction of the device time that it stands for. Its weights are drawn so that what a token
sees of its context moves the next one: output that equals a reference has read the right KV.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from kevlarflow.default_model import ensure_default_model

NAME = "emulated-llama"
HIDDEN_SIZE = 32
INTERMEDIATE_SIZE = 64
HEAD_SIZE = 128
SEED = 20_231_116
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make(folder: Path, stages: int, max_model_len: int) -> Path:
    """Write the model into `folder`, unless it is there; returns the folder."""
    if (folder / "config.json").exists():
        return folder
    source = ensure_default_model()
    vocabulary = json.loads((source / "config.json").read_bytes())["vocab_size"]
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, folder / name)
    save_file(_weights(stages, vocabulary), folder / "model.safetensors")
    # Last, since it says that the rest is there.
    (folder / "config.json").write_text(json.dumps(_config(stages, vocabulary, max_model_len), indent=1))
    return folder


def _config(stages: int, vocabulary: int, max_model_len: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": stages,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": HEAD_SIZE,
        "vocab_size": vocabulary,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _weights(layers: int, vocabulary: int) -> dict[str, numpy.ndarray]:
    chance = numpy.random.default_rng(SEED)

    def draw(rows: int, columns: int) -> numpy.ndarray:
        return (chance.standard_normal((rows, columns)) / columns**0.5).astype(numpy.float32)

    ones = numpy.ones(HIDDEN_SIZE, numpy.float32)
    weights = {
        "model.embed_tokens.weight": chance.standard_normal((vocabulary, HIDDEN_SIZE)).astype(numpy.float32),
        "model.norm.weight": ones,
        "lm_head.weight": draw(vocabulary, HIDDEN_SIZE),
    }
    for number in range(layers):
        layer = f"model.layers.{number}"
        weights |= {f"{layer}.self_attn.{name}_proj.weight": draw(HEAD_SIZE, HIDDEN_SIZE) for name in "qkv"}
        # Attention over many random values averages out: it is made loud enough to matter.
        weights[f"{layer}.self_attn.o_proj.weight"] = 4 * draw(HIDDEN_SIZE, HEAD_SIZE)
        weights[f"{layer}.mlp.gate_proj.weight"] = draw(INTERMEDIATE_SIZE, HIDDEN_SIZE)
        weights[f"{layer}.mlp.up_proj.weight"] = draw(INTERMEDIATE_SIZE, HIDDEN_SIZE)
        weights[f"{layer}.mlp.down_proj.weight"] = draw(HIDDEN_SIZE, INTERMEDIATE_SIZE)
        weights |= {f"{layer}.{name}_layernorm.weight": ones for name in ("input", "post_attention")}
    return {name: numpy.ascontiguousarray(array) for name, array in weights.items()}
