"""Converts a GGUF file into a Hugging Face folder, once: config, bfloat16 safetensors, tokenizer.

A single pass that holds one tensor at a time. The folder appears whole or not at all, and two processes that want the
same one do the work once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controlplane.runtime.errors import invalid
from dataplane.models.gguf_file import GgufFile, open_gguf
from dataplane.models.weights import Report

CONVERTER_VERSION = 1
"""Part of a converted folder's name: raise it when the result changes."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """How one GGUF architecture maps to a transformers model."""

    model_type: str
    names: dict[str, str]
    # llama.cpp stores a norm that computes 1 + w with the one added.
    norms_plus_one: bool = False
    # llama.cpp stores query and key rows in the order of its own rotary layout.
    permuted_rotary: bool = False
    config: dict[str, Any] = field(default_factory=dict)


_DENSE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    **_DENSE,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ARCHITECTURES = {
    "gemma3": Architecture("gemma3_text", _GEMMA, norms_plus_one=True),
    "llama": Architecture("llama", _DENSE, permuted_rotary=True),
    "qwen2": Architecture("qwen2", _DENSE),
    "qwen3": Architecture("qwen3", _DENSE),
}


def cache_folder() -> Path:
    """Where converted models of this user lie."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "perdure" / "models"


def prepare_gguf(path: Path, report: Report) -> Path:
    """The Hugging Face folder of the GGUF file at `path`, converted at its first use. Raises Rejected."""
    stat = path.resolve().stat()
    identity = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    return prepare_once(path.stem, identity, lambda folder: convert(path, folder, report))


def prepare_once(name: str, identity: str, make: Callable[[Path], None]) -> Path:
    """The cache's folder for `identity`; `make` fills it when it does not exist yet, under a lock, all or nothing."""
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {identity}".encode()).hexdigest()[:12]
    target = cache_folder() / f"{name}-{digest}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.with_name(f"{target.name}.lock")):
        if not target.exists():
            making = target.with_name(f"{target.name}.making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            make(making)
            making.rename(target)
    return target


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def convert(path: Path, folder: Path, report: Report) -> None:
    """Write the model of the GGUF file at `path` into `folder`. Raises Rejected for what cannot be converted."""
    report("header", 0.0)
    file = open_gguf(path)
    name = str(file.metadata.get("general.architecture"))
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        raise invalid(f"{path} has the architecture {name}; {', '.join(sorted(ARCHITECTURES))} can be converted")
    config = _config(file, name, architecture)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    eos = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(eos, indent=2))
    _write_tokenizer(file, name, folder, report)
    _write_weights(file, architecture, config, folder / "model.safetensors", report)


def _config(file: GgufFile, name: str, architecture: Architecture) -> dict[str, Any]:
    def value(key: str, default: Any = None) -> Any:
        return file.metadata.get(f"{name}.{key}", default)

    if value("expert_count"):
        raise invalid(f"{file.path} holds experts; only dense models can be converted")
    if value("rope.scaling.type", "none") != "none" or "rope_freqs.weight" in file.tensors:
        raise invalid(f"{file.path} scales its rotary frequencies, which cannot be converted")
    heads = int(value("attention.head_count"))
    width = int(value("embedding_length"))
    config = {
        "model_type": architecture.model_type,
        "dtype": "bfloat16",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": int(value("feed_forward_length")),
        "num_hidden_layers": int(value("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(value("attention.head_count_kv", heads)),
        "head_dim": int(value("attention.key_length", width // heads)),
        "max_position_embeddings": int(value("context_length")),
        "rms_norm_eps": _short(value("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(value("rope.freq_base", 10_000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{
            f"{kind}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
            for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        },
        **architecture.config,
    }
    window = value("attention.sliding_window")
    return config if window is None else {**config, "sliding_window": int(window)}


def _short(value: float) -> float:
    """The shortest decimal that is the same in float32: the file stores what was 1e-06 as float32."""
    return float(str(np.float32(value)))


def _name(gguf_name: str, architecture: Architecture) -> str:
    """The transformers name of a tensor. Raises Rejected for one that is not known."""
    fixed = {"token_embd.weight": "model.embed_tokens", "output_norm.weight": "model.norm", "output.weight": "lm_head"}
    if gguf_name in fixed:
        return f"{fixed[gguf_name]}.weight"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if match is None or match[2] not in architecture.names:
        raise invalid(f"the GGUF file holds the unknown tensor {gguf_name}")
    return f"model.layers.{match[1]}.{architecture.names[match[2]]}.{match[3]}"


def _write_weights(
    file: GgufFile, architecture: Architecture, config: dict[str, Any], target: Path, report: Report
) -> None:
    names = {gguf_name: _name(gguf_name, architecture) for gguf_name in file.tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for gguf_name, name in names.items():
        size = 2 * int(np.prod(file.tensors[gguf_name].shape))
        shape = list(file.tensors[gguf_name].shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for index, gguf_name in enumerate(names):
            values = _values(file, gguf_name, architecture, config)
            out.write(torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
            report("weights", 0.4 + 0.6 * (index + 1) / len(names))


def _values(
    file: GgufFile, name: str, architecture: Architecture, config: dict[str, Any]
) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = file.load(name)
    if architecture.norms_plus_one and name.endswith("norm.weight"):
        return values - np.float32(1)
    if architecture.permuted_rotary and (".attn_q." in name or ".attn_k." in name):
        heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
    return values


def _write_tokenizer(file: GgufFile, architecture: str, folder: Path, report: Report) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    report("tokenizer", 0.1)
    parts = {
        group: {
            new: file.metadata[f"tokenizer.{old}"] for old, new in names.items() if f"tokenizer.{old}" in file.metadata
        }
        for group, names in GGUF_TOKENIZER_MAPPING.items()
    }
    try:
        backend, _ = convert_gguf_tokenizer(architecture, parts["tokenizer"])
    except ValueError as error:
        raise invalid(f"the tokenizer of {file.path} cannot be converted: {error}") from error
    settings = _tokenizer_config(file, parts["tokenizer_config"])
    if settings["add_bos_token"]:
        backend.post_processor = _begin_with(settings["bos_token"], file.metadata["tokenizer.ggml.bos_token_id"])
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _tokenizer_config(file: GgufFile, stated: dict[str, Any]) -> dict[str, Any]:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    special = {
        f"{kind}_token": tokens[file.metadata[f"tokenizer.ggml.{key}_token_id"]]
        for kind, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in file.metadata
    }
    # Older files with a sentencepiece vocabulary have no flag, and mean yes.
    begins = stated.get("add_bos_token", file.metadata.get("tokenizer.ggml.model") == "llama")
    template = {"chat_template": stated["chat_template"]} if "chat_template" in stated else {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(begins) and "bos_token" in special,
        **special,
        **template,
    }


def _begin_with(token: str, number: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(
        single=f"{token}:0 $A:0", pair=f"{token}:0 $A:0 {token}:1 $B:1", special_tokens=[(token, number)]
    )
