"""Fits a whole transformers model on the meta device to a mesh.

Structure decides what is cut, and how. What each local tensor consists of is written down as pieces of the whole
tensors, for loading to read. Forward code is never rewritten: it runs over smaller modules.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from dataplane.models.fit_attention import fit_attention
from dataplane.models.fit_mlp import REPLICATED, fit_experts, fit_feed_forward
from dataplane.models.fit_stage import fit_stage, fit_vocabulary
from dataplane.models.fitted import Fitted
from dataplane.models.rotary import is_rotary, replace_rotary
from dataplane.models.structure import attention_modules, expert_modules, layers_of, refused
from dataplane.parallel.mesh import Mesh
from dataplane.parallel.split import SplitError
from dataplane.parallel.tensor import Linear


def fit(model: PreTrainedModel, mesh: Mesh) -> Fitted:
    """Cut `model` (whole, on meta) down to this rank's part. Raises Rejected, with the numbers that do not fit."""
    fitted = Fitted(model, mesh)
    try:
        _cut(fitted)
    except SplitError as error:
        raise refused(model, str(error)) from error
    return fitted


def _cut(fitted: Fitted) -> None:
    model = fitted.model
    _fit_rotary(fitted)
    fit_stage(fitted)
    with torch.device("meta"):
        for path, _ in list(attention_modules(model)):
            fit_attention(fitted, path)
        for path, _ in list(expert_modules(model)):
            fit_experts(fitted, path)
        for path, _ in list(model.named_modules()):
            if _exists(model, path):
                fit_feed_forward(fitted, path)
        fit_vocabulary(fitted)
        _fit_the_rest(fitted)


def _fit_rotary(fitted: Fitted) -> None:
    for name, module in list(fitted.model.named_modules()):
        if is_rotary(module):
            rotary = replace_rotary(module)
            fitted.rotaries.append(rotary)
            fitted.replace(name, rotary)


def _fit_the_rest(fitted: Fitted) -> None:
    """Linear layers that no step has cut are computed whole, through the common place for products."""
    layers, _ = layers_of(fitted.model)
    for path, module in list(fitted.model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        if fitted.mesh.tensor.size > 1 and path.startswith(layers) and path.rpartition(".")[2] not in REPLICATED:
            raise refused(fitted.model, f"{path} is not known to be cut over tensor ranks")
        fitted.replace(path, Linear(module.weight, module.bias))


def _exists(model: nn.Module, path: str) -> bool:
    """Whether a path still leads to a module: an earlier cut may have taken its parts away."""
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
