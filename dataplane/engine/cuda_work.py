"""A step's attention as work on the device: as fast as it gets, or batch-invariant (splits.py).

Captured steps have work of a constant size, which is filled up with lines that say: nothing to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dataplane.engine.arrangement import (
    ITEM_COLUMNS,
    MERGE_COLUMNS,
    TILE_COLUMNS,
    Arrangement,
    Runs,
    arrange,
    spare_items,
    tiles_max,
)
from dataplane.engine.attention_cuda import DeviceWork, Kind, SplitWork, Work
from dataplane.engine.inputs import Ints
from dataplane.engine.splits import SPLIT_TOKENS, Split, split
from dataplane.engine.staging import Section
from dataplane.kernels.prefill import ROWS_SPLIT, queries_a_tile

PART_BYTES_MAX = 1 << 28
"""Bound on the parts' results of one launch."""

SPARE_LINES_MAX = 1024
"""Captured batch-invariant steps have at most so many lines beyond one a row: an idle program takes a few nanoseconds
of the GPU. Steps of more are not captured."""

PARTS_A_ROW = 4
"""Parts that a captured step of several runs has room for, a row."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a graph is captured for."""

    rows: int
    logits: int
    decode: bool


class WorkMaker(Protocol):
    """Makes one kind of layer's work of a step."""

    def sections(self, runs: Runs, kind: Kind, size: Size) -> list[Section] | None:
        """For a captured step; None: it does not fit."""
        ...

    def from_sections(self, views: Sequence[Tensor], size: Size) -> Work:
        """What `sections` gave, on the device. Further views are of no interest."""
        ...

    def upload(self, runs: Runs, kind: Kind) -> Work:
        """For a step as it is."""
        ...


class FastWork:
    """Single tokens in the decode kernel, in as many parts as fill the GPU; long prompts by the library."""

    def __init__(self, device: torch.device, *, dense: bool) -> None:
        """`dense`: there is something faster than our kernel for whole prompts."""
        self._device = device
        self._dense = dense

    def sections(self, runs: Runs, kind: Kind, size: Size) -> list[Section] | None:
        """See WorkMaker."""
        # A mixed step may hold few single tokens.
        spare = spare_items(size.rows if size.decode else 0, kind.kv_heads)
        work = self._arranged(_filled(runs, size), kind, spare, captured=True, mixed=not size.decode)
        tiles = 0 if size.decode else tiles_max(size.rows)
        return [
            Section(work.items.reshape(-1), (size.rows + spare) * ITEM_COLUMNS, fill=-1),
            Section(work.merges.reshape(-1), min(size.rows, spare) * MERGE_COLUMNS, fill=-1),
            Section(work.tiles.reshape(-1), tiles * TILE_COLUMNS, fill=-1),
        ]

    def from_sections(self, views: Sequence[Tensor], size: Size) -> Work:
        """See WorkMaker."""
        items, merges, tiles = views[:3]
        return DeviceWork(items.view(-1, ITEM_COLUMNS), merges.view(-1, MERGE_COLUMNS), tiles.view(-1, TILE_COLUMNS))

    def upload(self, runs: Runs, kind: Kind) -> Work:
        """See WorkMaker."""
        spare = spare_items(int((runs.counts_E == 1).sum()), kind.kv_heads)
        made = self._arranged(runs, kind, spare, captured=False, mixed=False)
        parts = [_upload(part, self._device) for part in (made.items, made.merges, made.tiles)]
        return DeviceWork(*parts, dense=made.dense)

    def _arranged(self, runs: Runs, kind: Kind, spare: int, *, captured: bool, mixed: bool) -> Arrangement:
        queries = queries_a_tile(kind.heads // kind.kv_heads)
        dense = self._dense and kind.may_be_dense and not captured
        return arrange(runs, kind.window, spare, queries, may_be_dense=dense, mixed=mixed)


class ExactWork:
    """All tokens in split tiles."""

    def __init__(self, device: torch.device, part_bytes: int, cached_tokens: int) -> None:
        """`part_bytes`: of one part's result, of the largest layer; `cached_tokens`: that the cache holds."""
        self._device = device
        self._parts_max = max(PART_BYTES_MAX // part_bytes, 1)
        self._spare = min(cached_tokens // SPLIT_TOKENS, SPARE_LINES_MAX)

    def sections(self, runs: Runs, kind: Kind, size: Size) -> list[Section] | None:
        """See WorkMaker."""
        launches = self._split(_filled(runs, size), kind)
        work, lines = launches[0], size.rows + self._spare
        fits = len(work.tiles) <= lines and work.parts <= self._parts(size)
        if len(launches) > 1 or not fits:
            return None
        return [
            Section(work.tiles.reshape(-1), lines * TILE_COLUMNS, fill=-1),
            Section(work.merges.reshape(-1), size.rows * MERGE_COLUMNS, fill=-1),
        ]

    def from_sections(self, views: Sequence[Tensor], size: Size) -> Work:
        """See WorkMaker."""
        tiles, merges = views[:2]
        return (SplitWork(tiles.view(-1, TILE_COLUMNS), merges.view(-1, MERGE_COLUMNS), self._parts(size)),)

    def upload(self, runs: Runs, kind: Kind) -> Work:
        """See WorkMaker."""
        launches = self._split(runs, kind)
        return tuple(
            SplitWork(_upload(part.tiles, self._device), _upload(part.merges, self._device), part.parts)
            for part in launches
        )

    def _parts(self, size: Size) -> int:
        return (size.rows if size.decode else PARTS_A_ROW * size.rows) + self._spare

    def _split(self, runs: Runs, kind: Kind) -> list[Split]:
        queries = queries_a_tile(kind.heads // kind.kv_heads, ROWS_SPLIT)
        return split(runs, kind.window, queries, self._parts_max, merge_all=kind.has_sinks)


def _filled(runs: Runs, size: Size) -> Runs:
    """With the rows that a graph is filled up with."""
    return Runs(runs.starts_E, runs.counts_E, runs.offsets_E, runs.tables_E, size.rows)


def _upload(values: Ints, device: torch.device) -> Tensor:
    pinned = torch.from_numpy(values.astype("int32")).pin_memory()
    return pinned.to(device, non_blocking=True)
