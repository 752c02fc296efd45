"""Brings a fitted model from the meta device to a real one and fills it, from files or with random values."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from controlplane.runtime.errors import invalid
from dataplane.models.checkpoint import Checkpoint
from dataplane.models.fitted import Fitted
from dataplane.models.pieces import Piece, Shape, whole
from dataplane.models.structure import refused
from dataplane.models.tensor_file import TensorReader

Report = Callable[[str, float], None]
"""(stage, fraction of the whole work done). Also a sign of life: called at least once a layer or tensor."""

Source = Callable[[Piece, Tensor], None]
"""Copies what a piece covers into a local tensor."""


def materialise(fitted: Fitted, dtype: torch.dtype, device: torch.device) -> None:
    """Give every tensor of the model memory on `device`. Values that files hold are left undefined, tensors are untied.

    Buffers outside the state dict are computed as the class computes them; one that stays undefined is refused.
    """
    model = fitted.model
    keep = _float32_patterns(model, dtype)
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=_dtype_of(prefix + name, parameter, keep), device=device)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            persistent = name not in module._non_persistent_buffers_set
            empty = torch.empty(buffer.shape, dtype=_dtype_of(prefix + name, buffer, keep), device=device)
            module.register_buffer(name, empty, persistent=persistent)
    for rotary in fitted.rotaries:
        rotary.place(device)
    _compute_buffers(model)


def _dtype_of(name: str, tensor: Tensor, keep_float32: re.Pattern[str] | None) -> torch.dtype:
    if keep_float32 is not None and tensor.is_floating_point() and keep_float32.search(name):
        return torch.float32
    return tensor.dtype


def _float32_patterns(model: PreTrainedModel, dtype: torch.dtype) -> re.Pattern[str] | None:
    """Names that the class keeps in float32 when the rest is in half precision (a router's correction, say)."""
    names = set(model._get_dtype_plan(dtype))
    return re.compile("|".join(rf"(^|\.){re.escape(name)}($|\.)" for name in names)) if names else None


def _compute_buffers(model: PreTrainedModel) -> None:
    for module_name, module in model.named_modules():
        names = sorted(module._non_persistent_buffers_set)
        buffers = [buffer for name in names if (buffer := getattr(module, name)) is not None]
        if not buffers:
            continue
        for buffer in buffers:
            if buffer.is_floating_point():
                buffer.fill_(float("nan"))
        # The class's own initialisation computes them; parameters marked so are passed over by it.
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        model._init_weights(module)
        for name, buffer in zip(names, buffers, strict=True):
            if buffer.is_floating_point() and bool(buffer.isnan().any()):
                raise refused(model, f"nothing computes the buffer {module_name}.{name}")


def tensors_of(fitted: Fitted) -> Iterator[tuple[Tensor, tuple[Piece, ...]]]:
    """Every tensor of the state dict that has values of its own, and what it consists of."""
    for name, tensor in fitted.model.state_dict(keep_vars=True).items():
        if name not in fitted.tied:
            yield tensor, _pieces(fitted, name, tensor)


def _pieces(fitted: Fitted, name: str, tensor: Tensor) -> tuple[Piece, ...]:
    return fitted.layout[name] if name in fitted.layout else whole(name, tensor.shape)


def tie(fitted: Fitted) -> None:
    """Let tied names share one tensor again, once it is filled."""
    for name, target in fitted.tied.items():
        parent, _, attribute = name.rpartition(".")
        owner, _, shared = target.rpartition(".")
        tensor = getattr(fitted.model.get_submodule(owner), shared)
        setattr(fitted.model.get_submodule(parent), attribute, tensor)


def file_source(checkpoint: Checkpoint, reader: TensorReader, aliases: dict[str, str]) -> Source:
    """Values from files. `aliases` are names under which a tied tensor may be stored instead."""

    def read(piece: Piece, local: Tensor) -> None:
        name = piece.source if piece.source in checkpoint.regions else aliases.get(piece.source, piece.source)
        checkpoint.read(Piece(name, piece.at, piece.to), reader, local)

    return read


def missing_tensors(fitted: Fitted, checkpoint: Checkpoint, aliases: dict[str, str]) -> list[str]:
    """Whole tensors that this rank needs and no file holds."""
    wanted = {piece.source for _, pieces in tensors_of(fitted) for piece in pieces}
    return sorted(
        name for name in wanted if name not in checkpoint.regions and aliases.get(name) not in checkpoint.regions
    )


def dummy_source(shapes: dict[str, Shape], deviation: float) -> Source:
    """Random values that depend on the tensor's name alone, so that every mesh gets the same model.

    A whole tensor is drawn at a time; vectors are ones in norms and zeros elsewhere.
    """

    def draw(piece: Piece, local: Tensor) -> None:
        shape = shapes[piece.source]
        values = torch.empty(shape, dtype=local.dtype, device=local.device)
        if len(shape) > 1:
            generator = torch.Generator(local.device).manual_seed(zlib.crc32(piece.source.encode()))
            values.normal_(0.0, deviation, generator=generator)
        else:
            values.fill_(float("norm" in piece.source))
        source, target = values, local
        for dim, (at, to) in enumerate(zip(piece.at, piece.to, strict=True)):
            source = source.narrow(dim, at[0], at[1] - at[0])
            target = target.narrow(dim, to[0], to[1] - to[0])
        target.copy_(source)

    return draw


def check_complete(fitted: Fitted, checkpoint: Checkpoint, aliases: dict[str, str]) -> None:
    """Raises Rejected naming tensors that no file holds."""
    missing = missing_tensors(fitted, checkpoint, aliases)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise invalid(f"{len(missing)} tensors are missing from the files: {shown}")
