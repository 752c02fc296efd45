"""From logits to tokens. Every row is computed from itself alone: its token is the same in any batch.

Order of application, as in vLLM: logprobs are taken from the raw logits; then logit bias, the mask of end and stop
tokens below min_tokens, repetition, frequency and presence penalty; a temperature of 0 takes the arg-max; else
temperature, min-p, top-k, top-p, and a draw keyed by (seed, position) (noise.py). The three filters are cuts: the
lowest logit that stays. Tokens that tie with it stay too, so that no order of equal logits matters.

Shape letters: N rows, M some of them, V vocabulary, C candidates of a row (its largest logits, falling).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from controlplane.runtime.messages.common import Sampling
from dataplane.engine.noise import draw_key, gumbel, keys, token_words

CANDIDATES = 1024
"""Rows are cut by their largest logits first, and by the whole row only if these do not decide."""

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

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._words_V = token_words(torch.arange(vocab_size, device=device))
        self._device = device

    def sample(self, logits_NV: Tensor, rows: Sequence[SampleRow]) -> Tensor:
        """(N,) int64 token ids, still on the device; -1 where a row's logits are no numbers."""
        best_N = logits_NV.argmax(-1)
        # A NaN is the largest value to arg-max, so the best one tells for the row.
        sound_N = torch.isfinite(logits_NV.gather(-1, best_N.unsqueeze(-1))).squeeze(-1)
        chosen = [index for index, row in enumerate(rows) if not row.is_plain]
        if chosen:
            index_M = torch.tensor(chosen, device=self._device)
            logits_MV = logits_NV.index_select(0, index_M).float()
            best_N[index_M] = self._draw(logits_MV, [rows[index] for index in chosen])
        return torch.where(sound_N, best_N, -1)

    def _draw(self, logits_MV: Tensor, rows: list[SampleRow]) -> Tensor:
        adjust(logits_MV, rows)
        tokens_M = logits_MV.argmax(-1)
        drawn = [index for index, row in enumerate(rows) if not row.is_greedy]
        if drawn:
            index_M = torch.tensor(drawn, device=self._device)
            tokens_M[index_M] = self._draw_scaled(logits_MV.index_select(0, index_M), [rows[i] for i in drawn])
        return tokens_M

    def _draw_scaled(self, logits_MV: Tensor, rows: list[SampleRow]) -> Tensor:
        settings = [row.sampling for row in rows]
        logits_MV /= self._column([s.temperature for s in settings])
        keys_M = keys([draw_key(row.sampling.seed, row.position) for row in rows], self._device)
        tokens_M = torch.empty(len(rows), dtype=torch.long, device=self._device)
        short = [index for index, s in enumerate(settings) if 0 < s.top_k <= CANDIDATES]
        if short:
            index_M = torch.tensor(short, device=self._device)
            tokens_M[index_M] = self._draw_short(logits_MV[index_M], keys_M[index_M], [settings[i] for i in short])
        for index in set(range(len(rows))).difference(short):
            setting = settings[index]
            draw = self._draw_cut if setting.top_k or setting.min_p > 0 or setting.top_p < 1 else self._draw_whole
            tokens_M[index] = draw(logits_MV[index], keys_M[index : index + 1], setting)
        return tokens_M

    def _draw_short(self, logits_MV: Tensor, keys_M: Tensor, settings: list[Sampling]) -> Tensor:
        """Rows whose top-k is among the candidates."""
        values_MC, ids_MC = logits_MV.topk(min(CANDIDATES, logits_MV.shape[1]))
        lowest_M1 = self._lowest(values_MC, settings, None)
        return self._draw_among(values_MC, ids_MC, lowest_M1, keys_M)

    def _draw_cut(self, logits_V: Tensor, key_1: Tensor, setting: Sampling) -> Tensor:
        """A row of which any number of tokens may stay. The candidates decide if all that stay are among them."""
        vocab = logits_V.shape[0]
        values_1C, ids_1C = logits_V.unsqueeze(0).topk(min(CANDIDATES, vocab))
        floor = values_1C[:, :1] + _log(setting.min_p)
        kept_V = logits_V.masked_fill(logits_V < floor[0], _OUT)
        total_11 = (1 / kept_V.softmax(-1).amax()).view(1, 1)
        # Elsewhere the question would stop the host: sort.
        if self._device.type != "cpu" or setting.top_k or not _covers(values_1C, floor, total_11, setting.top_p):
            values_1C, ids_1C = logits_V.unsqueeze(0).sort(descending=True)
            total_11 = None
        return self._draw_among(values_1C, ids_1C, self._lowest(values_1C, [setting], total_11), key_1).squeeze(0)

    def _draw_whole(self, logits_V: Tensor, key_1: Tensor, _: Sampling) -> Tensor:
        """Any token may be drawn. Row by row: the numbers of one row stay in a core's cache."""
        return gumbel(key_1, self._words_V).squeeze(0).add_(logits_V).argmax()

    def _draw_among(self, values_MC: Tensor, ids_MC: Tensor, lowest_M1: Tensor, keys_M: Tensor) -> Tensor:
        scores_MC = gumbel(keys_M, self._words_V[ids_MC]).add_(values_MC).masked_fill_(values_MC < lowest_M1, _OUT)
        return ids_MC.gather(-1, scores_MC.argmax(-1, keepdim=True)).squeeze(-1)

    def _lowest(self, values_MC: Tensor, settings: list[Sampling], total_M1: Tensor | None) -> Tensor:
        """The lowest logit that stays in each row. `total_M1`: weight, relative to the largest, of all that min-p and
        top-k leave; absent: all of that is among the candidates."""
        width = values_MC.shape[1]
        best_M1 = values_MC[:, :1]
        rank_M1 = self._column([min(s.top_k or width, width) for s in settings]).long() - 1
        lowest_M1 = torch.maximum(
            best_M1 + self._column([_log(s.min_p) for s in settings]), values_MC.gather(-1, rank_M1)
        )
        weights_MC = (values_MC - best_M1).exp_().masked_fill_(values_MC < lowest_M1, 0)
        sums_MC = weights_MC.cumsum(-1)
        total_M1 = sums_MC[:, -1:] if total_M1 is None else total_M1
        mass_M1 = self._column([s.top_p for s in settings])
        # A token stays if those before it fall short of the mass.
        count_M1 = (sums_MC - weights_MC < mass_M1 * total_M1).sum(-1, keepdim=True).clamp(min=1)
        nucleus_M1 = values_MC.gather(-1, count_M1 - 1)
        return torch.where(mass_M1 < 1, torch.maximum(lowest_M1, nucleus_M1), lowest_M1)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device).unsqueeze(-1)


def adjust(logits_MV: Tensor, rows: Sequence[SampleRow]) -> None:
    """Bias, stop mask and penalties, in place."""
    for logits_V, row in zip(logits_MV, rows, strict=True):
        sampling = row.sampling
        if sampling.logit_bias:
            ids = _ids(sampling.logit_bias.keys(), logits_V)
            logits_V[ids] += torch.tensor(list(sampling.logit_bias.values()), device=logits_V.device)
        if row.forbids_stop:
            logits_V[_ids(row.stop_ids, logits_V)] = _OUT
        if row.has_penalties:
            _penalise(logits_V, row)


def _penalise(logits_V: Tensor, row: SampleRow) -> None:
    """Repetition counts prompt and answer (CTRL, arXiv:1909.05858), frequency and presence the answer alone."""
    sampling = row.sampling
    tokens = np.asarray(row.tokens, dtype=np.int64)
    if sampling.repetition_penalty != 1:
        seen = torch.from_numpy(np.unique(tokens)).to(logits_V.device)
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    ids, counts = np.unique(tokens[row.prompt_length :], return_counts=True)
    said = torch.from_numpy(ids).to(logits_V.device)
    times = torch.from_numpy(counts).to(logits_V.device, torch.float32)
    logits_V[said] -= times * sampling.frequency_penalty + sampling.presence_penalty


def _covers(values_1C: Tensor, floor_11: Tensor, total_11: Tensor, mass: float) -> bool:
    """Whether no token beyond the candidates can stay."""
    if bool(values_1C[0, -1] < floor_11):
        return True
    return mass < 1 and bool((values_1C - values_1C[:, :1]).exp().sum() >= mass * total_11)


def _ids(ids: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.long, device=like.device)


def _log(share: float) -> float:
    return math.log(share) if share > 0 else _OUT
