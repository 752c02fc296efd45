"""Cuts feed-forward modules and stacked experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from dataplane.models.fitted import Fitted
from dataplane.models.pieces import Piece, part
from dataplane.models.structure import refused
from dataplane.parallel.expert import ExpertShard, grouped_matmul
from dataplane.parallel.split import Range, SplitError, cut


@dataclass(frozen=True, slots=True)
class _Shape:
    """A feed-forward module by the names of its linear layers: `up` make the inner features, `down` takes them."""

    up: tuple[str, ...]
    down: str
    # One `up` layer makes gate and up, one after the other.
    halves: bool = False


_SHAPES = (
    _Shape(("gate_proj", "up_proj"), "down_proj"),
    _Shape(("gate_up_proj",), "down_proj", halves=True),
    _Shape(("w1", "w3"), "w2"),
    _Shape(("up_proj",), "down_proj"),
    _Shape(("fc1",), "fc2"),
    _Shape(("dense_h_to_4h",), "dense_4h_to_h"),
)

REPLICATED = {"q_a_proj", "kv_a_proj_with_mqa", "gate", "router", "shared_expert_gate"}
"""Linear layers inside a decoder layer that every rank computes whole."""


def fit_feed_forward(fitted: Fitted, path: str) -> bool:
    """Cut the module at `path` if it is a feed-forward one; say whether it was. Raises SplitError."""
    module = fitted.model.get_submodule(path)
    linears = {name for name, child in module.named_children() if type(child) is nn.Linear}
    shape = next((item for item in _SHAPES if linears == {*item.up, item.down}), None)
    if shape is None:
        return False
    inner = fitted.linear(f"{path}.{shape.down}").in_features
    at = _inner(fitted, path, inner)
    ups = [f"{path}.{name}" for name in shape.up]
    if shape.halves:
        fitted.keep_rows(ups[0], [at, (inner + at[0], inner + at[1])])
    elif len(ups) > 1:
        fitted.fuse(ups, [[at]] * len(ups))
    else:
        fitted.keep_rows(ups[0], [at])
    fitted.keep_columns(f"{path}.{shape.down}", at)
    return True


def fit_experts(fitted: Fitted, path: str) -> None:
    """Keep this rank's experts, and its part of their inner features. Raises Rejected, SplitError."""
    module: Any = fitted.model.get_submodule(path)
    mesh = fitted.mesh
    ways = mesh.degrees.expert
    total = int(module.num_experts)
    if total < ways:
        raise SplitError(f"{path}: {total} experts cannot be cut over {ways} ranks")
    first, last = cut(total, ways, mesh.expert_rank)
    module.perdure_experts = ExpertShard(first, last - first, mesh.tensor)
    module.matmul = F.linear
    module.grouped_matmul = grouped_matmul
    if mesh.tensor.size > 1:
        _cut_experts(fitted, path, module, (first, last))


def _cut_experts(fitted: Fitted, path: str, module: Any, experts: Range) -> None:
    inner_ranks = fitted.mesh.tensor.size // fitted.mesh.degrees.expert
    inner_rank = fitted.mesh.tensor.index % inner_ranks
    inner_dim = 1 if module.is_transposed else 2
    inner = int(module.down_proj.shape[inner_dim])
    if inner < inner_ranks:
        raise SplitError(f"{path}: {inner} inner features cannot be cut over {inner_ranks} ranks")
    at = cut(inner, inner_ranks, inner_rank)
    ups = _up_ranges(module, inner, at)
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    _keep(fitted, path, up_name, experts, 3 - inner_dim, ups)
    _keep(fitted, path, "down_proj", experts, inner_dim, [at])
    if module.has_bias:
        _keep(fitted, path, f"{up_name}_bias", experts, 1, ups)
        # Added to a partial result: by one of the ranks that share an expert.
        hidden = int(module.down_proj_bias.shape[1])
        _keep(fitted, path, "down_proj_bias", experts, 1, [(0, hidden)], empty=inner_rank > 0)
    known = {up_name, "down_proj", f"{up_name}_bias", "down_proj_bias"}
    odd = {name for name, _ in module.named_parameters()} - known
    if odd:
        raise refused(fitted.model, f"{path}.{sorted(odd)[0]} of the experts is not known to be cut")


def _up_ranges(module: Any, inner: int, at: Range) -> list[Range]:
    if not module.has_gate:
        return [at]
    if module.is_concatenated:
        return [at, (inner + at[0], inner + at[1])]
    # Gate and up alternate.
    return [(2 * at[0], 2 * at[1])]


def _keep(
    fitted: Fitted, path: str, name: str, experts: Range, dim: int, ranges: list[Range], empty: bool = False
) -> None:
    shape = list(getattr(fitted.model.get_submodule(path), name).shape)
    pieces: list[Piece] = []
    to = 0
    for at in ranges:
        cells = part(f"{path}.{name}", shape, dim, at, to)
        rows = ((0, experts[1] - experts[0]), *cells.to[1:])
        pieces.append(Piece(cells.source, (experts, *cells.at[1:]), rows))
        to += at[1] - at[0]
    shape[0], shape[dim] = experts[1] - experts[0], to
    fitted.set_tensor(path, name, shape, [] if empty else pieces)


def _inner(fitted: Fitted, path: str, inner: int) -> Range:
    ranks = fitted.mesh.tensor.size
    if inner < ranks:
        raise SplitError(f"{path}: {inner} inner features cannot be cut over {ranks} ranks")
    return cut(inner, ranks, fitted.mesh.tensor.index)
