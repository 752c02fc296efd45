"""A model under surgery: the module tree, and for each local tensor what it consists of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dataplane.models.pieces import Layout, Piece, part, stacked
from dataplane.models.rotary import Rotary
from dataplane.models.structure import refused, replace_module
from dataplane.parallel.mesh import Mesh
from dataplane.parallel.split import Range
from dataplane.parallel.tensor import FusedLinear, Linear, RowParallelLinear, fuse


@dataclass(slots=True)
class Fitted:
    """A model that is being cut, still on meta.

    Paths name modules; a `Range` names rows or columns of whole tensors. Each cut replaces a module and writes down
    its pieces.
    """

    model: PreTrainedModel
    mesh: Mesh
    # Pieces by local tensor name.
    layout: Layout = field(default_factory=dict)
    # Local name → local name of the tensor it shares memory with.
    tied: dict[str, str] = field(default_factory=dict)
    rotaries: list[Rotary] = field(default_factory=list)

    def linear(self, path: str) -> nn.Linear:
        """The plain linear layer at `path`. Raises Rejected for anything else."""
        module = self.model.get_submodule(path)
        if type(module) is not nn.Linear:
            raise refused(self.model, f"{path} is a {type(module).__name__} where a linear layer is cut")
        return module

    def replace(self, path: str, module: nn.Module) -> None:
        replace_module(self.model, path, module)

    def keep_rows(self, path: str, ranges: Sequence[Range]) -> None:
        """Keep `ranges` of a linear layer's outputs, one behind the other."""
        self.replace(path, Linear(*self._rows(path, [path], [ranges])))

    def keep_columns(self, path: str, at: Range) -> None:
        """Keep the inputs `at` of a linear layer; its partial results are summed over the tensor group."""
        linear = self.linear(path)
        rows = linear.weight.shape[0]
        weight = torch.empty(rows, at[1] - at[0], dtype=linear.weight.dtype, device="meta")
        self.replace(path, RowParallelLinear(weight, linear.bias, self.mesh.tensor))
        self.layout[f"{path}.weight"] = (part(f"{path}.weight", linear.weight.shape, 1, at),)

    def fuse(self, paths: Sequence[str], ranges: Sequence[Sequence[Range]]) -> None:
        """Compute several linear layers of one input as one, each with only `ranges` of its outputs."""
        if len({self.linear(path).bias is None for path in paths}) > 1:
            for path, kept in zip(paths, ranges, strict=True):
                self.keep_rows(path, kept)
            return
        weight, bias = self._rows(f"{paths[0]}.fused", paths, ranges)
        fused = FusedLinear(weight, bias, [_length(kept) for kept in ranges])
        for path, module in zip(paths, fuse(fused, len(paths)), strict=True):
            self.replace(path, module)

    def keep_part(self, path: str, name: str, dim: int, at: Range) -> None:
        """Keep `at` of the parameter `name` of the module at `path` along `dim`."""
        tensor = getattr(self.model.get_submodule(path), name)
        shape = list(tensor.shape)
        shape[dim] = at[1] - at[0]
        whole_name = f"{path}.{name}"
        self.set_tensor(path, name, shape, [part(whole_name, tensor.shape, dim, at)])

    def set_tensor(self, path: str, name: str, shape: Iterable[int], pieces: Iterable[Piece]) -> None:
        """Give the module at `path` a parameter of another shape, made of `pieces`."""
        module = self.model.get_submodule(path)
        old: Tensor = getattr(module, name)
        empty = torch.empty(*shape, dtype=old.dtype, device="meta")
        module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.layout[f"{path}.{name}"] = tuple(pieces)

    def _rows(
        self, target: str, paths: Sequence[str], ranges: Sequence[Sequence[Range]]
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the kept rows of several layers, to stand at `target`."""
        linears = [self.linear(path) for path in paths]
        made: list[Tensor | None] = []
        for kind in ("weight", "bias"):
            tensors = [getattr(linear, kind) for linear in linears]
            if tensors[0] is None:
                made.append(None)
                continue
            self.layout[f"{target}.{kind}"] = stacked(
                (f"{path}.{kind}", tuple(tensor.shape), at)
                for path, tensor, kept in zip(paths, tensors, ranges, strict=True)
                for at in kept
            )
            rows = sum(_length(kept) for kept in ranges)
            made.append(torch.empty(rows, *tensors[0].shape[1:], dtype=tensors[0].dtype, device="meta"))
        weight, bias = made
        assert weight is not None
        return weight, bias


def _length(ranges: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in ranges)
