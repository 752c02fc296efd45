"""Cuts an attention module by heads. Its forward code is left as it is: it sees a module with fewer heads.

Known structures: separate query, key and value projections; one projection of all three, by parts (Phi-3) or by heads
(GPT-NeoX); multi-head latent attention (DeepSeek). Norms of queries and keys by the shape of their weights. Anything
else in the module is refused by name, for a tensor degree above 1.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dataplane.models.fitted import Fitted
from dataplane.models.pieces import part, whole
from dataplane.models.structure import refused
from dataplane.parallel.split import HeadSplit, Range, split_heads
from dataplane.parallel.tensor import (
    FullWidthNorm,
    NormArithmetic,
    scale_after_cast,
    scale_before_cast,
    scale_by_one_plus,
)

_SEPARATE = ("q_proj", "k_proj", "v_proj")
_OUTPUTS = ("o_proj", "out_proj", "dense")
_FUSED_BY_PARTS = {"Phi3Attention"}
_FUSED_BY_HEADS = {"GPTNeoXAttention"}
_LATENT_REPLICATED = {"q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"}


@dataclass(frozen=True, slots=True)
class _Heads:
    """Head counts of the whole module and this rank's share."""

    query: int
    key_value: int
    split: HeadSplit


def fit_attention(fitted: Fitted, path: str) -> None:
    """Fuse what can be computed at once, and keep this rank's heads. Raises Rejected, SplitError."""
    module = fitted.model.get_submodule(path)
    children = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    if fitted.mesh.tensor.size == 1:
        if children.issuperset(_SEPARATE):
            paths = [f"{path}.{name}" for name in _SEPARATE]
            fitted.fuse(paths, [[(0, fitted.linear(item).out_features)] for item in paths])
        return
    config: Any = module.config
    query, key_value = int(config.num_attention_heads), int(getattr(config, "num_key_value_heads", 0) or 0)
    key_value = key_value or query
    heads = _Heads(query, key_value, split_heads(query, key_value, fitted.mesh.tensor.size, fitted.mesh.tensor.index))
    known = _cut_projections(fitted, path, module, children, heads)
    for name in sorted(children - known):
        _cut_norm(fitted, f"{path}.{name}", name, heads)
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[:1] != (heads.query,):
            raise refused(fitted.model, f"{path}.{name} of shape {list(parameter.shape)} cannot be cut by heads")
        fitted.keep_part(path, name, 0, heads.split.query)
    _set_local_counts(module, heads.split)


def _cut_projections(fitted: Fitted, path: str, module: nn.Module, children: set[str], heads: _Heads) -> set[str]:
    """Cut what makes queries, keys and values, and what takes the result. Returns the names of all it understood."""
    kind = type(module).__name__
    if "kv_b_proj" in children:
        known, value_dim = _cut_latent(fitted, path, children, heads)
    elif children.issuperset(_SEPARATE):
        known, value_dim = _cut_separate(fitted, path, heads)
    elif "qkv_proj" in children and kind in _FUSED_BY_PARTS:
        known, value_dim = _cut_by_parts(fitted, path, module, heads)
    elif "query_key_value" in children and kind in _FUSED_BY_HEADS:
        known, value_dim = _cut_by_heads(fitted, path, heads)
    else:
        raise refused(fitted.model, f"{path} ({kind}) has no projections that are known to be cut by heads")
    outputs = [name for name in _OUTPUTS if name in children]
    if len(outputs) != 1 or fitted.linear(f"{path}.{outputs[0]}").in_features != heads.query * value_dim:
        raise refused(fitted.model, f"{path} has no output projection of {heads.query} heads of {value_dim}")
    fitted.keep_columns(f"{path}.{outputs[0]}", _scaled(heads.split.query, value_dim))
    return known | set(outputs)


def _cut_separate(fitted: Fitted, path: str, heads: _Heads) -> tuple[set[str], int]:
    counts = (heads.query, heads.key_value, heads.key_value)
    kept = (heads.split.query, heads.split.key_value, heads.split.key_value)
    dims = [_per_head(fitted, f"{path}.{name}", count) for name, count in zip(_SEPARATE, counts, strict=True)]
    if dims[0] != dims[1]:
        raise refused(fitted.model, f"{path} has queries of size {dims[0]} and keys of size {dims[1]} a head")
    fitted.fuse(
        [f"{path}.{name}" for name in _SEPARATE],
        [[_scaled(at, dim)] for at, dim in zip(kept, dims, strict=True)],
    )
    return set(_SEPARATE), dims[2]


def _cut_by_parts(fitted: Fitted, path: str, module: Any, heads: _Heads) -> tuple[set[str], int]:
    """Rows: all queries, all keys, all values. The forward code takes the counts from its config."""
    dim = _per_head(fitted, f"{path}.qkv_proj", heads.query + 2 * heads.key_value)
    keys, values = heads.query * dim, (heads.query + heads.key_value) * dim
    query, key_value = _scaled(heads.split.query, dim), _scaled(heads.split.key_value, dim)
    fitted.keep_rows(f"{path}.qkv_proj", [query, _moved(key_value, keys), _moved(key_value, values)])
    module.config = copy.copy(module.config)
    module.config.num_attention_heads = heads.split.query_heads
    return {"qkv_proj"}, dim


def _cut_by_heads(fitted: Fitted, path: str, heads: _Heads) -> tuple[set[str], int]:
    """Rows: head by head, each with its query, key and value."""
    rows = _per_head(fitted, f"{path}.query_key_value", heads.query)
    fitted.keep_rows(f"{path}.query_key_value", [_scaled(heads.split.query, rows)])
    return {"query_key_value"}, rows // 3


def _cut_latent(fitted: Fitted, path: str, children: set[str], heads: _Heads) -> tuple[set[str], int]:
    """Latents are computed on every rank; what expands them is cut by heads."""
    queries = "q_b_proj" if "q_b_proj" in children else "q_proj"
    for name in (queries, "kv_b_proj"):
        fitted.keep_rows(
            f"{path}.{name}", [_scaled(heads.split.query, _per_head(fitted, f"{path}.{name}", heads.query))]
        )
    value_dim = int(getattr(fitted.model.get_submodule(path), "v_head_dim", 0))  # type: ignore[arg-type]
    return {queries, "kv_b_proj"} | (children & _LATENT_REPLICATED), value_dim


def _cut_norm(fitted: Fitted, path: str, name: str, heads: _Heads) -> None:
    module = fitted.model.get_submodule(path)
    count, at, copies = _side(fitted, path, name, heads)
    lists = [(child_name, child) for child_name, child in module.named_children() if isinstance(child, nn.ModuleList)]
    if len(lists) == 1 and len(lists[0][1]) == count:
        _slice_list(fitted, f"{path}.{lists[0][0]}", lists[0][1], at)
        return
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or any(True for _ in module.children()):
        raise refused(fitted.model, f"{path} is not known to be cut by heads")
    head_dim = int(getattr(fitted.model.get_submodule(path.rpartition(".")[0]), "head_dim", 0))  # type: ignore[arg-type]
    if tuple(weight.shape) == (head_dim,):
        return
    if tuple(weight.shape) == (count, head_dim):
        fitted.keep_part(path, "weight", 0, at)
    elif tuple(weight.shape) == (count * head_dim,) and getattr(module, "bias", None) is None:
        _cut_full_width(fitted, path, module, _scaled(at, head_dim), copies)
    else:
        raise refused(fitted.model, f"{path} of shape {list(weight.shape)} cannot be cut by heads")


def _side(fitted: Fitted, path: str, name: str, heads: _Heads) -> tuple[int, Range, int]:
    """Whether a norm is of queries or of keys: its head count, this rank's heads, and how many ranks hold them."""
    if name.startswith(("q_", "query_")):
        return heads.query, heads.split.query, 1
    if name.startswith(("k_", "key_")):
        return heads.key_value, heads.split.key_value, heads.split.copies
    raise refused(fitted.model, f"{path} is not known to be cut by heads")


def _slice_list(fitted: Fitted, path: str, modules: nn.ModuleList, at: Range) -> None:
    fitted.replace(path, nn.ModuleList(list(modules)[slice(*at)]))
    for local, source in enumerate(range(*at)):
        for name, parameter in modules[source].named_parameters():
            fitted.layout[f"{path}.{local}.{name}"] = whole(f"{path}.{source}.{name}", parameter.shape)


def _cut_full_width(fitted: Fitted, path: str, module: Any, at: Range, copies: int) -> None:
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    width = module.weight.shape[0]
    arithmetic = _arithmetic(module, epsilon)
    if epsilon is None or arithmetic is None:
        raise refused(fitted.model, f"{path} normalises over all heads by an unknown formula")
    weight = torch.empty(at[1] - at[0], dtype=module.weight.dtype, device="meta")
    fitted.layout[f"{path}.weight"] = (part(f"{path}.weight", module.weight.shape, 0, at),)
    fitted.replace(path, FullWidthNorm(weight, float(epsilon), width, copies, fitted.mesh.tensor, arithmetic))


def _arithmetic(module: Any, epsilon: float | None) -> NormArithmetic | None:
    """The formula that gives the module's own bits on a sample in half precision."""
    with torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        width = module.weight.shape[0]
        weight = torch.rand(width, generator=generator).to(torch.bfloat16)
        x = torch.randn(16, width, generator=generator).to(torch.bfloat16)
        sample = copy.copy(module)
        sample.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
        wanted = sample(x)
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + (epsilon or 0.0))
        for arithmetic in (scale_after_cast, scale_before_cast, scale_by_one_plus):
            if torch.equal(arithmetic(normed, weight, x.dtype), wanted):
                return arithmetic
    return None


def _set_local_counts(module: Any, split: HeadSplit) -> None:
    """Attributes that forward code reads as its own counts."""
    local = {
        "num_heads": split.query_heads,
        "num_attention_heads": split.query_heads,
        "num_key_value_heads": split.key_value_heads,
        "num_key_value_groups": split.query_heads // split.key_value_heads,
    }
    for name, count in local.items():
        if hasattr(module, name):
            setattr(module, name, count)


def _per_head(fitted: Fitted, path: str, count: int) -> int:
    rows = fitted.linear(path).out_features
    if rows % count:
        raise refused(fitted.model, f"{path} has {rows} outputs for {count} heads")
    return rows // count


def _scaled(at: Range, size: int) -> Range:
    return at[0] * size, at[1] * size


def _moved(at: Range, by: int) -> Range:
    return at[0] + by, at[1] + by
