"""From logits to tokens. Every row is computed from itself alone: its token is the same in any batch.

Order of application, as in vLLM: logprobs are taken from the raw logits; then logit bias, the mask of end and stop
tokens below min_tokens, repetition, frequency and presence penalty; a temperature of 0 takes the arg-max; else
temperature, min-p, top-k, top-p, and a draw keyed by (seed, position) (noise.py). The three filters are cuts: the
lowest logit that stays. Tokens that tie with it stay too, so that no order of equal logits matters.

Shape letters: N rows, M some of them, V vocabulary, C candidates of a row (its largest logits, falling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from controlplane.runtime.messages.common import Sampling
from dataplane.engine.noise import draw_key, gumbel, keys, place, token_words, uniform

CANDIDATES = 256
"""Filters look at so many of a row's largest logits first: enough for almost any text, and an eighth of the time that
all of a large vocabulary takes."""

CANDIDATES_MORE = 4096
"""And at so many next, before the whole row is sorted."""

CHUNK_ELEMENTS = 1 << 18
"""Rows are drawn in chunks of about so many logits, which a core's cache holds."""

CHUNK_ELEMENTS_GPU = 1 << 22
"""And of so many on a GPU, which wants much work at a time; sorting them takes some ten times their memory."""

PART_ELEMENTS, PART_ELEMENTS_MIN = 512, 64
"""Parts of a row that the largest logit is looked for in."""

GREEDY_BELOW = 1e-5
"""Temperatures below this take the arg-max."""

_OUT = float("-inf")


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to draw."""

    sampling: Sampling
    # Index of the drawn token in its sequence, prompt included.
    position: int
    # Tokens before it, and how many of them are the prompt. Read only where they matter (`has_penalties`).
    tokens: Sequence[int]
    prompt_length: int
    # Tokens masked below min_tokens.
    stop_ids: frozenset[int]

    @property
    def is_greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW

    @property
    def forbids_stop(self) -> bool:
        return self.position - self.prompt_length < self.sampling.min_tokens and bool(self.stop_ids)

    @property
    def has_penalties(self) -> bool:
        sampling = self.sampling
        return bool(sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1)

    @property
    def is_plain(self) -> bool:
        """The arg-max of the raw logits."""
        return self.is_greedy and not (self.sampling.logit_bias or self.has_penalties or self.forbids_stop)


class Sampler:
    """Draws tokens of one vocabulary on one device."""

    def __init__(self, vocab_size: int, device: torch.device, *, alone: bool = False) -> None:
        """`alone`: each row by itself, where kernels choose the order of their sums by the number of rows."""
        self._words_V = token_words(torch.arange(vocab_size, device=device))
        self._device = device
        elements = CHUNK_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS_GPU
        self._chunk_rows = 1 if alone else max(elements // vocab_size, 1)

    def sample(self, logits_NV: Tensor, rows: Sequence[SampleRow | None], best_N: Tensor | None = None) -> Tensor:
        """(N,) int64 token ids, still on the device; -1 where a row's logits are no numbers. A row of None gets the
        arg-max. `best_N`: all rows' arg-max, -1 in the same case, where it is known already."""
        if best_N is not None and all(row is None for row in rows):
            return best_N
        if best_N is None:
            # A NaN is the largest value to max, so the best one tells for the row.
            value_N, tokens_N = largest(logits_NV) if len(rows) else (logits_NV.new_zeros(0), _ids((), logits_NV))
            sick_N = ~torch.isfinite(value_N)
        else:
            tokens_N, sick_N = best_N, best_N < 0
        for draw, indices in self._by_kind(rows):
            for start in range(0, len(indices), self._chunk_rows):
                chunk = indices[start : start + self._chunk_rows]
                index_M = place(np.array(chunk), self._device)
                chosen = [row for i in chunk if (row := rows[i]) is not None]
                tokens_N[index_M] = draw(logits_NV.index_select(0, index_M).float(), chosen)
        return tokens_N.masked_fill_(sick_N, -1)

    def _by_kind(self, rows: Sequence[SampleRow | None]) -> Iterator[tuple[_Draw, list[int]]]:
        """Rows that need more than the arg-max of raw logits, by how they are drawn."""
        kinds: dict[_Draw, list[int]] = {}
        for index, row in enumerate(rows):
            if row is None or row.is_plain:
                continue
            sampling = row.sampling
            if row.is_greedy:
                draw = self._take_best
            elif 0 < sampling.top_k <= CANDIDATES:
                draw = self._draw_short
            elif sampling.top_k or sampling.min_p > 0 or sampling.top_p < 1:
                draw = self._draw_cut
            else:
                draw = self._draw_whole
            kinds.setdefault(draw, []).append(index)
        yield from kinds.items()

    def _take_best(self, logits_MV: Tensor, rows: list[SampleRow]) -> Tensor:
        adjust(logits_MV, rows)
        return logits_MV.max(-1).indices

    def _draw_whole(self, logits_MV: Tensor, rows: list[SampleRow]) -> Tensor:
        """Any token may be drawn."""
        keys_M = self._scale(logits_MV, rows)
        if self._device.type != "cpu" or logits_MV.shape[1] <= CANDIDATES_MORE:
            return gumbel(keys_M, self._words_V).add_(logits_MV).argmax(-1)
        return torch.stack([self._race(row_V, key) for row_V, key in zip(logits_MV, keys_M.split(1), strict=True)])

    def _race(self, logits_V: Tensor, key_1: Tensor) -> Tensor:
        """The arg-max of logit + Gumbel number, with logarithms for the few tokens only that may have it.

        With g = -log E, E = -log(1 - u) >= u: a token beats score s only if u <= E < exp(logit - s). One score to beat
        is that of the largest logit.
        """
        best = logits_V.argmax()
        score = logits_V[best] + gumbel(key_1, self._words_V[best : best + 1]).view(())
        # Slightly wider than the bound, for the rounding of both sides.
        bound_V = (logits_V - (score - 1e-3)).exp_()
        bound_V[best] = 1
        ids_C = (uniform(key_1, self._words_V).view(-1) <= bound_V).nonzero().view(-1)
        return ids_C[gumbel(key_1, self._words_V[ids_C]).view(-1).add_(logits_V[ids_C]).argmax()]

    def _draw_short(self, logits_MV: Tensor, rows: list[SampleRow]) -> Tensor:
        """Rows whose top-k is among the first candidates."""
        keys_M = self._scale(logits_MV, rows)
        values_MC, ids_MC = logits_MV.topk(min(CANDIDATES, logits_MV.shape[1]))
        return self._draw_among(values_MC, ids_MC, self._lowest(values_MC, rows, None), keys_M)

    def _draw_cut(self, logits_MV: Tensor, rows: list[SampleRow]) -> Tensor:
        """Rows of which any number of tokens may stay: as many candidates are taken as hold them all."""
        keys_M = self._scale(logits_MV, rows)
        if self._device.type != "cpu" or logits_MV.shape[1] <= CANDIDATES_MORE:
            # All rows at once; whether fewer candidates are enough would be a question to wait for.
            values_MV, ids_MV = logits_MV.sort(descending=True)
            return self._draw_among(values_MV, ids_MV, self._lowest(values_MV, rows, None), keys_M)
        floor_M1 = logits_MV.amax(-1, keepdim=True) + self._column([_log(row.sampling.min_p) for row in rows])
        kept_MV = logits_MV.masked_fill(logits_MV < floor_M1, _OUT)
        total_M1 = 1 / kept_MV.softmax(-1).amax(-1, keepdim=True)
        tokens = [
            self._draw_row(logits_MV[i : i + 1], floor_M1[i], total_M1[i : i + 1], keys_M[i : i + 1], rows[i])
            for i in range(len(rows))
        ]
        return torch.cat(tokens)

    def _draw_row(self, logits_1V: Tensor, floor_1: Tensor, total_11: Tensor, key_1: Tensor, row: SampleRow) -> Tensor:
        sampling = row.sampling
        widths = (CANDIDATES, CANDIDATES_MORE) if not sampling.top_k else ()
        for width in widths:
            values_1C, ids_1C = logits_1V.topk(width)
            if _holds_all(values_1C[0], floor_1, total_11[0], sampling.top_p):
                return self._draw_among(values_1C, ids_1C, self._lowest(values_1C, [row], total_11), key_1)
        values_1C, ids_1C = logits_1V.sort(descending=True)
        return self._draw_among(values_1C, ids_1C, self._lowest(values_1C, [row], None), key_1)

    def _draw_among(self, values_MC: Tensor, ids_MC: Tensor, lowest_M1: Tensor, keys_M: Tensor) -> Tensor:
        scores_MC = gumbel(keys_M, self._words_V[ids_MC]).add_(values_MC).masked_fill_(values_MC < lowest_M1, _OUT)
        return ids_MC.gather(-1, scores_MC.argmax(-1, keepdim=True)).squeeze(-1)

    def _lowest(self, values_MC: Tensor, rows: list[SampleRow], total_M1: Tensor | None) -> Tensor:
        """The lowest logit that stays in each row. `total_M1`: weight, relative to the largest, of all that min-p and
        top-k leave; absent: all of that is among the candidates."""
        settings = [row.sampling for row in rows]
        width = values_MC.shape[1]
        best_M1 = values_MC[:, :1]
        rank_M1 = self._column([min(s.top_k or width, width) for s in settings]).long() - 1
        floor_M1 = best_M1 + self._column([_log(s.min_p) for s in settings])
        lowest_M1 = torch.maximum(floor_M1, values_MC.gather(-1, rank_M1))
        weights_MC = (values_MC - best_M1).exp_().masked_fill_(values_MC < lowest_M1, 0)
        sums_MC = weights_MC.cumsum(-1)
        total_M1 = sums_MC[:, -1:] if total_M1 is None else total_M1
        mass_M1 = self._column([s.top_p for s in settings])
        # A token stays if those before it fall short of the mass.
        count_M1 = (sums_MC - weights_MC < mass_M1 * total_M1).sum(-1, keepdim=True).clamp(min=1)
        nucleus_M1 = values_MC.gather(-1, count_M1 - 1)
        return torch.where(mass_M1 < 1, torch.maximum(lowest_M1, nucleus_M1), lowest_M1)

    def _scale(self, logits_MV: Tensor, rows: list[SampleRow]) -> Tensor:
        """Adjust and divide by temperature, in place. Returns the rows' keys."""
        adjust(logits_MV, rows)
        logits_MV /= self._column([row.sampling.temperature for row in rows])
        return keys([draw_key(row.sampling.seed, row.position) for row in rows], self._device)

    def _column(self, values: Sequence[float]) -> Tensor:
        return place(np.array(values, dtype=np.float32), self._device).unsqueeze(-1)


def largest(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest value and where it first stands. argmax takes four times as long as max, and max three times
    as long on a CPU as the largest values of parts, the best of these, and its place in its part."""
    width = math.gcd(logits_NV.shape[1], PART_ELEMENTS)
    if logits_NV.device.type != "cpu" or width < PART_ELEMENTS_MIN:
        return logits_NV.max(-1)
    parts_NCW = logits_NV.unflatten(1, (-1, width))
    value_N, part_N = parts_NCW.amax(-1).max(-1)
    part_NW = parts_NCW[torch.arange(len(part_N)), part_N]
    return value_N, part_N * width + part_NW.max(-1).indices


_Draw = Callable[[Tensor, list[SampleRow]], Tensor]
"""(logits_MV float32, changed at will; rows) -> tokens_M."""


def adjust(logits_MV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Bias, stop mask and penalties, in place."""
    for logits_V, row in zip(logits_MV, rows, strict=True):
        sampling = row.sampling
        if sampling.logit_bias:
            ids = _ids(sampling.logit_bias.keys(), logits_V)
            logits_V[ids] += place(np.array(list(sampling.logit_bias.values()), dtype=np.float32), logits_V.device)
        if row.forbids_stop:
            logits_V[_ids(row.stop_ids, logits_V)] = _OUT
        if row.has_penalties:
            _penalise(logits_V, row)


def _penalise(logits_V: Tensor, row: SampleRow) -> None:
    """Repetition counts prompt and answer (CTRL, arXiv:1909.05858), frequency and presence the answer alone."""
    sampling = row.sampling
    tokens = np.asarray(row.tokens, dtype=np.int64)
    if sampling.repetition_penalty != 1:
        seen = place(np.unique(tokens), logits_V.device)
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    ids, counts = np.unique(tokens[row.prompt_length :], return_counts=True)
    said = place(ids, logits_V.device)
    times = place(counts.astype(np.float32), logits_V.device)
    logits_V[said] -= times * sampling.frequency_penalty + sampling.presence_penalty


def _holds_all(values_C: Tensor, floor_1: Tensor, total_1: Tensor, mass: float) -> bool:
    """Whether no token beyond these candidates can stay."""
    if bool(values_C[-1] < floor_1):
        return True
    return mass < 1 and bool((values_C - values_C[0]).exp().sum() >= mass * total_1)


def _ids(ids: Iterable[int], like: Tensor) -> Tensor:
    return place(np.array(list(ids), dtype=np.int64), like.device)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else _OUT
