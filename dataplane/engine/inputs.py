"""A plan as tensors.

Shape letters: T tokens of the step, N rows of logits, E entries, B blocks of the longest table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dataplane.engine.plan import NO_FEEDBACK, StepPlan

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Where each entry's tokens lie: on the host, for attention to arrange its work by."""

    starts_E: Ints
    counts_E: Ints
    # Row of the entry's first token among the step's.
    offsets_E: Ints
    # Block numbers; 0 behind an entry's last.
    tables_EB: Ints
    block_tokens: int

    @property
    def longest(self) -> int:
        """Positions that the longest entry's last token sees, itself included."""
        return int((self.starts_E + self.counts_E).max())

    @property
    def tokens(self) -> int:
        """Tokens of all entries; the step may have more rows."""
        return int(self.offsets_E[-1] + self.counts_E[-1])


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """What a forward pass takes. Behind its entries' tokens a small step repeats the last one: the copies compute, and
    write, the same as it does."""

    tokens_T: Tensor
    # Entry of the step before whose sampled token stands here instead; -1: tokens_T has it. None: tokens_T has all.
    fed_T: Tensor | None
    positions_T: Tensor
    # Where each token's key and value go, over all blocks.
    slots_T: Tensor
    rows_N: Tensor
    rope_lengths_T: Tensor | None
    ragged: Ragged


def prepare(
    plan: StepPlan, block_tokens: int, device: torch.device, *, needs_rope_lengths: bool, rows_min: int = 1
) -> StepInputs:
    """Tensors of `plan` on `device`, of at least `rows_min` tokens."""
    starts, counts = unpack(plan.starts), unpack(plan.counts)
    offsets = np.cumsum(counts) - counts
    tables = _dense(unpack(plan.tables), unpack(plan.table_lengths))
    entry_T = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(len(entry_T)) + (starts - offsets)[entry_T]
    slots = tables[entry_T, positions // block_tokens] * block_tokens + positions % block_tokens
    ropes = unpack(plan.rope_lengths)[entry_T] if needs_rope_lengths else None
    fed = feedback(plan)[entry_T]
    lacking = max(rows_min - len(positions), 0)
    return StepInputs(
        tokens_T=_place(_pad(unpack(plan.tokens), lacking), device),
        fed_T=_place(_pad(fed, lacking), device) if (fed >= 0).any() else None,
        positions_T=_place(_pad(positions, lacking), device),
        slots_T=_place(_pad(slots, lacking), device),
        rows_N=_place(logit_rows(offsets + counts, unpack(plan.logit_counts)), device),
        rope_lengths_T=None if ropes is None else _place(_pad(ropes, lacking), device),
        ragged=Ragged(starts, counts, offsets, tables, block_tokens),
    )


def unpack(column: bytes) -> Ints:
    """A plan's column."""
    return np.frombuffer(column, dtype="<u4").astype(np.int64)


def feedback(plan: StepPlan) -> Ints:
    """Entry of the step before whose sampled token each entry computes; -1: none."""
    entries = unpack(plan.feedback)
    return np.where(entries == NO_FEEDBACK, -1, entries)


def logit_rows(ends_E: Ints, logits_E: Ints) -> Ints:
    """The last logits_E[i] rows before ends_E[i], entry by entry."""
    return np.arange(logits_E.sum()) + np.repeat(ends_E - np.cumsum(logits_E), logits_E)


def _dense(tables: Ints, lengths: Ints) -> Ints:
    dense = np.zeros((len(lengths), int(lengths.max(initial=1))), dtype=np.int64)
    dense[np.arange(dense.shape[1]) < lengths[:, None]] = tables
    return dense


def _pad(values_T: Ints, lacking: int) -> Ints:
    return np.pad(values_T, (0, lacking), mode="edge") if lacking else values_T


def _place(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)
