"""Puts fast modules where a loaded model computes what they compute (recognise.py): on a GPU those of fast_layers.py,
on a CPU those of cpu_layers.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from dataplane.models.recognise import AttentionFacts, NormFacts, attention_facts, gate_activation, norm_facts
from dataplane.models.rotary import Rotary
from dataplane.models.structure import attention_modules, layers_of, replace_module
from dataplane.parallel.tensor import FusedLinear, FusedPart, Linear

_DONE = "perdure_accelerated"


@dataclass(frozen=True, slots=True)
class Heads:
    """Local head counts."""

    query: int
    key_value: int
    dim: int


class Kit(Protocol):
    """The fast modules of one kind of device."""

    def norm(self, weight_H: Tensor, facts: NormFacts) -> nn.Module:
        """In the place of an RMS norm."""
        ...

    def mlp(self, up: Linear, down: nn.Module, activation: int) -> nn.Module:
        """Of `down(activation(gate) · up)`; `up` gives gate and up, one after the other."""
        ...

    def attention(self, module: Any, qkv: FusedLinear, heads: Heads, facts: AttentionFacts) -> nn.Module:
        """In the place of `module`, whose queries, keys and values are the parts of `qkv`."""
        ...

    def finish(self, model: PreTrainedModel, layers: str, *, whole: bool) -> int:
        """Replace what all these stand in; `layers` is the path of the list of layers. `whole`: all are here. Returns
        how many layers are fast ones."""
        ...


@dataclass(frozen=True, slots=True)
class Accelerated:
    """How many modules were replaced."""

    attention: int
    feed_forward: int
    norms: int
    layers: int


def accelerate(model: PreTrainedModel, kit: Kit, *, whole: bool) -> Accelerated:
    """Replace what can be. `whole`: all layers are here, so that the residual stream may be carried in two parts, and
    may end where nothing but logits follows."""
    # Found by their attention modules: before these are replaced.
    path, _ = layers_of(model)
    rotated = _rotary_width(model)
    attention = sum(_replace_attention(model, kit, item, rotated) for item, _ in list(attention_modules(model)))
    feed_forward = sum(_replace_mlp(model, kit, item) for item, _ in list(model.named_modules()) if item)
    norms = sum(_replace_norm(model, kit, item) for item, _ in list(model.named_modules()) if item)
    layers = kit.finish(model, path, whole=whole)
    setattr(model, _DONE, True)
    return Accelerated(attention, feed_forward, norms, layers)


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been here."""
    return hasattr(model, _DONE)


def _rotary_width(model: nn.Module) -> int | None:
    """Columns of the model's rotary tables; None if it has none, or several widths."""
    widths = {rotary.width for rotary in model.modules() if isinstance(rotary, Rotary)}
    return widths.pop() if len(widths) == 1 else None


def _replace_attention(model: nn.Module, kit: Kit, path: str, rotated: int | None) -> bool:
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
    replace_module(model, path, kit.attention(module, qkv, Heads(query, key_value, dim), facts))
    return True


def _replace_mlp(model: nn.Module, kit: Kit, path: str) -> bool:
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
    replace_module(model, path, kit.mlp(up, module.down_proj, activation))
    return True


def _replace_norm(model: nn.Module, kit: Kit, path: str) -> bool:
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        return False
    facts = norm_facts(module) if hasattr(module, "weight") and isinstance(module.weight, nn.Parameter) else None
    if facts is None:
        return False
    replace_module(model, path, kit.norm(module.weight, facts))
    return True
