"""Puts fast modules (fast_layers.py) where a loaded model computes what they compute (recognise.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dataplane.engine.attention import Score
from dataplane.kernels.rotary import HeadNorm
from dataplane.models.fast_layers import FastAttention, FastLayer, FastMLP, FastNorm, Heads, RotaryTable
from dataplane.models.recognise import (
    AttentionFacts,
    NormFacts,
    attention_facts,
    gate_activation,
    is_plain_layer,
    norm_facts,
)
from dataplane.models.rotary import Rotary
from dataplane.models.structure import attention_modules, decoder_of, layers_of, replace_module
from dataplane.parallel.tensor import FusedPart, Linear

_DONE = "perdure_accelerated"


@dataclass(frozen=True, slots=True)
class Accelerated:
    """How many modules were replaced."""

    attention: int
    feed_forward: int
    norms: int
    layers: int


def accelerate(model: PreTrainedModel, positions: int, *, whole: bool) -> Accelerated:
    """Replace what can be. `positions`: as many as a sequence may have. `whole`: all layers are here, so that the
    residual stream may be carried in two parts, and may end where nothing but logits follows."""
    path, layers = layers_of(model)
    rotated = _rotary_width(model)
    attention = sum(_replace_attention(model, path, rotated) for path, _ in list(attention_modules(model)))
    feed_forward = sum(_replace_mlp(model, path) for path, _ in list(model.named_modules()) if path)
    norms = sum(_replace_norm(model, path) for path, _ in list(model.named_modules()) if path)
    layers = _replace_layers(model, path, layers) if whole else 0
    for name, module in list(model.named_modules()):
        if isinstance(module, Rotary) and not module.by_length:
            replace_module(model, name, RotaryTable(module, positions))
    setattr(model, _DONE, True)
    return Accelerated(attention, feed_forward, norms, layers)


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been here."""
    return hasattr(model, _DONE)


def _rotary_width(model: nn.Module) -> int | None:
    """Columns of the model's rotary tables; None if it has none, or several widths."""
    widths = {rotary.width for rotary in model.modules() if isinstance(rotary, Rotary)}
    return widths.pop() if len(widths) == 1 else None


def _replace_attention(model: nn.Module, path: str, rotated: int | None) -> bool:
    module: Any = model.get_submodule(path)
    parts = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    first = parts[0]
    if not isinstance(first, FusedPart) or not all(isinstance(part, FusedPart) for part in parts):
        return False
    if rotated is None or not hasattr(module, "o_proj"):
        return False
    qkv = first.whole
    dim = int(module.head_dim)
    query, key_value = qkv.sizes[0] // dim, qkv.sizes[1] // dim
    facts = attention_facts(module, (query, key_value), dim, rotated)
    if facts is None:
        return False
    fast = FastAttention(
        qkv,
        module.o_proj,
        Heads(query, key_value, dim),
        Score(facts.scaling, facts.window, facts.softcap),
        facts.layout,
        _head_norms(module, facts),
        int(module.perdure_layer),
    )
    replace_module(model, path, fast)
    return True


def _head_norms(module: Any, facts: AttentionFacts) -> tuple[HeadNorm, HeadNorm] | None:
    if facts.q_norm is None or facts.k_norm is None:
        return None
    return _head_norm(module.q_norm.weight, facts.q_norm), _head_norm(module.k_norm.weight, facts.k_norm)


def _head_norm(weight: Tensor, facts: NormFacts) -> HeadNorm:
    return HeadNorm(weight, facts.epsilon, facts.kind)


def _replace_mlp(model: nn.Module, path: str) -> bool:
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        # A part of a module that was replaced.
        return False
    if not hasattr(module, "down_proj") or not isinstance(module.down_proj, Linear):
        return False
    gate = getattr(module, "gate_proj", None)
    up = gate.whole if isinstance(gate, FusedPart) else getattr(module, "gate_up_proj", None)
    if not isinstance(up, Linear):
        return False
    activation = gate_activation(module)
    if activation is None:
        return False
    replace_module(model, path, FastMLP(up, module.down_proj, activation))
    return True


def _replace_norm(model: nn.Module, path: str) -> bool:
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        return False
    facts = norm_facts(module) if hasattr(module, "weight") and isinstance(module.weight, nn.Parameter) else None
    if facts is None or isinstance(module, FastNorm):
        return False
    replace_module(model, path, FastNorm(module.weight, facts.epsilon, facts.kind))
    return True


def _replace_layers(model: PreTrainedModel, path: str, layers: nn.ModuleList) -> int:
    """All layers or none: only a layer that knows a Stream, and a last norm that does, may follow one."""
    decoder: Any = decoder_of(model)
    if not isinstance(getattr(decoder, "norm", None), FastNorm):
        return 0
    if not all(_is_fast(layer) and is_plain_layer(layer) for layer in layers):
        return 0
    for index, layer in enumerate(layers):
        parts: Any = layer
        fast = FastLayer(layer, parts.input_layernorm, parts.self_attn, parts.post_attention_layernorm, parts.mlp)
        replace_module(model, f"{path}.{index}", fast)
    last: Any = model.get_submodule(f"{path}.{len(layers) - 1}")
    if isinstance(last.attention, FastAttention):
        last.attention.is_last = True
    return len(layers)


def ends_early(model: nn.Module) -> bool:
    """Whether the model gives hidden states of those rows alone whose logits are wanted."""
    return any(isinstance(module, FastLayer) and module.is_last for module in model.modules())


def _is_fast(layer: Any) -> bool:
    norms = (getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm"))
    return all(isinstance(norm, FastNorm) for norm in norms) and torch.is_tensor(layer.input_layernorm.weight)
