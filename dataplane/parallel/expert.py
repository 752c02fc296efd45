"""Expert parallelism: each rank computes the experts it holds, the ranks' results are summed.

Two ways, both without capacity, so that no token is ever dropped. Where every rank has every token of the step, as
under tensor parallelism, combining is one all-reduce. Where ranks have tokens of their own, `spread_forward` sends
each choice to the rank that holds the expert and the result back, by all-to-all. One registered function serves every
family through the attributes that transformers' expert modules share (`is_transposed`, `has_bias`, `has_gate`,
`_apply_gate`).

Shape letters: T tokens, K experts chosen a token, S = T·K choices, H hidden size, I an expert's inner size, E experts
held here. Products go through the module's `matmul` as in tensor.py, one call an expert and projection, with the
expert's (O, I) view of the stacked weight; on a GPU through its `grouped_matmul`, one call a projection.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dataplane.parallel.groups import Group
from dataplane.parallel.split import cut

EXPERTS_IMPLEMENTATION = "perdure"


@dataclass(frozen=True, slots=True)
class ExpertShard:
    """Which experts lie here: [first, first + count) of the layer's, and the ranks whose results are summed."""

    first: int
    count: int
    group: Group


def regroup(model: nn.Module, group: Group) -> None:
    """Let the experts of a fitted model combine over `group`, of the same ranks in a new epoch."""
    for module in model.modules():
        shard = getattr(module, "perdure_experts", None)
        if shard is not None:
            module.perdure_experts = replace(shard, group=group)  # type: ignore[assignment]


def experts_forward(module: nn.Module, x_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Σ over a token's chosen experts of weight · expert(x), (T, H). No host synchronisation on an accelerator."""
    shard: ExpertShard = module.perdure_experts  # type: ignore[assignment]
    if x_TH.is_meta:
        return torch.empty_like(x_TH)
    local_S = chosen_TK.reshape(-1) - shard.first
    # Choices of experts held elsewhere sort behind all others, as expert number `count`.
    local_S = torch.where((local_S >= 0) & (local_S < shard.count), local_S, shard.count)
    sorted_S, order_S = torch.sort(local_S, stable=True)
    compute = _by_groups if x_TH.is_cuda else _by_expert
    y_SH = compute(module, x_TH[order_S // chosen_TK.shape[1]], sorted_S, shard.count)
    y_SH = torch.where((sorted_S < shard.count).unsqueeze(-1), y_SH, 0)
    # Back to the order of choices, then summed within a token in that order: no neighbour in the batch changes it.
    choices_SH = torch.empty_like(y_SH)
    choices_SH[order_S] = y_SH
    weighted_TKH = choices_SH.view(*chosen_TK.shape, x_TH.shape[1]) * weights_TK.unsqueeze(-1)
    return shard.group.all_reduce(weighted_TKH.sum(1).to(x_TH.dtype))


def spread_forward(module: nn.Module, x_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor, group: Group) -> Tensor:
    """As `experts_forward`, for tokens that only this rank has: T may differ from rank to rank.

    Experts lie on the members of `group` as `split.cut` places them. Numbers of rows travel first: one host
    synchronisation.
    """
    total = int(module.num_experts)  # type: ignore[arg-type]
    limits = torch.tensor([cut(total, group.size, member)[1] for member in range(group.size)], device=x_TH.device)
    experts_S = chosen_TK.reshape(-1)
    owners_S, order_S = torch.sort(torch.bucketize(experts_S, limits, right=True), stable=True)
    sent = torch.bincount(owners_S, minlength=group.size)
    received = group.all_to_all(sent, [1] * group.size, [1] * group.size)
    outgoing, incoming = sent.tolist(), received.tolist()
    rows_RH = group.all_to_all(x_TH[order_S // chosen_TK.shape[1]], outgoing, incoming)
    wanted_R1 = group.all_to_all(experts_S[order_S].unsqueeze(1), outgoing, incoming)
    results_RH = _own_choices(module, rows_RH, wanted_R1.squeeze(1))
    choices_SH = torch.empty(len(order_S), x_TH.shape[1], dtype=x_TH.dtype, device=x_TH.device)
    choices_SH[order_S] = group.all_to_all(results_RH, incoming, outgoing)
    weighted_TKH = choices_SH.view(*chosen_TK.shape, x_TH.shape[1]) * weights_TK.unsqueeze(-1)
    return weighted_TKH.sum(1).to(x_TH.dtype)


def _own_choices(module: nn.Module, rows_RH: Tensor, experts_R: Tensor) -> Tensor:
    """Each row through the expert it was sent for, all of which lie here."""
    shard: ExpertShard = module.perdure_experts  # type: ignore[assignment]
    sorted_R, order_R = torch.sort(experts_R - shard.first, stable=True)
    compute = _by_groups if rows_RH.is_cuda else _by_expert
    results_RH = torch.empty_like(rows_RH)
    results_RH[order_R] = compute(module, rows_RH[order_R], sorted_R, shard.count)
    return results_RH


def _by_expert(module: nn.Module, x_SH: Tensor, sorted_S: Tensor, count: int) -> Tensor:
    """One product an expert; the counts are on the host already. Rows behind the last expert stay zero."""
    y_SH = torch.zeros_like(x_SH)
    start = 0
    for expert, rows in enumerate(torch.bincount(sorted_S, minlength=count + 1)[:count].tolist()):
        if rows:
            stop = start + rows
            y_SH[start:stop] = _expert(module, x_SH[start:stop], expert)
            start = stop
    return y_SH


def _expert(module: nn.Module, x_SH: Tensor, expert: int) -> Tensor:
    up_SI = module.matmul(x_SH, *_weights(module, "gate_up_proj" if module.has_gate else "up_proj", expert))  # type: ignore[operator]
    inner_SI = module._apply_gate(up_SI) if module.has_gate else module.act_fn(up_SI)  # type: ignore[operator]
    return module.matmul(inner_SI, *_weights(module, "down_proj", expert))  # type: ignore[operator]


def _weights(module: nn.Module, name: str, expert: int) -> tuple[Tensor, Tensor | None]:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return weight.T if module.is_transposed else weight, bias


def _by_groups(module: nn.Module, x_SH: Tensor, sorted_S: Tensor, count: int) -> Tensor:
    """All experts in two grouped products whose sizes stay on the device."""
    experts_E = torch.arange(count, device=sorted_S.device)
    offsets_E = (sorted_S.unsqueeze(0) == experts_E.unsqueeze(1)).sum(1).cumsum(0).to(torch.int32)
    up_SI = _grouped(module, "gate_up_proj" if module.has_gate else "up_proj", x_SH, offsets_E)
    # Rows behind the last group are left as they were in memory: cleared before they can become a NaN.
    up_SI = torch.where((sorted_S < count).unsqueeze(-1), up_SI, 0)
    inner_SI = module._apply_gate(up_SI) if module.has_gate else module.act_fn(up_SI)  # type: ignore[operator]
    return _grouped(module, "down_proj", inner_SI, offsets_E)


def _grouped(module: nn.Module, name: str, x_SI: Tensor, offsets_E: Tensor) -> Tensor:
    weight = getattr(module, name)
    weight_EIO = weight if module.is_transposed else weight.transpose(-2, -1)
    bias_EO = getattr(module, f"{name}_bias") if module.has_bias else None
    return module.grouped_matmul(x_SI, weight_EIO, offsets_E, bias_EO)  # type: ignore[operator]


def grouped_matmul(x_SI: Tensor, weight_EIO: Tensor, ends_E: Tensor, bias_EO: Tensor | None) -> Tensor:
    """(S, O): rows before ends_E[0] by the first weight, and so on; what stands behind the last end has no meaning."""
    y_SO = F.grouped_mm(x_SI, weight_EIO, offs=ends_E)
    if bias_EO is None:
        return y_SO
    rows_S = torch.arange(len(x_SI), device=x_SI.device)
    return y_SO + bias_EO[torch.bucketize(rows_S, ends_E, right=True).clamp(max=len(ends_E) - 1)]


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)
