"""What a module computes, found by trying it: its own forward code runs on a CPU over stand-ins for its parts.

A formula counts as a module's only if it gives the module's own result on random numbers. Classes and source code are
not looked at: a model of an unknown class gets the fast modules if it computes what they do, and is left as it is if
not.

Shape letters: T tokens, H hidden size, D head size, R rotated dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dataplane.parallel.tensor import NormArithmetic, scale_after_cast, scale_before_cast, scale_by_one_plus

_TOKENS = 3
_PROBE = "perdure_probe"

NORMS: tuple[NormArithmetic, ...] = (scale_after_cast, scale_before_cast, scale_by_one_plus)
"""Numbered as in dataplane/kernels/norm.py."""

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.silu,
    lambda x: F.gelu(x, approximate="tanh"),
    F.gelu,
)
"""Numbered as in dataplane/kernels/gated.py."""


def turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension d turns with d + R/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def turn_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension d turns with its neighbour."""
    even, odd = x[..., ::2], x[..., 1::2]
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


TURNS = {1: turn_halves, 2: turn_pairs}
"""Numbered as in dataplane/kernels/rotary.py."""


@dataclass(frozen=True, slots=True)
class NormFacts:
    epsilon: float
    # Index in NORMS.
    kind: int


@dataclass(frozen=True, slots=True)
class AttentionFacts:
    """An attention module that projects, norms per head, rotates and attends."""

    # Key of TURNS.
    layout: int
    q_norm: NormFacts | None
    k_norm: NormFacts | None
    scaling: float
    window: int | None
    softcap: float | None


def norm_facts(module: Any) -> NormFacts | None:
    """The epsilon and formula of an RMS norm with one weight; None for anything else."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters()]
    if epsilon is None or names != ["weight"] or module.weight.dim() != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    width = module.weight.shape[0]
    weight = torch.rand(width, generator=generator).to(torch.bfloat16)
    x = torch.randn(16, width, generator=generator).to(torch.bfloat16)
    sample = copy.copy(module)
    sample.__dict__["_parameters"] = {**module._parameters, "weight": nn.Parameter(weight, requires_grad=False)}
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + float(epsilon))
    wanted = _tried(lambda: sample(x))
    for kind, arithmetic in enumerate(NORMS):
        if isinstance(wanted, Tensor) and torch.equal(arithmetic(normed, weight, x.dtype), wanted):
            return NormFacts(float(epsilon), kind)
    return None


def gate_activation(module: nn.Module) -> int | None:
    """The activation of `down(activation(gate) · up)`, gate and up being one product; None for anything else."""
    names = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    gate, up = _sample(1, _TOKENS, 8, seed=1), _sample(1, _TOKENS, 8, seed=2)
    if names <= {"gate_proj", "up_proj", "down_proj"} and hasattr(module, "gate_proj"):
        parts: dict[str, nn.Module] = {"gate_proj": _Given(gate), "up_proj": _Given(up)}
    elif names == {"gate_up_proj", "down_proj"}:
        parts = {"gate_up_proj": _Given(torch.cat((gate, up), dim=-1))}
    else:
        return None
    probe = _with(module, {**parts, "down_proj": nn.Identity()})
    result = _tried(lambda: probe(gate))
    for number, activation in enumerate(ACTIVATIONS):
        if isinstance(result, Tensor) and _same(result, activation(gate) * up):
            return number
    return None


def attention_facts(module: Any, heads: tuple[int, int], dim: int, rotated: int) -> AttentionFacts | None:
    """What an attention module with q_proj, k_proj, v_proj and o_proj does between them; None for anything else.

    `heads`: of queries and keys; `rotated`: width of the rotary table.
    """
    norms = [norm_facts(getattr(module, name)) if hasattr(module, name) else None for name in ("q_norm", "k_norm")]
    given = [_sample(1, _TOKENS, count * dim, seed=n) for n, count in enumerate((heads[0], heads[1], heads[1]))]
    turn = _sample(1, _TOKENS, rotated, seed=5), _sample(1, _TOKENS, rotated, seed=6)
    mixed = _sample(1, _TOKENS, heads[0], dim, seed=7)
    seen: list[tuple[Any, ...]] = []

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        seen.append((q, k, v, mask, kwargs))
        return mixed, None

    parts: dict[str, nn.Module] = {
        name: _Given(x) for name, x in zip(("q_proj", "k_proj", "v_proj"), given, strict=True)
    }
    weights: list[Tensor | None] = [None, None]
    for index, name in enumerate(("q_norm", "k_norm")):
        if hasattr(module, name):
            norm = copy.copy(getattr(module, name))
            if norms[index] is None or norm.weight.shape != (dim,):
                return None
            weight = _sample(dim, seed=8 + index)
            weights[index] = weight
            norm.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
            parts[name] = norm
    probe = _with(module, {**parts, "o_proj": nn.Identity()})
    probe.config = copy.copy(module.config)
    probe.config._attn_implementation = _PROBE
    ALL_ATTENTION_FUNCTIONS.register(_PROBE, record)
    x = _sample(1, _TOKENS, 8, seed=9)
    result = _tried(lambda: probe(hidden_states=x, position_embeddings=turn, attention_mask=None))
    if len(seen) != 1 or not isinstance(result, tuple) or not _same(result[0], mixed.flatten(2)):
        return None
    q, k, v, mask, kwargs = seen[0]
    if mask is not None or kwargs.get("s_aux") is not None or not _same(v, _by_head(given[2], dim)):
        return None
    wanted = [_normed(_by_head(x, dim), weight, norm) for x, weight, norm in zip(given, weights, norms, strict=False)]
    for layout, formula in TURNS.items():
        if all(_same(got, _turned(x, turn, formula)) for got, x in zip((q, k), wanted, strict=True)):
            window = kwargs.get("sliding_window") or None
            return AttentionFacts(layout, norms[0], norms[1], float(kwargs["scaling"]), window, kwargs.get("softcap"))
    return None


def is_plain_layer(layer: nn.Module) -> bool:
    """Whether a decoder layer is x + A(N(x)), then x + M(N'(x)), of its four parts."""
    return _is_layer_of(layer, PLAIN_PARTS, lambda f, x: x + f[1](f[0](x)), lambda f, x: x + f[3](f[2](x)))


def is_sandwich_layer(layer: nn.Module) -> bool:
    """Whether a decoder layer is x + N2(A(N1(x))), then x + N4(M(N3(x))), of its six parts, as in Gemma 2."""
    return _is_layer_of(
        layer, SANDWICH_PARTS, lambda f, x: x + f[2](f[1](f[0](x))), lambda f, x: x + f[5](f[4](f[3](x)))
    )


PLAIN_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
SANDWICH_PARTS = (
    "input_layernorm",
    "self_attn",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "mlp",
    "post_feedforward_layernorm",
)
"""The parts of decoder layers, in the order in which they compute. The second is the attention."""

_Half = Callable[[Sequence[Callable[[Tensor], Tensor]], Tensor], Tensor]
"""(a layer's parts, x) → x after its attention, or after its feed-forward part."""


def _is_layer_of(layer: nn.Module, names: tuple[str, ...], first: _Half, second: _Half) -> bool:
    if {name for name, _ in layer.named_children()} != set(names):
        return False
    formulas = [_Formula(lambda x, n=n: torch.sin((1 + 0.3 * n) * x) + 0.2 * n * x) for n in range(len(names))]
    parts: dict[str, nn.Module] = {
        name: _Paired(f) if name == "self_attn" else f for name, f in zip(names, formulas, strict=True)
    }
    probe = _with(layer, parts)
    x = _sample(1, _TOKENS, 8, seed=3)
    result = _tried(lambda: probe(x, attention_mask=None, position_ids=None, position_embeddings=(x, x)))
    result = result[0] if isinstance(result, tuple) else result
    return isinstance(result, Tensor) and _same(result, second(formulas, first(formulas, x)))


class _Given(nn.Module):
    """Answers the same to everything."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, _: Tensor) -> Tensor:
        return self._answer


class _Formula(nn.Module):
    def __init__(self, formula: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self._formula(x)


class _Paired(nn.Module):
    """As attention modules answer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._inner = inner

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return self._inner(hidden_states), None


def _with(module: nn.Module, parts: dict[str, nn.Module]) -> Any:
    """`module` with other children; the original keeps its own."""
    probe = copy.copy(module)
    probe.__dict__ = dict(module.__dict__)
    probe._modules = {**module._modules, **parts}
    return probe


def _tried(call: Callable[[], Any]) -> Any:
    """What a probe gives; None if its code cannot run over stand-ins."""
    try:
        with torch.no_grad():
            return call()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return None


def _sample(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def _by_head(x_1TX: Tensor, dim: int) -> Tensor:
    return x_1TX.unflatten(-1, (-1, dim)).transpose(1, 2)


def _normed(x: Tensor, weight: Tensor | None, facts: NormFacts | None) -> Tensor:
    if weight is None or facts is None:
        return x
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + facts.epsilon)
    return NORMS[facts.kind](normed, weight, x.dtype)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor], formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    cos, sin = (part.unsqueeze(1) for part in turn)
    width = cos.shape[-1]
    return torch.cat((formula(x[..., :width], cos, sin), x[..., width:]), dim=-1)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)
