"""Attention on a CPU: cached blocks gathered by tiles, one flash-attention call for all tiles of a group, then merged.

Shape letters: T tokens of the step, H query heads, K KV heads, G query heads a KV head, D head size, N tiles, L
positions of a tile, B sequences of a group, R query rows a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dataplane.engine.attention import Score
from dataplane.engine.inputs import StepInputs
from dataplane.engine.kv_cache import KVCache
from dataplane.engine.tiles import ROWS_MULTIPLE, TileGroup, cut
from dataplane.models.recognise import TURNS, turn_halves
from dataplane.progress import ProgressPage

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """A step's work for layers with the same window and heads."""

    groups: list[TileGroup]
    # Where each row of the step finds its result, the groups' results one behind the other; None: at its own number.
    places_T: Tensor | None


class CpuAttentionStep:
    """One step's attention. Its arrangement is made once for each window and shared by the layers."""

    def __init__(self, cache: KVCache, inputs: StepInputs, page: ProgressPage | None = None) -> None:
        self._cache = cache
        self._inputs = inputs
        self._longest = inputs.ragged.longest
        self._page = page
        self._arrangements: dict[tuple[int | None, int, int], Arrangement] = {}
        # Rotary tables as layers want them, each beside the one it is made of.
        self._turns: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, score: Score) -> Tensor:
        """See AttentionStep."""
        self._cache.write(layer, self._inputs.slots_T, k_TKD, v_TKD)
        heads, kv_heads = q_THD.shape[1], k_TKD.shape[1]
        work = self._arrange(score.window, heads // kv_heads, kv_heads * q_THD.shape[2], q_THD.dtype)
        results: list[Tensor] = []
        for group in work.groups:
            k, v = self._cache.gather(layer, group.blocks, q_THD.dtype)
            rows = group.rows
            q = q_THD[rows] if isinstance(rows, slice) else q_THD.index_select(0, rows)
            mixed_BKRD = attend_tiles(
                fold(q, kv_heads, group.queries), by_tile(k, group), by_tile(v, group), group, score
            )
            results.append(unfold(mixed_BKRD, heads, group.queries))
        if self._page is not None:
            self._page.advance()
        out_THD = results[0] if len(results) == 1 else torch.cat(results)
        return out_THD if work.places_T is None else out_THD.index_select(0, work.places_T)

    def turn(self, tables: tuple[Tensor, Tensor], layout: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, 1, R) of tables (1, T, R), the sign of each dimension's partner in its sine."""
        for table, made in self._turns:
            if table is tables[1]:
                return made
        cos, sin = (table[0].unsqueeze(1) for table in tables)
        if TURNS[layout] is turn_halves:
            first, second = sin.chunk(2, dim=-1)
            sin = torch.cat((-first, second), dim=-1)
        else:
            sin = torch.stack((-sin[..., ::2], sin[..., 1::2]), dim=-1).flatten(-2)
        self._turns.append((tables[1], (cos, sin)))
        return cos, sin

    def _arrange(self, window: int | None, heads_per_kv: int, width: int, dtype: torch.dtype) -> Arrangement:
        # A window that nobody's text fills is none: such layers share their arrangement with those without.
        window = None if window is not None and window >= self._longest else window
        key = (window, heads_per_kv, width)
        work = self._arrangements.get(key)
        if work is None:
            ragged = self._inputs.ragged
            groups = list(cut(ragged, window, heads_per_kv, width, dtype))
            work = Arrangement(groups, _places(groups, ragged.tokens, len(self._inputs.tokens_T)))
            self._arrangements[key] = work
        return work


def _places(groups: list[TileGroup], tokens: int, rows: int) -> Tensor | None:
    """Of rows behind the step's tokens, which repeat the last one: that one's place."""
    if len(groups) == 1 and isinstance(groups[0].rows, slice) and groups[0].rows == slice(0, rows):
        return None
    numbers = torch.arange(tokens)
    order = torch.cat([numbers[group.rows] for group in groups])
    places_T = torch.empty(tokens, dtype=torch.long)
    # A row that is computed repeatedly is the same each time.
    places_T[order] = torch.arange(len(order))
    return torch.cat((places_T, places_T[-1:].expand(rows - tokens)))


def fold(q: Tensor, kv_heads: int, queries: int) -> Tensor:
    """(B · queries, H, D) → (B, K, R, D): a KV head's query heads become rows, padded to a multiple."""
    rows, heads, dim = q.shape
    group = heads // kv_heads
    q = q.reshape(rows // queries, queries, kv_heads, group, dim).transpose(1, 2)
    q = q.reshape(rows // queries, kv_heads, queries * group, dim)
    lacking = -q.shape[2] % ROWS_MULTIPLE
    return torch.nn.functional.pad(q, (0, 0, 0, lacking)) if lacking else q


def unfold(out: Tensor, heads: int, queries: int) -> Tensor:
    """(B, K, R, D) → (B · queries, H, D): the way back."""
    sequences, kv_heads, _, dim = out.shape
    group = heads // kv_heads
    out = out[:, :, : queries * group].reshape(sequences, kv_heads, queries, group, dim)
    return out.transpose(1, 2).reshape(sequences * queries, heads, dim)


def by_tile(kv: Tensor, group: TileGroup) -> Tensor:
    """(N · L, K, D) → (N, K, L, D), a view."""
    return kv.view(group.tiles, -1, *kv.shape[1:]).transpose(1, 2)


def attend_tiles(q_BKRD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor, group: TileGroup, score: Score) -> Tensor:
    """(B, K, R, D_value): each sequence's queries over its tiles."""
    if len(group.levels) == 1:
        q_NKRD = q_BKRD
    elif q_BKRD.shape[0] == 1:
        q_NKRD = q_BKRD.expand(group.tiles, -1, -1, -1)
    else:
        q_NKRD = q_BKRD.index_select(0, group.owner_N)
    if score.softcap is None and k_NKLD.shape[3] == v_NKLD.shape[3]:
        out, log_sum = _flash(q_NKRD, k_NKLD, v_NKLD, 0.0, False, attn_mask=group.mask, scale=score.scaling)
    else:
        out, log_sum = _explicit(q_NKRD, k_NKLD, v_NKLD, group.mask, score)
    if len(group.levels) == 1 and score.sinks_H is None:
        return out.to(q_BKRD.dtype)
    return _merge(out, log_sum, group, score.sinks_H).to(q_BKRD.dtype)


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """What the flash kernel gives, for scores with a soft-cap and for values of another size than keys."""
    scores = torch.matmul(q.float(), k.float().transpose(2, 3)) * score.scaling
    if score.softcap is not None:
        scores = torch.tanh(scores / score.softcap) * score.softcap
    scores = scores + mask
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights, v.float()) / total, (top + total.log()).squeeze(-1)


def _merge(out_NKRD: Tensor, log_sum_NKR: Tensor, group: TileGroup, sinks_H: Tensor | None) -> Tensor:
    """Weighted mean of each sequence's tiles, float32, added level by level: the order a sequence has by itself."""
    count = group.levels[0]
    top = log_sum_NKR[:count].clone()
    starts = _starts(group.levels)
    for start, n in starts:
        top[:n] = torch.maximum(top[:n], log_sum_NKR[start : start + n])
    sinks = None if sinks_H is None else _sink_rows(sinks_H, log_sum_NKR)
    if sinks is not None:
        top = torch.maximum(top, sinks)
    # In float64 and back: vectorised and scalar float32 exponentials may differ in the last bit, by place in the array.
    weight = torch.exp((log_sum_NKR - top.index_select(0, group.owner_N)).double()).float()
    parts = out_NKRD.float() * weight.unsqueeze(-1)
    mixed, total = parts[:count], weight[:count].clone()
    for start, n in starts:
        mixed[:n] += parts[start : start + n]
        total[:n] += weight[start : start + n]
    if sinks is not None:
        total += torch.exp((sinks - top).double()).float()
    return mixed / total.unsqueeze(-1)


def _starts(levels: tuple[int, ...]) -> list[tuple[int, int]]:
    """First tile and size of each level but the first."""
    starts: list[tuple[int, int]] = []
    start = levels[0]
    for n in levels[1:]:
        starts.append((start, n))
        start += n
    return starts


def _sink_rows(sinks_H: Tensor, log_sum_NKR: Tensor) -> Tensor:
    """(K, R): row r of KV head k is a query of head k · G + r mod G; padding rows get any."""
    _, kv_heads, rows = log_sum_NKR.shape
    sinks_KG = sinks_H.float().view(kv_heads, -1)
    return sinks_KG[:, torch.arange(rows) % sinks_KG.shape[1]]
