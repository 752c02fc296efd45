"""What takes the place of a model's modules on a GPU: the same arithmetic in fewer launches.

Between its layers a model of these modules carries the residual stream and what is still to be added to it (`Stream`),
so that the addition and the next norm are one launch.

Shape letters: T tokens, H hidden size, X all heads of queries, keys and values, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dataplane.engine.attention import Score, running_step
from dataplane.engine.attention_cuda import CudaAttentionStep, Turn
from dataplane.kernels.gated import gated
from dataplane.kernels.norm import add_rms_norm, rms_norm
from dataplane.kernels.rotary import HeadNorm
from dataplane.models.rotary import Rotary
from dataplane.parallel.tensor import Linear


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


@dataclass(frozen=True, slots=True)
class Heads:
    """Local head counts."""

    query: int
    key_value: int
    dim: int


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
