"""How a step's attention is cut into tiles of constant width, so that no row's arithmetic depends on the batch.

Each sequence's cached positions are cut at multiples of TILE_TOKENS. A query attends to each tile by itself, and the
tiles' results are merged in order (split-KV attention, as in FlashDecoding, arXiv:2311.01282). Widths that never
change keep a matrix product from choosing another order of summation; positions outside a row's sight add exact
zeros. So a token's output has the same bits alone, in any batch, chunked and replayed. All tiles of a batch are one
call. Where no sequence has a second tile, the end of the tiles that nobody has come to yet is cut off, by whole
vectors: zeros less, and the same bits (tests/unit/dataplane/engine/test_attention.py).

Shape letters: N tiles, B sequences of a group, R query rows a KV head, L positions of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataplane.engine.inputs import Ints, Ragged

TILE_TOKENS = 128
"""Of 64, merging costs one sequence a third more from 65 tokens on; of 256, short ones carry what they lack."""

SHOWN_TOKENS = 32
"""What is cut off a tile leaves a multiple of this."""

TOGETHER_TOKENS_MAX = 128
"""Prompts of up to so many tokens are attended together: apart, each costs a dozen operations a layer."""

PARTIAL_ELEMENTS_MAX = 1 << 24
"""Bound on the elements of all tiles' results of one call, so that a long prompt is attended in pieces."""

_HIDDEN = -1e30
"""Added to scores that a row may not see. Finite: a tile that is wholly out of a row's sight then has weight 0, not
0 / 0."""


@dataclass(frozen=True, slots=True, eq=False)
class TileGroup:
    """Sequences, or a piece of one, attended in one call.

    Tiles lie level by level: the first tile of every sequence, then the second of those that have one, and so on,
    sequences with the most tiles first. Level i is the next `levels[i]` tiles.
    """

    # Rows of the step whose queries these are, `queries` of each of the B sequences; some may stand here repeatedly.
    rows: slice | Tensor
    queries: int
    levels: tuple[int, ...]
    # Sequence of each tile.
    owner_N: Tensor
    # The tiles' blocks, tile by tile.
    blocks: Tensor
    # (N, 1, R or 1, L), added to scores; L is a tile's width or, of a single level, less.
    mask: Tensor

    @property
    def tiles(self) -> int:
        return self.owner_N.shape[0]


def tile_tokens(block_tokens: int) -> int:
    """Width of a tile: a whole number of blocks."""
    return max(TILE_TOKENS // block_tokens, 1) * block_tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """What layers have in common that share an arrangement."""

    window: int | None
    # Query heads of a KV head.
    group: int
    # Elements of one query row over all KV heads, for the bound on memory.
    width: int
    dtype: torch.dtype
    # A KV head's query rows are filled up to a multiple of so many (attention_cpu.py).
    multiple: int


def cut(ragged: Ragged, layout: Layout) -> Iterator[TileGroup]:
    """The groups of a step for layers of this layout."""
    for entries in _alike(ragged.counts_E):
        yield from _together(ragged, entries, layout)
    for entry in np.flatnonzero(ragged.counts_E > TOGETHER_TOKENS_MAX):
        yield from _pieces(ragged, int(entry), layout)


def _alike(counts_E: Ints) -> Iterator[Ints]:
    """Entries of one token, then of up to TOGETHER_TOKENS_MAX by size: none is filled up to more than twice its own,
    but for the smallest, of which there are a few."""
    floor = 1
    for ceiling in (1, 16, 32, 64, TOGETHER_TOKENS_MAX):
        entries = np.flatnonzero((counts_E >= floor) & (counts_E <= ceiling))
        floor = ceiling + 1
        if len(entries):
            yield entries


def _together(ragged: Ragged, entries: Ints, layout: Layout) -> Iterator[TileGroup]:
    """Entries with about as many tokens each, as many a group as the memory bound allows. Each is filled up to the
    longest with its last token: the copies compute the same."""
    tile = tile_tokens(ragged.block_tokens)
    starts, counts = ragged.starts_E[entries], ragged.counts_E[entries]
    first = _first_seen(starts, layout.window) // tile
    tiles = (starts + counts - 1) // tile - first + 1
    order = np.argsort(-tiles, kind="stable")
    entries, first, tiles = entries[order], first[order], tiles[order]
    queries = int(counts.max())
    budget = max(PARTIAL_ELEMENTS_MAX // (layout.width * layout.group * queries), 1)
    begin = 0
    while begin < len(entries):
        end = begin + max(int(np.searchsorted(np.cumsum(tiles[begin:]), budget, side="right")), 1)
        chosen = entries[begin:end]
        levels = _levels(tiles[begin:end])
        owner, number = _level_major(levels, first[begin:end])
        token_BQ = np.minimum(np.arange(queries), ragged.counts_E[chosen][:, None] - 1)
        shown = tile
        if len(levels) == 1:
            ends = ragged.starts_E[chosen] + ragged.counts_E[chosen]
            shown = _shown(int((ends - number * tile).max()), tile, ragged.block_tokens)
        yield TileGroup(
            rows=_row_numbers((ragged.offsets_E[chosen][:, None] + token_BQ).reshape(-1)),
            queries=queries,
            levels=levels,
            owner_N=torch.from_numpy(owner),
            blocks=_blocks(ragged, chosen[owner], number, shown),
            mask=_mask(
                number * tile,
                _query_rows(ragged.starts_E[chosen][:, None] + token_BQ, layout)[owner],
                layout.window,
                shown,
                layout.dtype,
            ),
        )
        begin = end


def _shown(needed: int, tile: int, block_tokens: int) -> int:
    """Width to leave of tiles whose first `needed` positions are there."""
    if tile % SHOWN_TOKENS or SHOWN_TOKENS % block_tokens:
        return tile
    return -(-needed // SHOWN_TOKENS) * SHOWN_TOKENS


def _row_numbers(rows: Ints) -> slice | Tensor:
    """A slice where it can be, which copies nothing."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and (np.diff(rows) == 1).all():
        return slice(first, last + 1)
    return torch.from_numpy(rows)


def _query_rows(positions_BQ: Ints, layout: Layout) -> Ints:
    """Positions of a KV head's query rows; one column where they are all the same."""
    if positions_BQ.shape[1] == 1:
        return positions_BQ
    rows = np.repeat(positions_BQ, layout.group, axis=1)
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % layout.multiple)), mode="edge")


def _pieces(ragged: Ragged, entry: int, layout: Layout) -> Iterator[TileGroup]:
    """A chunk of a prompt, in pieces within the memory bound."""
    tile = tile_tokens(ragged.block_tokens)
    start, count, offset = (int(column[entry]) for column in (ragged.starts_E, ragged.counts_E, ragged.offsets_E))
    tiles = (start + count - 1) // tile + 1
    step = max(min(PARTIAL_ELEMENTS_MAX // (layout.width * layout.group * tiles), 2 * tile), layout.multiple)
    for begin in range(0, count, step):
        positions = np.arange(start + begin, start + min(begin + step, count))
        first = int(_first_seen(positions[:1], layout.window)[0]) // tile
        number = np.arange(first, int(positions[-1]) // tile + 1)
        rows = _query_rows(positions[None], layout)
        rows = np.broadcast_to(rows, (len(number), rows.shape[1]))
        mask = _mask(number * tile, rows, layout.window, tile, layout.dtype)
        yield TileGroup(
            rows=slice(offset + begin, offset + begin + len(positions)),
            queries=len(positions),
            levels=(1,) * len(number),
            owner_N=torch.zeros(len(number), dtype=torch.long),
            blocks=_blocks(ragged, np.full(len(number), entry), number, tile),
            mask=mask,
        )


def _first_seen(positions: Ints, window: int | None) -> Ints:
    return np.maximum(positions - window + 1, 0) if window else np.zeros_like(positions)


def _levels(count_B: Ints) -> tuple[int, ...]:
    """How many sequences have an i-th tile; `count_B` falls."""
    return tuple(int(n) for n in np.searchsorted(-count_B, -np.arange(1, count_B[0] + 1), side="right"))


def _level_major(levels: tuple[int, ...], first_B: Ints) -> tuple[Ints, Ints]:
    """Owner and tile number of each tile."""
    owner = np.concatenate([np.arange(n) for n in levels])
    return owner, first_B[owner] + np.repeat(np.arange(len(levels)), levels)


def _blocks(ragged: Ragged, entry_N: Ints, number_N: Ints, shown: int) -> Tensor:
    """Blocks of the first `shown` positions of tile number_N[i] of entry_N[i]; behind the entry's last block any block
    will do: no row sees it."""
    per_tile = tile_tokens(ragged.block_tokens) // ragged.block_tokens
    column = number_N[:, None] * per_tile + np.arange(shown // ragged.block_tokens)
    last = ragged.tables_EB.shape[1] - 1
    return torch.from_numpy(ragged.tables_EB[entry_N[:, None], np.minimum(column, last)].reshape(-1))


def _mask(base_N: Ints, positions_NR: Ints, window: int | None, shown: int, dtype: torch.dtype) -> Tensor:
    distance = positions_NR[:, :, None] - (base_N[:, None] + np.arange(shown))[:, None, :]
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    mask = torch.zeros(hidden.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(hidden), _HIDDEN).unsqueeze(1)
