"""What takes the place of a model's modules on a GPU: the same arithmetic in fewer launches.

Between its layers a model of these modules carries the residual stream and what is still to be added to it (`Stream`),
so that the addition and the next norm are one launch.

Shape letters: T tokens, H hidden size, X all heads of queries, keys and values, D head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dataplane.engine.attention import Score, running_step
from dataplane.engine.attention_cuda import CudaAttentionStep, Turn
from dataplane.kernels.gated import gated
from dataplane.kernels.norm import add_rms_norm, rms_norm
from dataplane.kernels.rotary import HeadNorm
from dataplane.models.accelerate import Heads
from dataplane.models.recognise import PLAIN_PARTS, AttentionFacts, NormFacts, is_plain_layer
from dataplane.models.rotary import Rotary
from dataplane.models.structure import decoder_of, replace_module
from dataplane.parallel.tensor import FusedLinear, Linear


class Stream(NamedTuple):
    """Hidden states: their sum."""

    stream: Tensor
    delta: Tensor


class FastNorm(nn.Module):
    """An RMS norm. Of a Stream, the norm of its sum."""

    def __init__(self, weight: Tensor, epsilon: float, kind: int) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon
        self.kind = kind

    def forward(self, x: Tensor | Stream) -> Tensor:
        return self.take(x)[1] if isinstance(x, Stream) else rms_norm(x, self.weight, self.epsilon, self.kind)

    def take(self, x: Tensor | Stream) -> tuple[Tensor, Tensor]:
        """The hidden states, and their norm."""
        if isinstance(x, Stream):
            return add_rms_norm(x.stream, x.delta, self.weight, self.epsilon, self.kind)
        return x, rms_norm(x, self.weight, self.epsilon, self.kind)


class FastMLP(nn.Module):
    """Gate and up as one product, activated and multiplied in one launch."""

    def __init__(self, up: Linear, down: nn.Module, activation: int) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gated(Linear.forward(self.up, x), self.activation))


class FastAttention(nn.Module):
    """Queries, keys and values as one product; norms, rotation and the write to the cache as one launch."""

    def __init__(
        self,
        qkv: Linear,
        out: nn.Module,
        heads: Heads,
        score: Score,
        layout: int,
        norms: tuple[HeadNorm, HeadNorm] | None,
        layer: int,
    ) -> None:
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.heads = heads
        self.score = score
        self.layout = layout
        self.norms = norms
        self.perdure_layer = layer
        # Nothing follows but logits: rows that none are wanted of end here.
        self.is_last = False

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        qkv_TX = Linear.forward(self.qkv, hidden_states)[0]
        sizes = [self.heads.query, self.heads.key_value, self.heads.key_value]
        q, k, v = qkv_TX.unflatten(1, (-1, self.heads.dim)).split(sizes, dim=1)
        cos, sin = position_embeddings
        step = running_step()
        assert isinstance(step, CudaAttentionStep), "these layers run on a GPU"
        turn = Turn(cos[0], sin[0], self.layout, self.norms)
        out_THD = step.attend_prepared(self.perdure_layer, q, k, v, self.score, turn)
        if self.is_last and step.rows_N is not None:
            out_THD = out_THD[step.rows_N]
        return self.out(out_THD.flatten(1).unsqueeze(0)), None


class FastLayer(nn.Module):
    """A decoder layer with a norm before each of its two parts and a plain residual stream."""

    def __init__(self, layer: nn.Module, first: FastNorm, attention: nn.Module, second: FastNorm, mlp: nn.Module):
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, int | str | float | bool)}
        self.__dict__.update({name: value for name, value in plain.items() if name != "training"})
        self.first = first
        self.attention = attention
        self.second = second
        self.mlp = mlp

    def forward(self, hidden_states: Tensor | Stream, **kwargs: Any) -> Stream:
        stream, normed = self.first.take(hidden_states)
        mixed = self.attention(hidden_states=normed, **kwargs)[0]
        rows_N = wanted_rows() if self.is_last else None
        stream = stream if rows_N is None else stream[:, rows_N]
        stream, normed = self.second.take(Stream(stream, mixed))
        return Stream(stream, self.mlp(normed))

    @property
    def is_last(self) -> bool:
        return isinstance(self.attention, FastAttention) and self.attention.is_last


def wanted_rows() -> Tensor | None:
    """Rows of the step under way whose logits are wanted; None: all."""
    step = running_step()
    assert isinstance(step, CudaAttentionStep), "these layers run on a GPU"
    return step.rows_N


class RotaryTable(nn.Module):
    """A model's rotary table, computed once for all positions."""

    def __init__(self, rotary: Rotary, positions: int) -> None:
        super().__init__()
        self.rotary = rotary
        self._positions = positions
        self._tables: dict[tuple[torch.dtype, str | None], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, (1, T, R) each."""
        table = self._tables.get((x.dtype, layer_type))
        if table is None:
            every = torch.arange(self._positions, device=position_ids.device).unsqueeze(0)
            table = self.rotary(x, every, layer_type)
            self._tables[x.dtype, layer_type] = table
        return table[0][:, position_ids[0]], table[1][:, position_ids[0]]


class GpuKit:
    """See Kit."""

    def __init__(self, positions: int) -> None:
        """`positions`: as many as a sequence may have."""
        self._positions = positions

    def norm(self, weight_H: Tensor, facts: NormFacts) -> nn.Module:
        return FastNorm(weight_H, facts.epsilon, facts.kind)

    def mlp(self, up: Linear, down: nn.Module, activation: int) -> nn.Module:
        return FastMLP(up, down, activation)

    def attention(self, module: Any, qkv: FusedLinear, heads: Heads, facts: AttentionFacts) -> nn.Module:
        score = Score(facts.scaling, facts.window, facts.softcap)
        norms = _head_norms(module, facts)
        return FastAttention(qkv, module.o_proj, heads, score, facts.layout, norms, int(module.perdure_layer))

    def finish(self, model: PreTrainedModel, layers: str, *, whole: bool) -> int:
        count = _replace_layers(model, layers) if whole else 0
        for name, module in list(model.named_modules()):
            if isinstance(module, Rotary) and not module.by_length:
                replace_module(model, name, RotaryTable(module, self._positions))
        return count


def ends_early(model: nn.Module) -> bool:
    """Whether the model gives hidden states of those rows alone whose logits are wanted."""
    return any(isinstance(module, FastLayer) and module.is_last for module in model.modules())


def _head_norms(module: Any, facts: AttentionFacts) -> tuple[HeadNorm, HeadNorm] | None:
    if facts.q_norm is None or facts.k_norm is None:
        return None
    return _head_norm(module.q_norm.weight, facts.q_norm), _head_norm(module.k_norm.weight, facts.k_norm)


def _head_norm(weight: Tensor, facts: NormFacts) -> HeadNorm:
    return HeadNorm(weight, facts.epsilon, facts.kind)


def _replace_layers(model: PreTrainedModel, path: str) -> int:
    """All layers or none: only a layer that knows a Stream, and a last norm that does, may follow one."""
    layers: Any = model.get_submodule(path)
    decoder: Any = decoder_of(model)
    if not isinstance(getattr(decoder, "norm", None), FastNorm):
        return 0
    if not all(_is_fast(layer) and is_plain_layer(layer) for layer in layers):
        return 0
    for index, layer in enumerate(layers):
        parts = (getattr(layer, name) for name in PLAIN_PARTS)
        replace_module(model, f"{path}.{index}", FastLayer(layer, *parts))
    last: Any = model.get_submodule(f"{path}.{len(layers) - 1}")
    if isinstance(last.attention, FastAttention):
        last.attention.is_last = True
    return len(layers)


def _is_fast(layer: Any) -> bool:
    norms = (getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm"))
    return all(isinstance(norm, FastNorm) for norm in norms) and torch.is_tensor(layer.input_layernorm.weight)
