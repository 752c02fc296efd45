"""How a step's attention is cut into work for the GPU kernels. Arrays only: no tensor, no device.

Single tokens become items of the decode kernel, runs of tokens tiles of the prefill kernel (dataplane/kernels), and
prompts that start at position 0 may be attended densely, several of one length in one call.

Shape letters: E entries, I items, M merges, N tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

ITEM_COLUMNS, MERGE_COLUMNS, TILE_COLUMNS = 8, 4, 8

CHUNK_TOKENS_MIN = 256
"""Positions are cut no finer than this for one item: a part costs a write and a read of its result."""

PROGRAMS_WANTED = 512
"""Items times KV heads that fill a GPU; below, long sequences are cut into parts."""

DENSE_TOKENS = 1024
"""Whole prompts of a multiple of so many tokens are attended densely, where a layer allows it: the library is faster
there, but plans each length that it meets for the first time in about 40 ms."""


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """A step's entries, and rows behind them that only fill the step up to `rows`."""

    starts_E: Ints
    counts_E: Ints
    # Row of the entry's first token.
    offsets_E: Ints
    # Where its block table begins among those of all entries.
    tables_E: Ints
    rows: int

    @property
    def tokens(self) -> int:
        return int(self.counts_E.sum())


@dataclass(frozen=True, slots=True)
class DenseRun:
    """`count` neighbouring prompts of `length` tokens each, from row `row` on."""

    row: int
    count: int
    length: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count * self.length)


@dataclass(frozen=True, slots=True, eq=False)
class Arrangement:
    """Work for the kernels; the columns are those of dataplane/kernels/decode.py and prefill.py."""

    items: Ints
    merges: Ints
    tiles: Ints
    dense: tuple[DenseRun, ...]


def spare_items(singles: int, kv_heads: int) -> int:
    """Items that a step of so many single tokens has beyond one for each."""
    return max(-(-PROGRAMS_WANTED // kv_heads) - singles, 0)


def tiles_max(rows: int) -> int:
    """Tiles of a step of `rows` rows, of runs of at least two tokens."""
    return rows // 2 + 1


def arrange(
    runs: Runs, window: int | None, spare: int, queries_a_tile: int, *, may_be_dense: bool, mixed: bool = False
) -> Arrangement:
    """Work for layers with this window. Every row of the step gets a result.

    There are at most `spare` more items than single tokens, and as many merges. Rows that only fill the step up become
    tiles of a `mixed` step, else items.
    """
    single = np.flatnonzero(runs.counts_E == 1)
    several = np.flatnonzero(runs.counts_E > 1)
    dense = _dense_runs(runs, several, window) if may_be_dense else []
    covered = [entry for run, entries in dense for entry in entries]
    several = np.setdiff1d(several, covered) if covered else several
    items, merges = _items(runs, single, window, spare, pads=not mixed)
    tiles = _tiles(runs, several, queries_a_tile, pads=mixed)
    return Arrangement(items, merges, tiles, tuple(run for run, _ in dense))


def _dense_runs(runs: Runs, several: Ints, window: int | None) -> list[tuple[DenseRun, list[int]]]:
    found: list[tuple[DenseRun, list[int]]] = []
    for entry in several:
        start, length, row = (int(column[entry]) for column in (runs.starts_E, runs.counts_E, runs.offsets_E))
        if start or length % DENSE_TOKENS or (window is not None and length > window):
            continue
        last = found[-1] if found else None
        if last is not None and last[0].length == length and last[0].row + last[0].count * length == row:
            found[-1] = DenseRun(last[0].row, last[0].count + 1, length), [*last[1], int(entry)]
        else:
            found.append((DenseRun(row, 1, length), [int(entry)]))
    return found


def _items(runs: Runs, single: Ints, window: int | None, spare: int, *, pads: bool) -> tuple[Ints, Ints]:
    ends = runs.starts_E[single] + 1
    begins = np.maximum(ends - window, 0) if window is not None else np.zeros_like(ends)
    lengths = ends - begins
    chunk = _chunk(lengths, spare)
    parts = -(-lengths // chunk)
    # The longest first: the short ones fill the gaps at the end.
    order = np.argsort(-lengths, kind="stable")
    parts = parts[order]
    owner = np.repeat(order, parts)
    first = np.cumsum(parts) - parts
    number = np.arange(len(owner)) - np.repeat(first, parts)
    fill = runs.rows - runs.tokens if pads else 0
    items = np.zeros((len(owner) + fill, ITEM_COLUMNS), dtype=np.int64)
    body = items[: len(owner)]
    body[:, 0] = runs.offsets_E[single][owner]
    body[:, 1] = runs.tables_E[single][owner]
    body[:, 2] = begins[owner] + number * chunk
    body[:, 3] = np.minimum(body[:, 2] + chunk, ends[owner])
    body[:, 4] = np.where(np.repeat(parts, parts) > 1, np.arange(len(owner)), -1)
    items[len(owner) :, 0] = np.arange(runs.rows - fill, runs.rows)
    items[len(owner) :, 4] = -1
    cut = np.flatnonzero(parts > 1)
    merges = np.zeros((len(cut), MERGE_COLUMNS), dtype=np.int64)
    merges[:, 0] = runs.offsets_E[single][order[cut]]
    merges[:, 1] = first[cut]
    merges[:, 2] = parts[cut]
    merges[:, 3] = 1
    return items, merges


def _chunk(lengths: Ints, spare: int) -> int:
    """Positions of an item, so that there are at most `spare` more items than lengths."""
    longest = int(lengths.max(initial=1))
    chunk = CHUNK_TOKENS_MIN if spare else longest
    while chunk < longest and int((-(-lengths // chunk)).sum()) > len(lengths) + spare:
        chunk += chunk // 4
    return chunk


def _tiles(runs: Runs, several: Ints, queries: int, *, pads: bool) -> Ints:
    counts = runs.counts_E[several]
    parts = -(-counts // queries)
    owner = np.repeat(several, parts)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    begin = number * queries
    tiles = np.zeros((len(owner), TILE_COLUMNS), dtype=np.int64)
    tiles[:, 0] = runs.offsets_E[owner] + begin
    tiles[:, 1] = np.minimum(runs.counts_E[owner] - begin, queries)
    tiles[:, 2] = runs.starts_E[owner] + begin
    tiles[:, 3] = runs.tables_E[owner]
    # Late queries see the most positions: they go first.
    tiles = tiles[np.argsort(-tiles[:, 2], kind="stable")]
    if not pads or runs.tokens == runs.rows:
        return tiles
    rows = np.arange(runs.tokens, runs.rows, queries)
    fill = np.zeros((len(rows), TILE_COLUMNS), dtype=np.int64)
    fill[:, 0], fill[:, 1], fill[:, 2] = rows, np.minimum(runs.rows - rows, queries), -queries
    return np.concatenate([tiles, fill])
