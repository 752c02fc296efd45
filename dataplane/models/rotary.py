"""Rotary tables whose frequencies depend on nothing but a request's own position and length.

transformers' dynamic and longrope variants choose frequencies by the largest position in the flattened batch, so that
requests of one step change each other's tokens, and the dynamic one reads it back from the device. Here each token
chooses by the length its request may reach (prompt and all tokens it may still get), which no batch, chunk or
replay changes. The model's own module is the source of the frequencies and of the layout of cos and sin.

Shape letters: T tokens of the step, F frequencies, D rotated dimensions.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from controlplane.runtime.errors import invalid


class RotaryLayout(Enum):
    """How F frequencies become the columns of cos and sin."""

    REPEATED = "repeated"
    INTERLEAVED = "interleaved"
    HALF = "half"


def _lay_out(angles_TF: Tensor, layout: RotaryLayout) -> Tensor:
    if layout is RotaryLayout.REPEATED:
        return torch.cat((angles_TF, angles_TF), dim=-1)
    if layout is RotaryLayout.INTERLEAVED:
        return torch.repeat_interleave(angles_TF, 2, dim=-1)
    return angles_TF


@dataclass(frozen=True, slots=True)
class Frequencies:
    """One rotary variant: a plain table, or one that depends on a request's length."""

    base_F: Tensor
    scaling: float
    # longrope: the set for requests longer than `threshold`.
    long_F: Tensor | None = None
    # dynamic: (theta, factor, dimensions); the base grows with lengths beyond `threshold`.
    growth: tuple[float, float, int] | None = None
    threshold: int = 0

    @property
    def by_length(self) -> bool:
        return self.long_F is not None or self.growth is not None

    def to(self, device: torch.device) -> Frequencies:
        long_F = None if self.long_F is None else self.long_F.to(device)
        return Frequencies(self.base_F.to(device), self.scaling, long_F, self.growth, self.threshold)

    def rows(self, lengths_T: Tensor | None) -> Tensor:
        """(F,), or (T, F) where the length decides. `lengths_T` absent: all requests are short."""
        if lengths_T is None or not self.by_length:
            return self.base_F
        if self.long_F is not None:
            return torch.where(lengths_T.unsqueeze(-1) > self.threshold, self.long_F, self.base_F)
        assert self.growth is not None
        theta, factor, dims = self.growth
        lengths = lengths_T.clamp(min=self.threshold).to(torch.float64)
        base_T = theta * ((factor * lengths / self.threshold) - (factor - 1)) ** (dims / (dims - 2))
        powers_F = torch.arange(0, dims, 2, device=lengths_T.device, dtype=torch.float64) / dims
        grown_TF = (1.0 / base_T.unsqueeze(-1) ** powers_F).float()
        return torch.where(lengths_T.unsqueeze(-1) > self.threshold, grown_TF, self.base_F)


class Rotary(nn.Module):
    """Takes the place of a model's `rotary_emb`. Set `lengths_T` before each forward pass where `by_length`."""

    def __init__(self, frequencies: dict[str | None, Frequencies], layout: RotaryLayout, casts: bool) -> None:
        super().__init__()
        self._frequencies = frequencies
        self._layout = layout
        self._casts = casts
        self.lengths_T: Tensor | None = None

    @property
    def by_length(self) -> bool:
        return any(item.by_length for item in self._frequencies.values())

    @property
    def width(self) -> int:
        """Columns of cos and sin."""
        counts = {item.base_F.numel() for item in self._frequencies.values()}
        assert len(counts) == 1, "one table has layers of several widths"
        return counts.pop() * (1 if self._layout is RotaryLayout.HALF else 2)

    def place(self, device: torch.device) -> None:
        """Move the frequencies; they are no state of the module."""
        self._frequencies = {key: item.to(device) for key, item in self._frequencies.items()}

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, (1, T, D) each, for positions (1, T)."""
        chosen = self._frequencies[layer_type]
        angles = position_ids[..., None].float() * chosen.rows(self.lengths_T).to(position_ids.device)
        laid_out = _lay_out(angles, self._layout)
        cos, sin = laid_out.cos() * chosen.scaling, laid_out.sin() * chosen.scaling
        return (cos.to(x.dtype), sin.to(x.dtype)) if self._casts else (cos, sin)


def is_rotary(module: nn.Module) -> bool:
    """Whether a module computes rotary tables from inverse frequencies."""
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))


def replace_rotary(module: nn.Module) -> Rotary:
    """Our table for the model's rotary `module` (any device; only its class and config are used).

    Raises Rejected for a variant or a layout that is not known.
    """
    with torch.device("cpu"):
        # On a copy: a module may write to its config, and the model's own must stay as it is.
        real: Any = type(module)(config=copy.deepcopy(module.config))
    kinds = real.rope_type if isinstance(real.rope_type, dict) else {None: real.rope_type}
    frequencies = {key: _frequencies(real, key, kind) for key, kind in kinds.items()}
    key = next(iter(frequencies))
    layout, casts = _probe(real, key, frequencies[key])
    return Rotary(frequencies, layout, casts)


_PLAIN = {"default", "linear", "llama3", "yarn", "proportional"}


def _frequencies(real: Any, key: str | None, kind: str) -> Frequencies:
    prefix = "" if key is None else f"{key}_"
    base_F = getattr(real, f"{prefix}inv_freq").float()
    scaling = float(getattr(real, f"{prefix}attention_scaling"))
    if kind in _PLAIN:
        return Frequencies(base_F, scaling)
    config = real.config
    parameters = config.rope_parameters if key is None else config.rope_parameters[key]
    kwargs = {} if key is None else {"layer_type": key}
    if kind == "longrope":
        threshold = int(parameters["original_max_position_embeddings"])
        long_F, _ = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=threshold + 1, **kwargs)
        return Frequencies(base_F, scaling, long_F=long_F.float(), threshold=threshold)
    if kind == "dynamic":
        growth = (float(parameters["rope_theta"]), float(parameters["factor"]), 2 * base_F.numel())
        return Frequencies(base_F, scaling, growth=growth, threshold=int(config.max_position_embeddings))
    raise invalid(f"{type(real).__name__} uses the rotary variant {kind!r}, which is not supported")


def _probe(real: Any, key: str | None, frequencies: Frequencies) -> tuple[RotaryLayout, bool]:
    """Layout and result type, by comparison with what the model's own module gives for a few positions."""
    positions = torch.arange(4).unsqueeze(0)
    arguments = () if key is None else (key,)
    cos, sin = real(torch.zeros(1, 4, 1, dtype=torch.float32), positions, *arguments)
    half, _ = real(torch.zeros(1, 4, 1, dtype=torch.bfloat16), positions, *arguments)
    for layout in RotaryLayout:
        angles = _lay_out(positions[..., None].float() * frequencies.base_F, layout)
        ours = angles.cos() * frequencies.scaling, angles.sin() * frequencies.scaling
        if all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(ours, (cos, sin), strict=True)):
            return layout, half.dtype == torch.bfloat16
    raise invalid(f"{type(real).__name__} lays out its rotary table in an unknown way")
