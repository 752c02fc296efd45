"""Finding the parts of a transformers model by their structure, not by their class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from controlplane.runtime.errors import invalid


def attention_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that call an attention function: they know their layer and their scale."""
    for name, module in model.named_modules():
        if hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            yield name, module


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold a layer's stacked experts."""
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate"):
            yield name, module


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The model below the vocabulary head. Raises Rejected where head and decoder are one module."""
    decoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(decoder, nn.Module) or decoder is model:
        raise refused(model, "it has no decoder apart from its head")
    return decoder


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers and its path: the one whose items hold the attention modules."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(True for item in module for _ in attention_modules(item)):
            return name, module
    raise refused(model, "no list of layers with attention modules was found")


def path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """Where in the tree a module is. Raises Rejected for one that the model does not have."""
    for name, module in model.named_modules():
        if module is wanted:
            return name
    raise refused(model, "it lacks an input embedding or a vocabulary head")


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Every config object that a module of `model` reads, copies included."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            found[id(config)] = config
    return list(found.values())


def set_implementation(model: PreTrainedModel, attention: str, experts: str) -> None:
    """Name the attention and experts functions in every config, also in copies that single modules hold."""
    for config in configs_of(model):
        config._attn_implementation = attention
        config._experts_implementation = experts


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def refused(model: nn.Module, why: str) -> Exception:
    """A Rejected that names the class and what it lacks."""
    return invalid(f"{type(model).__name__} cannot be served: {why}")
