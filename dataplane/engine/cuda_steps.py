"""Runs plans on a GPU: inputs in one copy, small steps as captured CUDA graphs, the largest logits found on the way.

A graph is captured for so many rows and replayed for steps of no more; rows behind a step's own compute what nobody
reads. Steps of single tokens (decodes) have graphs of their own, without the prefill kernel and with one row of logits
a token.

Shape letters: T rows of the step, N rows of logits, V vocabulary, E entries.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataplane.engine.arrangement import ITEM_COLUMNS, MERGE_COLUMNS, TILE_COLUMNS, Runs
from dataplane.engine.attention import running
from dataplane.engine.attention_choice import Dense
from dataplane.engine.attention_cuda import CudaAttentionStep, Kind, Work
from dataplane.engine.cuda_work import SPARE_LINES_MAX, Size, WorkMaker
from dataplane.engine.inputs import Ints, feedback, logit_rows, unpack
from dataplane.engine.invariant import InvariantOps
from dataplane.engine.kv_cache import KVCache
from dataplane.engine.plan import StepPlan
from dataplane.engine.staging import Section, Staging
from dataplane.kernels.feed import feed
from dataplane.kernels.greedy import greedy
from dataplane.models.fast_layers import ends_early
from dataplane.models.fit import FittedModel
from dataplane.progress import ProgressPage

GRAPH_TOKENS_MAX = 512
"""Steps with runs of several tokens are captured up to so many rows: above, the GPU is slower than the host."""


@dataclass(frozen=True, slots=True, eq=False)
class HostStep:
    """A plan unpacked: int64 arrays on the host."""

    tokens_T: Ints
    fed_T: Ints
    positions_T: Ints
    slots_T: Ints
    rows_N: Ints
    ropes_T: Ints | None
    tables: Ints
    runs: Runs

    @property
    def is_decode(self) -> bool:
        """One token and one row of logits an entry."""
        return len(self.tokens_T) == len(self.rows_N) == len(self.runs.counts_E)


@dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """A staged step."""

    tokens_T: Tensor
    fed_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    # None: every row.
    rows_N: Tensor | None
    ropes_T: Tensor | None
    tables: Tensor
    work: Callable[[Kind], Work]


@dataclass(frozen=True, slots=True, eq=False)
class StepResult:
    """Logits (N, V_local) of the last stage or hidden states (T, H) of another, and each row's best token.

    A graph's next replay overwrites them.
    """

    out: Tensor
    best_N: Tensor | None
    captured: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    graph: torch.cuda.CUDAGraph
    result: StepResult


class CudaSteps:
    """Owns the staging buffers, the last step's tokens and the graphs of one rank."""

    def __init__(
        self,
        model: FittedModel,
        cache: KVCache,
        device: torch.device,
        rows_max: int,
        tables_max: int,
        page: ProgressPage | None,
        maker: WorkMaker,
        dense: Dense | None,
        *,
        exact: bool,
    ) -> None:
        """For steps of up to `rows_max` tokens whose entries' tables hold up to `tables_max` blocks. `dense`: what
        attends the prompts that `maker` leaves to it; `exact`: batch-invariant, as `maker` is then."""
        self._maker = maker
        self._dense = dense
        self._operations = InvariantOps if exact else nullcontext
        self._model = model
        self._cache = cache
        self._device = device
        self._page = page
        self._staging = Staging(_integers(rows_max, tables_max), device)
        self._drawn_N = torch.zeros(rows_max, dtype=torch.long, device=device)
        # Row of logits of each entry of the last step.
        self._ends_E: Ints = np.zeros(0, dtype=np.int64)
        self._kinds: list[Kind] = []
        self._graphs: dict[Size, _Graph] = {}
        self._decode_rows: list[int] = []
        self._mixed_rows: list[int] = []
        self._logits_max = 0
        self._logits = 0
        self._ends_early = ends_early(model.module)

    def attach(self, model: FittedModel) -> None:
        """Go on with the same weights on another epoch's mesh."""
        self._model = model

    def run(self, plan: StepPlan, hidden_TH: Tensor | None) -> StepResult:
        """Launch a step; nothing waits for it."""
        step = self._unpack(plan)
        if self._model.mesh.tensor.size > 1 and (step.fed_T >= 0).any():
            # What the driver drew; the others know the arg-max only.
            self._model.mesh.tensor.broadcast(self._drawn_N[: self._logits], 0)
        self._logits = len(step.rows_N)
        self._ends_E = np.cumsum(unpack(plan.logit_counts)) - 1
        size = self._size(step) if hidden_TH is None else None
        if size is None or self._stage(step, size) is None:
            return self._gathered(self._forward(self._stage_whole(step), hidden_TH))
        captured = self._graphs[size]
        captured.graph.replay()
        return self._gathered(captured.result)

    def keep(self, tokens_N: Tensor) -> None:
        """What the step launched last gave, by row of logits, for the next one to take."""
        if tokens_N.data_ptr() != self._drawn_N.data_ptr():
            self._drawn_N[: len(tokens_N)].copy_(tokens_N)

    def capture(self, sequences: int, moved: Callable[[float], None]) -> None:
        """Capture graphs for decodes of up to `sequences` rows and for small mixed steps; at least one step has run."""
        self.drop_graphs()
        if not self._may_capture():
            return
        self._decode_rows = decode_sizes(sequences)
        self._mixed_rows = mixed_sizes(min(GRAPH_TOKENS_MAX, len(self._drawn_N)))
        self._logits_max = sequences
        sizes = [Size(rows, rows, decode=True) for rows in self._decode_rows]
        sizes += [Size(rows, min(rows, sequences), decode=False) for rows in self._mixed_rows]
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the others fit into its memory.
        for index, size in enumerate(sorted(sizes, key=lambda item: -item.rows)):
            moved(index / len(sizes))
            graph = self._capture(size, pool)
            if graph is not None:
                self._graphs[size] = graph
        torch.cuda.synchronize(self._device)

    def drop_graphs(self) -> None:
        """Until the next `capture`, steps run without."""
        self._graphs.clear()

    def _may_capture(self) -> bool:
        group = self._model.mesh.tensor
        return group.size == 1 or (group.transport is not None and group.transport.device_board is not None)

    def _capture(self, size: Size, pool: Any) -> _Graph | None:
        """None: NCCL would be in it, whose abort waits until no graph is left that holds its kernels."""
        tensors = self._stage(_idle_step(), size)
        assert tensors is not None, "a step of nothing fits"
        group = self._model.mesh.tensor
        with torch.inference_mode():
            # Once outside: libraries set themselves up at a first call.
            before = group.over_backend
            self._forward(tensors, None)
            torch.cuda.synchronize(self._device)
            if group.over_backend > before:
                return None
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device: NCCL's watch, an abort.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                result = self._forward(tensors, None)
        return _Graph(graph, StepResult(result.out, result.best_N, captured=True))

    def _size(self, step: HostStep) -> Size | None:
        """The smallest graph that holds the step."""
        decode, rows = step.is_decode, len(step.tokens_T)
        sizes = self._decode_rows if decode else self._mixed_rows
        index = bisect_left(sizes, rows)
        if index == len(sizes) or len(step.rows_N) > self._logits_max:
            return None
        size = Size(sizes[index], sizes[index] if decode else min(sizes[index], self._logits_max), decode)
        return size if size in self._graphs and len(step.rows_N) <= size.logits else None

    def _forward(self, tensors: StepTensors, hidden_TH: Tensor | None) -> StepResult:
        mesh = self._model.mesh
        tokens_T = feed(tensors.tokens_T, tensors.fed_T, self._drawn_N) if mesh.is_first_stage else None
        step = CudaAttentionStep(
            self._cache, tensors.slots_T, tensors.tables, tensors.work, self._page, tensors.rows_N, self._dense
        )
        rows_N = slice(None) if tensors.rows_N is None or self._ends_early else tensors.rows_N
        with running(step), self._operations():
            out = self._model.forward(tokens_T, hidden_TH, tensors.positions_T, rows_N, tensors.ropes_T)
        if not mesh.is_last_stage or mesh.tensor.size > 1:
            return StepResult(out, None, captured=False)
        return self._with_best(out)

    def _gathered(self, result: StepResult) -> StepResult:
        """With the logits of all tensor ranks side by side."""
        mesh = self._model.mesh
        if not mesh.is_last_stage or mesh.tensor.size == 1:
            return result
        return self._with_best(mesh.tensor.all_gather(result.out).transpose(0, 1).flatten(1))

    def _with_best(self, logits_NV: Tensor) -> StepResult:
        logits_NV = logits_NV[:, : self._model.vocab_size]
        return StepResult(logits_NV, greedy(logits_NV, self._drawn_N), captured=False)

    # ------------------------------------------------------------ inputs

    def _unpack(self, plan: StepPlan) -> HostStep:
        starts, counts = unpack(plan.starts), unpack(plan.counts)
        lengths = unpack(plan.table_lengths)
        tables = unpack(plan.tables)
        table_starts = np.cumsum(lengths) - lengths
        offsets = np.cumsum(counts) - counts
        entry_T = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(entry_T)) + (starts - offsets)[entry_T]
        tokens = self._cache.block_tokens
        slots = tables[table_starts[entry_T] + positions // tokens] * tokens + positions % tokens
        sources = feedback(plan)
        fed = np.where(sources >= 0, self._ends_E[sources], -1) if len(self._ends_E) else sources
        return HostStep(
            tokens_T=unpack(plan.tokens),
            fed_T=fed[entry_T],
            positions_T=positions,
            slots_T=slots,
            rows_N=logit_rows(offsets + counts, unpack(plan.logit_counts)),
            ropes_T=unpack(plan.rope_lengths)[entry_T] if self._model.needs_rope_lengths else None,
            tables=tables,
            runs=Runs(starts, counts, offsets, table_starts, len(entry_T)),
        )

    def _stage(self, step: HostStep, size: Size) -> StepTensors | None:
        """The step on the device, filled up to what a graph was captured for. None: its attention does not fit."""
        sections = _row_sections(step, size)
        begins: list[int] = []
        for kind in self._kinds:
            work = self._maker.sections(step.runs, kind, size)
            if work is None:
                return None
            begins.append(len(sections))
            sections += work
        views = self._staging.stage([*sections, _tables(step)])
        works = {
            kind: self._maker.from_sections(views[begin:], size)
            for kind, begin in zip(self._kinds, begins, strict=True)
        }
        return _tensors(step, views, works.__getitem__, every_row=size.decode)

    def _stage_whole(self, step: HostStep) -> StepTensors:
        """The step on the device as it is. Attention is arranged when the first layer of its kind asks."""
        works: dict[Kind, Work] = {}

        def work(kind: Kind) -> Work:
            if kind not in works:
                if kind not in self._kinds:
                    self._kinds.append(kind)
                works[kind] = self._maker.upload(step.runs, kind)
            return works[kind]

        views = self._staging.stage([*_row_sections(step, None), _tables(step)])
        return _tensors(step, views, work, every_row=False)


def _row_sections(step: HostStep, size: Size | None) -> list[Section]:
    rows = size.rows if size is not None else 0
    sections = [
        Section(step.tokens_T, rows),
        Section(step.fed_T, rows, fill=-1),
        Section(step.positions_T, rows),
        Section(step.slots_T, rows, fill=-1),
        Section(step.rows_N, size.logits if size is not None else 0),
    ]
    return sections if step.ropes_T is None else [*sections, Section(step.ropes_T, rows)]


def _tables(step: HostStep) -> Section:
    # At least one: the address of nothing would be captured as null.
    return Section(step.tables, 1)


def _tensors(step: HostStep, views: Sequence[Tensor], work: Callable[[Kind], Work], *, every_row: bool) -> StepTensors:
    return StepTensors(
        tokens_T=views[0],
        fed_T=views[1],
        positions_T=views[2],
        slots_T=views[3],
        rows_N=None if every_row else views[4],
        ropes_T=views[5] if step.ropes_T is not None else None,
        tables=views[-1],
        work=work,
    )


def decode_sizes(sequences: int) -> list[int]:
    """Rows that decodes are captured for, rising: a step computes at most 7, later at most 15, rows for nothing."""
    sizes = [1, 2, 4, *range(8, min(sequences, 128), 8), *range(128, sequences, 16), sequences]
    return sorted({size for size in sizes if size <= sequences})


def mixed_sizes(rows_max: int) -> list[int]:
    """Rows that steps with prompts are captured for, rising."""
    return [rows for rows in (16, 32, 64, 128, 192, 256, 384, 512) if rows <= rows_max]


def _idle_step() -> HostStep:
    """A step without entries, to capture with."""
    none = np.zeros(0, dtype=np.int64)
    return HostStep(none, none, none, none, none, None, none, Runs(none, none, none, none, 0))


def _integers(rows: int, tables: int) -> int:
    """Room for a step's sections: five columns of rows, the kernels' work for a few kinds of layers, and tables."""
    work = (rows + SPARE_LINES_MAX) * (ITEM_COLUMNS + MERGE_COLUMNS + TILE_COLUMNS)
    return 8 * rows + 4 * work + tables + 4096
