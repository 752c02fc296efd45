"""Fits a whole transformers model on the meta device to a mesh.

Structure decides what is cut, and how; where the class brings a plan of its own it is a check, never the source.
What each local tensor consists of is written down as pieces of the whole tensors, for loading to read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from dataplane.models.pieces import Layout, Shape, whole
from dataplane.models.rotary import Rotary, is_rotary, replace_rotary
from dataplane.models.structure import expert_modules, replace_module
from dataplane.parallel.expert import ExpertShard
from dataplane.parallel.mesh import Mesh
from dataplane.parallel.tensor import Linear


@dataclass(slots=True)
class Fitted:
    """A model after surgery, still on meta."""

    model: PreTrainedModel
    layout: Layout = field(default_factory=dict)
    # Local name → local name of the tensor it shares memory with.
    tied: dict[str, str] = field(default_factory=dict)
    rotaries: list[Rotary] = field(default_factory=list)


def fit(model: PreTrainedModel, mesh: Mesh) -> Fitted:
    """Cut `model` (whole, on meta) down to this rank's part. Raises Rejected, SplitError."""
    fitted = Fitted(model)
    _fit_rotary(fitted)
    with torch.device("meta"):
        _fit_experts(fitted, mesh)
        _fit_linears(fitted)
    if model.config.tie_word_embeddings:
        fitted.tied = dict(model.all_tied_weights_keys)
    return fitted


def _fit_rotary(fitted: Fitted) -> None:
    for name, module in list(fitted.model.named_modules()):
        if is_rotary(module):
            rotary = replace_rotary(module)
            fitted.rotaries.append(rotary)
            replace_module(fitted.model, name, rotary)


def _fit_experts(fitted: Fitted, mesh: Mesh) -> None:
    for _, module in expert_modules(fitted.model):
        module.perdure_experts = ExpertShard(0, int(module.num_experts), mesh.tensor)  # type: ignore[assignment,arg-type]
        module.matmul = nn.functional.linear  # type: ignore[assignment]


def _fit_linears(fitted: Fitted) -> None:
    """What no earlier step has cut is computed whole, through the common place for products."""
    for name, module in list(fitted.model.named_modules()):
        if type(module) is nn.Linear:
            replace_module(fitted.model, name, Linear(module.weight, module.bias))
            fitted.layout[f"{name}.weight"] = whole(f"{name}.weight", _shape(module.weight))


def _shape(tensor: torch.Tensor) -> Shape:
    return tuple(tensor.shape)
