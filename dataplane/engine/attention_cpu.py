"""Attention on a CPU: cached blocks gathered by tiles, one flash-attention call for all tiles of a group, then merged.

Shape letters: T tokens of the step, H query heads, K KV heads, G query heads a KV head, D head size, N tiles, L
positions of a tile, B sequences of a group, R query rows a KV head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from dataplane.engine.attention import Score
from dataplane.engine.inputs import StepInputs
from dataplane.engine.kv_cache import KVCache
from dataplane.engine.tiles import TILE_TOKENS, Layout, TileGroup, cut
from dataplane.models.recognise import TURNS, turn_halves
from dataplane.progress import ProgressPage

_log = structlog.get_logger()

REGISTER_FEATURES = 32
"""Of half precision, that a row of a tile register (AMX) holds. Where a head's features do not fill the last one, the
flash kernel's sums turn on the number of query rows; zeros fill it."""

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
        self._arrangements: dict[Layout, Arrangement] = {}
        # Rotary tables as layers want them, each beside the one it is made of.
        self._turns: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, score: Score) -> Tensor:
        """See AttentionStep."""
        self._cache.write(layer, self._inputs.slots_T, k_TKD, v_TKD)
        heads, kv_heads = q_THD.shape[1], k_TKD.shape[1]
        # A window that nobody's text fills is none: such layers share their arrangement with those without.
        window = None if score.window is not None and score.window >= self._longest else score.window
        multiple = rows_multiple(k_TKD.shape[2], v_TKD.shape[2], q_THD.dtype, score.softcap is not None)
        layout = Layout(window, heads // kv_heads, kv_heads * q_THD.shape[2], q_THD.dtype, multiple)
        work = self._arrange(layout)
        results: list[Tensor] = []
        for group in work.groups:
            k, v = self._cache.gather(layer, group.blocks, q_THD.dtype)
            rows = group.rows
            q = q_THD[rows] if isinstance(rows, slice) else q_THD.index_select(0, rows)
            mixed_BKRD = attend_tiles(
                fold(q, kv_heads, group.queries, multiple), by_tile(k, group), by_tile(v, group), group, score
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

    def _arrange(self, layout: Layout) -> Arrangement:
        work = self._arrangements.get(layout)
        if work is None:
            ragged = self._inputs.ragged
            groups = list(cut(ragged, layout))
            work = Arrangement(groups, _places(groups, ragged.tokens, len(self._inputs.tokens_T)))
            self._arrangements[layout] = work
        return work


@cache
def rows_multiple(key_dim: int, value_dim: int, dtype: torch.dtype, capped: bool) -> int:
    """Query rows of which attention to a tile gives each the same bits however many multiples of so many there are.

    Found by trying, as in row_bits.py; where no number of them is found, that is logged. MKL's products in single
    precision of up to a tenth as many rows as the head is wide take other kernels on some processors. The flash kernel
    cuts rows into blocks of 32, 64 or 256, so what is left over matters, too.
    """
    if capped or key_dim != value_dim:
        # What the flash kernel does not know is computed in it.
        dtype = torch.float32
    draw = torch.Generator().manual_seed(7)
    # In single precision another order shows at once; where results are rounded to half, one in thousands differs.
    tiles = 2 if dtype == torch.float32 else 32
    q, k, v = (
        torch.randn(tiles, 1, count, dim, generator=draw).to(dtype)
        for count, dim in ((_PROBED_ROWS, key_dim), (TILE_TOKENS, key_dim), (TILE_TOKENS, value_dim))
    )
    mask = torch.zeros(tiles, 1, 1, TILE_TOKENS, dtype=dtype)
    score = Score(key_dim**-0.5, softcap=30.0 if capped else None)
    whole, _ = _of_tiles(q, k, v, mask, score)
    for multiple in _MULTIPLES:
        counts = (multiple, 2 * multiple, 3 * multiple, 32 + multiple, 192 + multiple, 768 + multiple)
        if all(torch.equal(_of_tiles(q[:, :, :n], k, v, mask, score)[0], whole[:, :, :n]) for n in counts):
            return multiple
    _log.warning("attention_turns_on_the_batch", key_dim=key_dim, value_dim=value_dim, dtype=str(dtype))
    return _MULTIPLES[-1]


_MULTIPLES = (4, 8, 16, 32)
_PROBED_ROWS = 1024


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


def fold(q: Tensor, kv_heads: int, queries: int, multiple: int) -> Tensor:
    """(B · queries, H, D) → (B, K, R, D): a KV head's query heads become rows, padded to a multiple of so many."""
    rows, heads, dim = q.shape
    group = heads // kv_heads
    q = q.reshape(rows // queries, queries, kv_heads, group, dim).transpose(1, 2)
    q = q.reshape(rows // queries, kv_heads, queries * group, dim)
    lacking = -q.shape[2] % multiple
    return F.pad(q, (0, 0, 0, lacking)) if lacking else q


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
    out, log_sum = _of_tiles(q_NKRD, k_NKLD, v_NKLD, group.mask, score)
    if len(group.levels) == 1 and score.sinks_H is None:
        return out.to(q_BKRD.dtype)
    return _merge(out, log_sum, group, score.sinks_H).to(q_BKRD.dtype)


def _of_tiles(q_NKRD: Tensor, k_NKLD: Tensor, v_NKLD: Tensor, mask: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """Each tile's result, and the logarithm of its sum of weights."""
    dim = v_NKLD.shape[3]
    if score.softcap is not None or k_NKLD.shape[3] != dim:
        return _explicit(q_NKRD, k_NKLD, v_NKLD, mask, score)
    lacking = -dim % REGISTER_FEATURES if q_NKRD.dtype != torch.float32 else 0
    if lacking:
        q_NKRD, k_NKLD, v_NKLD = (F.pad(side, (0, lacking)) for side in (q_NKRD, k_NKLD, v_NKLD))
    out, log_sum = _flash(q_NKRD, k_NKLD, v_NKLD, 0.0, False, attn_mask=mask, scale=score.scaling)
    return out[..., :dim].contiguous() if lacking else out, log_sum


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
