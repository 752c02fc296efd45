"""How a step's attention is cut so that no query's arithmetic depends on the step. Arrays only: no tensor, no device.

Every sequence's positions are cut at the same multiples, single tokens and runs alike become tiles of one kernel
(dataplane/kernels/prefill.py), and a query's parts are merged in their order. A query thus has the same bits alone, in
any batch, in chunks of any size, over a cached prefix, and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataplane.engine.arrangement import MERGE_COLUMNS, TILE_COLUMNS, Ints, Runs

SPLIT_TOKENS = 512
"""Positions are cut at multiples of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Work for one launch: columns as in dataplane/kernels/prefill.py and decode.py, and the number of parts."""

    tiles: Ints
    merges: Ints
    parts: int


def split(runs: Runs, window: int | None, queries_a_tile: int, parts_max: int, *, merge_all: bool) -> list[Split]:
    """Work for layers with this window, in launches of about `parts_max` parts at most, rows that only fill the step up
    included. `merge_all`: a query of one part is merged, too."""
    counts = runs.counts_E
    tiles_E = -(-counts // queries_a_tile)
    owner = np.repeat(np.arange(len(counts)), tiles_E)
    begin = (np.arange(len(owner)) - np.repeat(np.cumsum(tiles_E) - tiles_E, tiles_E)) * queries_a_tile
    first = runs.starts_E[owner] + begin
    count = np.minimum(counts[owner] - begin, queries_a_tile)
    row = runs.offsets_E[owner] + begin
    low = np.maximum(first - window + 1, 0) // SPLIT_TOKENS if window is not None else np.zeros_like(first)
    parts = (first + count - 1) // SPLIT_TOKENS - low + 1
    held = np.where((parts > 1) | merge_all, parts * count, 0)
    base = np.cumsum(held) - held
    launch = base // parts_max
    made: list[Split] = []
    for number in range(int(launch.max(initial=0)) + 1):
        mine = np.flatnonzero(launch == number)
        at = base[mine] - (base[mine[0]] if len(mine) else 0)
        tiles = _tiles(row[mine], count[mine], first[mine], runs.tables_E[owner[mine]], low[mine], parts[mine])
        cut = held[mine] > 0
        _number(tiles, at, cut, parts[mine], count[mine])
        if not made:
            tiles = np.concatenate([tiles, _filling(runs, queries_a_tile)])
        merges = _merges(row[mine][cut], count[mine][cut], at[cut], parts[mine][cut])
        made.append(Split(tiles, merges, int(held[mine].sum())))
    return made


def _tiles(row: Ints, count: Ints, first: Ints, table: Ints, low: Ints, parts: Ints) -> Ints:
    """A line for each part of each tile."""
    tile = np.repeat(np.arange(len(row)), parts)
    number = np.arange(len(tile)) - np.repeat(np.cumsum(parts) - parts, parts)
    tiles = np.zeros((len(tile), TILE_COLUMNS), dtype=np.int64)
    tiles[:, 0], tiles[:, 1], tiles[:, 2], tiles[:, 3] = row[tile], count[tile], first[tile], table[tile]
    tiles[:, 4] = (low[tile] + number) * SPLIT_TOKENS
    tiles[:, 5] = tiles[:, 4] + SPLIT_TOKENS
    tiles[:, 6] = -1
    return tiles


def _number(tiles: Ints, base: Ints, cut: npt.NDArray[np.bool_], parts: Ints, count: Ints) -> None:
    """Say where each line's queries put their parts: those of a tile lie part by part."""
    tile = np.repeat(np.arange(len(parts)), parts)
    number = np.arange(len(tile)) - np.repeat(np.cumsum(parts) - parts, parts)
    tiles[:, 6] = np.where(cut[tile], base[tile] + number * count[tile], -1)


def _merges(row: Ints, count: Ints, base: Ints, parts: Ints) -> Ints:
    """A line for each query."""
    tile = np.repeat(np.arange(len(row)), count)
    query = np.arange(len(tile)) - np.repeat(np.cumsum(count) - count, count)
    merges = np.zeros((len(tile), MERGE_COLUMNS), dtype=np.int64)
    merges[:, 0], merges[:, 1] = row[tile] + query, base[tile] + query
    merges[:, 2], merges[:, 3] = parts[tile], count[tile]
    return merges


def _filling(runs: Runs, queries: int) -> Ints:
    rows = np.arange(runs.tokens, runs.rows, queries)
    tiles = np.zeros((len(rows), TILE_COLUMNS), dtype=np.int64)
    tiles[:, 0], tiles[:, 1], tiles[:, 2] = rows, np.minimum(runs.rows - rows, queries), -queries
    tiles[:, 6] = -1
    return tiles
