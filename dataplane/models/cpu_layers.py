"""What takes the place of a model's modules on a CPU: the same arithmetic in fewer and larger operations.

A small step spends much of its time between its products: an operation costs a microsecond or two whatever its size,
and a class's own code takes some ninety a layer. These modules take half of them: queries and keys are normed and
rotated together, sums are taken in place, and nothing is looked up twice.

A row has the same bits in any batch. So what is not exactly rounded, and may come out otherwise in a vector than in
the rest that fills none, is left to operations that work row by row, or is what the class itself does.

Shape letters: T tokens, H hidden size, X all heads of queries, keys and values, N heads of queries and keys, D head
size, R rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dataplane.engine.attention import Score, running_step
from dataplane.engine.attention_cpu import CpuAttentionStep
from dataplane.models.accelerate import Heads
from dataplane.models.recognise import (
    ACTIVATIONS,
    NORMS,
    PLAIN_PARTS,
    SANDWICH_PARTS,
    TURNS,
    AttentionFacts,
    NormFacts,
    is_plain_layer,
    is_sandwich_layer,
    turn_halves,
)
from dataplane.models.structure import replace_module
from dataplane.parallel.tensor import FusedLinear, Linear, scale_after_cast, scale_by_one_plus


class CpuNorm(nn.Module):
    """An RMS norm over the last dimension; of heads with a weight each where `weight` is (N, D)."""

    def __init__(self, weight: Tensor, facts: NormFacts) -> None:
        super().__init__()
        arithmetic = NORMS[facts.kind]
        self.weight = weight
        self._after_cast = arithmetic is scale_after_cast
        scale = 1.0 + weight.float() if arithmetic is scale_by_one_plus else weight.detach().float()
        width = weight.shape[-1]
        # x / sqrt(mean(x²) + ε) = x · sqrt(n) / sqrt(sum(x²) + n ε)
        self._root = width**0.5
        # A tensor: a number is made one at every call, which takes longer than the addition.
        self._floor = torch.tensor(width * facts.epsilon, dtype=torch.float32, device="cpu")
        self._scale = weight.detach() if self._after_cast else scale * self._root

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.clone() if x.dtype == torch.float32 else x.float()
        length = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        inverse = length.mul_(length).add_(self._floor).rsqrt_()
        if self._after_cast:
            return x32.mul_(inverse.mul_(self._root)).to(x.dtype).mul_(self._scale)
        return x32.mul_(inverse).mul_(self._scale).to(x.dtype)


class CpuMLP(nn.Module):
    """Gate and up as one product."""

    def __init__(self, up: Linear, down: nn.Module, activation: int) -> None:
        super().__init__()
        self.up = up
        self.down = down
        self._activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = Linear.forward(self.up, x).chunk(2, dim=-1)
        return self.down.forward(self._activation(gate).mul_(up))


class CpuAttention(nn.Module):
    """Queries, keys and values as one product, queries and keys normed and rotated as one."""

    def __init__(
        self,
        qkv: Linear,
        out: nn.Module,
        heads: Heads,
        score: Score,
        layout: int,
        norms: tuple[nn.Module | None, nn.Module | None],
        layer: int,
    ) -> None:
        """`norms`: the first of queries and keys together, or where there is a second, of queries alone."""
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.heads = heads
        self.score = score
        self.layout = layout
        self.norm, self.key_norm = norms
        self.perdure_layer = layer

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        heads = self.heads
        x_THD = Linear.forward(self.qkv, hidden_states).view(hidden_states.shape[1], -1, heads.dim)
        qk_TND, v_TKD = x_THD.split((heads.query + heads.key_value, heads.key_value), dim=1)
        qk_TND = self._normed(qk_TND)
        step = running_step()
        assert isinstance(step, CpuAttentionStep), "these layers run on a CPU"
        qk_TND = turned(qk_TND, *step.turn(position_embeddings, self.layout), self.layout)
        q_THD, k_TKD = qk_TND.split((heads.query, heads.key_value), dim=1)
        out_THD = step.attend(self.perdure_layer, q_THD, k_TKD, v_TKD, self.score)
        return self.out.forward(out_THD.view(1, out_THD.shape[0], -1)), None

    def _normed(self, qk_TND: Tensor) -> Tensor:
        norm, key_norm = self.norm, self.key_norm
        if norm is None:
            return qk_TND
        if key_norm is None:
            return norm(qk_TND)
        q_THD, k_TKD = qk_TND.split((self.heads.query, self.heads.key_value), dim=1)
        return torch.cat((norm(q_THD), key_norm(k_TKD)), dim=1)


def turned(x_TND: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, layout: int) -> Tensor:
    """Rotated as TURNS[layout] does it, with the signs already in the sines."""
    width = cos_T1R.shape[-1]
    part = x_TND if width == x_TND.shape[-1] else x_TND[..., :width]
    if TURNS[layout] is turn_halves:
        other = torch.roll(part, width // 2, -1)
    else:
        other = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    result = (part * cos_T1R).add_(other.mul_(sin_T1R) if other.dtype == sin_T1R.dtype else other * sin_T1R)
    result = result.to(x_TND.dtype)
    return result if part is x_TND else torch.cat((result, x_TND[..., width:]), dim=-1)


class CpuLayer(nn.Module):
    """A decoder layer: attention, then feed-forward, each added to the residual stream."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...]) -> None:
        """`names`: of the layer's parts, in their order."""
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, int | str | float | bool)}
        self.__dict__.update({name: value for name, value in plain.items() if name != "training"})
        half = len(names) // 2
        self.before_attention, self.attention = (getattr(layer, name) for name in names[:2])
        self.after_attention = getattr(layer, names[2]) if half == 3 else None
        self.before_mlp, self.mlp = (getattr(layer, name) for name in names[half : half + 2])
        self.after_mlp = getattr(layer, names[5]) if half == 3 else None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # By `forward`: what nn.Module does around it costs as much as a small operation.
        mixed = self.attention.forward(self.before_attention.forward(hidden_states), **kwargs)[0]
        mixed = mixed if self.after_attention is None else self.after_attention.forward(mixed)
        hidden_states = hidden_states + mixed
        given = self.mlp.forward(self.before_mlp.forward(hidden_states))
        given = given if self.after_mlp is None else self.after_mlp.forward(given)
        return hidden_states + given


class CpuKit:
    """See Kit."""

    def norm(self, weight_H: Tensor, facts: NormFacts) -> nn.Module:
        return CpuNorm(weight_H, facts)

    def mlp(self, up: Linear, down: nn.Module, activation: int) -> nn.Module:
        return CpuMLP(up, down, activation)

    def attention(self, module: Any, qkv: FusedLinear, heads: Heads, facts: AttentionFacts) -> nn.Module:
        score = Score(facts.scaling, facts.window, facts.softcap)
        norms = _head_norms(module, heads, facts)
        return CpuAttention(qkv, module.o_proj, heads, score, facts.layout, norms, int(module.perdure_layer))

    def finish(self, model: PreTrainedModel, layers: str, *, whole: bool) -> int:
        kinds: tuple[tuple[Callable[[nn.Module], bool], tuple[str, ...]], ...] = (
            (is_plain_layer, PLAIN_PARTS),
            (is_sandwich_layer, SANDWICH_PARTS),
        )
        count = 0
        for name, layer in list(model.get_submodule(layers).named_children()):
            names = next((names for fits, names in kinds if fits(layer)), None)
            if names is not None:
                replace_module(model, f"{layers}.{name}", CpuLayer(layer, names))
                count += 1
        return count


def _head_norms(module: Any, heads: Heads, facts: AttentionFacts) -> tuple[nn.Module | None, nn.Module | None]:
    q, k = facts.q_norm, facts.k_norm
    if q is None or k is None:
        return None, None
    q_D, k_D = module.q_norm.weight.detach(), module.k_norm.weight.detach()
    if q != k:
        return CpuNorm(q_D, q), CpuNorm(k_D, k)
    return CpuNorm(torch.stack([q_D] * heads.query + [k_D] * heads.key_value), q), None
