"""Tiny random models of every supported family, as real Hugging Face folders.

Norms, biases and routers are random too, so that a tensor that is read wrongly, or not at all, shows in the logits.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

VOCABULARY = 323
"""Odd, so that no tensor degree divides it."""

BOS, EOS, USER, ASSISTANT = "<bos>", "<eos>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}{{ '<assistant>' if m.role == 'assistant' else '<user>' }}{{ m.content }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SENTENCES = (
    "The river carried the boat past the old mill and on towards the sea.",
    "A worker that dies must not take a single token of any stream with it.",
    "Seven people wrote one program, and each of them read what the others had written.",
)

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.12,
}

_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12, "head_dim": 8},
    "qwen2": {"layer_types": _ALTERNATING, "use_sliding_window": True, "sliding_window": 12},
    "qwen3": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 12,
        "layer_types": _ALTERNATING,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 12.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "tie_word_embeddings": True,
    },
    "phi3": {"sliding_window": 12, "partial_rotary_factor": 0.5},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "qwen3_moe": {**_MOE, "num_experts": 8, "head_dim": 16, "mlp_only_layers": [1], "norm_topk_prob": True},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "head_dim": 8,
        "sliding_window": 12,
        "layer_types": _ALTERNATING,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48, "clip_qkv": 1.5},
    "deepseek_v3": {
        **_MOE,
        "num_key_value_heads": 8,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
        },
    },
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5, "tie_word_embeddings": True},
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 0.25},
    "gpt_neox": {"num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
}
MOE_FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe", "deepseek_v3")


def tiny_model(folder: Path, family: str, **overrides: Any) -> Path:
    """A folder under `folder` with a random float32 model of `family`, made once for the same arguments.

    Holds config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.
    """
    name = "-".join([family, *(f"{key}={value}" for key, value in sorted(overrides.items()))])
    path = folder / "".join(letter if letter.isalnum() or letter in "-_=." else "_" for letter in name)[:120]
    if path.exists():
        return path
    model = random_model(family_config(family, **overrides))
    making = path.with_name(f"{path.name}.making")
    model.save_pretrained(making)
    _write_tokenizer(making)
    making.rename(path)
    return path


def family_config(family: str, **overrides: Any) -> Any:
    """The config of a tiny model of `family`."""
    return AutoConfig.for_model(family, **{**_BASE, **FAMILIES[family], **overrides})


def random_model(config: Any) -> Any:
    """A transformers model with random values in every tensor of its state dict."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1 or "norm" in name:
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


def _write_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(_tokenizer())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@cache
def _tokenizer() -> str:
    """A byte-level tokenizer: any text goes through it and back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 3,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def blank_weights(folder: Path) -> None:
    """Other values in a model's file that looks the same from outside: who reads it again gives other tokens."""
    path = folder / "model.safetensors"
    status = path.stat()
    with path.open("r+b") as file:
        head = 8 + int.from_bytes(file.read(8), "little")
        file.seek(head)
        file.write(bytes(status.st_size - head))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
