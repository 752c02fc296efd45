from __future__ import annotations

import math
from array import array

import pytest
import torch
from torch import Tensor

from controlplane.runtime.messages.common import Sampling
from controlplane.runtime.packing import unpack_f32, unpack_u32
from dataplane.engine.logprobs import describe
from dataplane.engine.noise import draw_key, gumbel, keys, mix, mix_, token_words
from dataplane.engine.sampler import CANDIDATES_MORE, Sampler, SampleRow, adjust, largest
from dataplane.engine.validation import refusal
from dataplane.frames import SequenceId

CPU = torch.device("cpu")


def row(sampling: Sampling, tokens: tuple[int, ...] = (), prompt: int = 0, position: int = 10) -> SampleRow:
    return SampleRow(sampling, position, array("I", tokens), prompt, frozenset(sampling.stop_ids))


def draw(logits: Tensor, *samplings: Sampling, position: int = 10) -> list[int]:
    rows = [row(sampling, position=position) for sampling in samplings]
    return Sampler(logits.shape[-1], CPU).sample(logits.expand(len(rows), -1), rows).tolist()


# ---------------------------------------------------------------- noise


def test_hash_has_golden_values() -> None:
    """They may never change: replays on another version would draw other tokens."""
    assert [mix(word) for word in (0, 1, 2, 0xDEADBEEF, 0xFFFFFFFF)] == GOLDEN_MIX
    assert [draw_key(seed, position) for seed, position in GOLDEN_POINTS] == GOLDEN_KEYS
    keys_M = keys([draw_key(7, 3)], CPU)
    words = mix_(keys_M.unsqueeze(-1) ^ token_words(torch.tensor([0, 1, 262_143])))
    assert words[0].tolist() == GOLDEN_WORDS


GOLDEN_POINTS = [(0, 0), (0, 1), (1, 0), (1 << 32, 0), ((1 << 64) - 1, 4_000_000_000), (42, 1000)]
GOLDEN_MIX = [0, 1753845952, 3507691905, 3861431939, 1734902346]
GOLDEN_KEYS = [2926543089, 1214650568, 2385989600, 2319961184, 4287589298, 3878470339]
GOLDEN_WORDS = [1928664086, -84667808, -913031725]


def test_vectorised_hash_is_the_scalar_one() -> None:
    key = draw_key(123_456_789_012_345, 77)
    ids = torch.arange(500)
    step = 0x9E3779B9
    expected = []
    for token in range(500):
        bits = mix(key ^ (token * step & 0xFFFFFFFF)) & 0x7FFFFFFF
        expected.append(-math.log(-math.log1p(-(bits + 0.5) / 2**31)))
    drawn = gumbel(keys([key], CPU), token_words(ids))[0]
    assert torch.allclose(drawn, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_shard_draws_what_the_whole_vocabulary_would() -> None:
    keys_M = keys([draw_key(1, 2), draw_key(3, 4)], CPU)
    words = token_words(torch.arange(1000))
    assert torch.equal(gumbel(keys_M, words)[:, 300:700], gumbel(keys_M, words[300:700]))


def test_neighbouring_draws_are_uncorrelated() -> None:
    for first, second in (((5, 10), (5, 11)), ((5, 10), (6, 10)), ((5, 10), (5 + (1 << 32), 10))):
        drawn = gumbel(keys([draw_key(*first), draw_key(*second)], CPU), token_words(torch.arange(100_000)))
        assert abs(float(torch.corrcoef(drawn)[0, 1])) < 0.02
    shifted = gumbel(keys([draw_key(5, 10)], CPU), token_words(torch.arange(100_001)))[0]
    assert abs(float(torch.corrcoef(torch.stack((shifted[:-1], shifted[1:])))[0, 1])) < 0.02


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


PROBABILITIES = torch.tensor([0.3, 0.2, 0.15, 0.15, 0.1, 0.05, 0.03, 0.02])
CHI_SQUARE_999 = 24.32
"""99.9th percentile for seven degrees of freedom."""


@pytest.mark.parametrize("axis", ["positions", "seeds"])
@pytest.mark.parametrize("candidates", [0, 8])
def test_draws_follow_the_distribution(axis: str, candidates: int) -> None:
    count = 20_000
    logits = PROBABILITIES.log().expand(count, -1)
    points = [(1, n) if axis == "positions" else (n, 1) for n in range(count)]
    rows = [row(Sampling(seed=seed, top_k=candidates), position=position) for seed, position in points]
    drawn = Sampler(8, CPU).sample(logits, rows)
    assert chi_square(torch.bincount(drawn, minlength=8), PROBABILITIES) < CHI_SQUARE_999


# ---------------------------------------------------------------- filters


def allowed(logits: Tensor, sampling: Sampling) -> set[int]:
    """Tokens that 3,000 draws bring."""
    rows = [row(sampling, position=position) for position in range(3000)]
    return set(Sampler(logits.shape[0], CPU).sample(logits.expand(len(rows), -1), rows).tolist())


LADDER = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]))


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), {0, 1, 2, 3, 4}),
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_k=50), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.69), {0, 1}),
        (Sampling(top_p=0.71), {0, 1, 2}),
        (Sampling(top_p=0.0), {0}),
        (Sampling(min_p=0.3), {0, 1, 2}),
        (Sampling(min_p=1.0), {0}),
        # Top-p is a share of what min-p and top-k leave.
        (Sampling(top_k=2, top_p=0.57), {0}),
        (Sampling(top_k=2, top_p=0.58), {0, 1}),
        (Sampling(min_p=0.7, top_p=0.58), {0, 1}),
        # Filters see the logits after temperature.
        (Sampling(temperature=0.25, min_p=0.3), {0, 1}),
    ],
)
def test_filters_keep_what_their_definition_keeps(sampling: Sampling, expected: set[int]) -> None:
    assert allowed(LADDER, sampling) == expected


def test_ties_at_the_cut_stay_together() -> None:
    logits = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0])
    assert allowed(logits, Sampling(top_k=1)) == {1, 3}
    assert allowed(logits, Sampling(top_p=0.2)) == {1, 3}


def keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """The definition over the whole row, in float64: which tokens stay."""
    scaled = logits.double() / sampling.temperature
    stays = scaled >= scaled.max() + (math.log(sampling.min_p) if sampling.min_p else -math.inf)
    if sampling.top_k:
        stays &= scaled >= scaled.sort(descending=True).values[min(sampling.top_k, len(scaled)) - 1]
    if sampling.top_p < 1:
        weights = scaled.masked_fill(~stays, -math.inf).softmax(-1)
        ordered, order = weights.sort(descending=True)
        nucleus = order[ordered.cumsum(-1) - ordered < sampling.top_p]
        stays &= scaled >= scaled[nucleus].min()
    return stays


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_p=0.5, temperature=0.4),
        Sampling(top_p=0.999, temperature=2.0),
        Sampling(top_k=40, top_p=0.9),
        Sampling(top_k=CANDIDATES_MORE + 500),
        Sampling(top_k=CANDIDATES_MORE + 500, top_p=0.97, min_p=1e-4),
        Sampling(min_p=0.001, temperature=1.5),
        Sampling(min_p=0.05, top_p=0.8),
        Sampling(),
        Sampling(temperature=5.0),
    ],
)
def test_large_vocabulary_draws_as_the_definition_masks(sampling: Sampling) -> None:
    """Candidates or the whole row: the same token as arg-max over the tokens that stay."""
    torch.manual_seed(2)
    logits = torch.randn(9000) * 3
    masked = (logits / sampling.temperature).masked_fill(~keep(logits, sampling), -math.inf)
    words = token_words(torch.arange(9000))
    for position in range(30):
        noise = gumbel(keys([draw_key(9, position)], CPU), words)[0]
        seeded = Sampling(**{**{name: getattr(sampling, name) for name in FIELDS}, "seed": 9})
        assert draw(logits, seeded, position=position) == [int((masked + noise).argmax())]


FIELDS = ("temperature", "top_p", "top_k", "min_p")


# ---------------------------------------------------------------- adjustments


def test_temperature_zero_takes_the_arg_max() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0])
    assert draw(logits, Sampling(temperature=0), Sampling(temperature=0, top_k=1, top_p=0.1)) == [1, 1]


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([[2.0, -2.0, 3.0, 1.0, 4.0]])
    sampling = Sampling(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    adjust(logits, [row(sampling, tokens=(0, 1, 2, 2), prompt=2)])
    # 0 and 1 are prompt; 2 was said twice.
    assert logits.tolist() == [[1.0, -4.0, 1.5 - 2 * 0.5 - 0.25, 1.0, 4.0]]


def test_bias_is_added_before_penalties() -> None:
    logits = torch.tensor([[1.0, 1.0]])
    adjust(logits, [row(Sampling(logit_bias={1: -3.0}, repetition_penalty=2.0), tokens=(1,), prompt=1)])
    assert logits.tolist() == [[1.0, -4.0]]


def test_stop_tokens_are_masked_until_min_tokens() -> None:
    logits = torch.tensor([5.0, 1.0, 0.0])
    sampling = Sampling(temperature=0, min_tokens=3, stop_ids=(0,))
    sampler = Sampler(3, CPU)
    drawn = [
        int(sampler.sample(logits[None], [row(sampling, tokens=(2,) * n, prompt=4, position=n)])) for n in (4, 6, 7)
    ]
    assert drawn == [1, 1, 0]


def test_row_is_drawn_the_same_in_any_batch() -> None:
    torch.manual_seed(4)
    logits = (torch.randn(12, 3000) * 4).bfloat16()
    settings = [
        Sampling(seed=n, temperature=(0.0, 0.7, 1.3)[n % 3], top_k=(0, 5, 0, 2000)[n % 4], top_p=(1, 0.9)[n % 2])
        for n in range(12)
    ]
    settings[7] = Sampling(seed=7, repetition_penalty=1.3, logit_bias={5: 9.0})
    rows = [row(setting, tokens=(1, 2, 3), prompt=1, position=3) for setting in settings]
    sampler = Sampler(3000, CPU)
    together = sampler.sample(logits, rows)
    order = torch.randperm(12)
    assert torch.equal(sampler.sample(logits[order], [rows[i] for i in order.tolist()]), together[order])
    assert torch.cat([sampler.sample(logits[i : i + 1], rows[i : i + 1]) for i in range(12)]).equal(together)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_row_of_no_numbers_is_told(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 8)
    logits[1, 3] = bad
    rows = [row(Sampling(temperature=temperature))] * 2
    drawn = Sampler(8, CPU).sample(logits, rows).tolist()
    assert drawn[0] >= 0
    assert drawn[1] == -1


# ---------------------------------------------------------------- log probabilities, validation


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0])
    told = describe(logits, token=2, best=3, sequence=SequenceId(8), index=5)
    expected = logits.log_softmax(-1)
    assert told.chosen == pytest.approx(float(expected[2]))
    assert told.chosen_rank == 3
    assert list(unpack_u32(told.top_ids)) == [1, 3, 2]
    assert list(unpack_f32(told.top_values)) == pytest.approx(expected[[1, 3, 2]].tolist())
    assert (told.sequence, told.index, told.prompt) == (8, 5, False)


def test_no_alternatives_can_be_asked_for() -> None:
    told = describe(torch.zeros(4), token=2, best=0, sequence=SequenceId(1), index=0, prompt=True)
    assert (told.top_ids, told.top_values, told.prompt) == (b"", b"", True)


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        (Sampling(temperature=-0.1), "temperature"),
        (Sampling(temperature=math.nan), "temperature"),
        (Sampling(top_p=1.1), "top_p"),
        (Sampling(min_p=-1), "min_p"),
        (Sampling(repetition_penalty=0), "repetition_penalty"),
        (Sampling(presence_penalty=math.inf), "presence_penalty"),
        (Sampling(seed=1 << 64), "seed"),
        (Sampling(logprobs=101), "logprobs"),
        (Sampling(stop_ids=(100,)), "stop_ids"),
        (Sampling(logit_bias={3: math.nan}), "logit_bias"),
        (Sampling(logit_bias={100: 1.0}), "logit_bias"),
    ],
)
def test_parameters_that_cannot_be_followed_are_named(sampling: Sampling, name: str) -> None:
    text = refusal(sampling, vocab_size=100)
    assert text is not None
    assert text.startswith(name)


def test_usual_parameters_are_followed() -> None:
    assert refusal(Sampling(top_k=40, top_p=0.9, logprobs=5, stop_ids=(99,), logit_bias={0: -100.0}), 100) is None


@pytest.mark.parametrize("vocabulary", [323, 1024, 192 * 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logit_is_found_by_parts(vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, vocabulary).to(dtype)
    logits[1, 200] = logits[1, 40] = logits[1, 300] = 50
    logits[2, 7] = float("nan")
    logits[3] = float("-inf")
    value_N, index_N = largest(logits)
    wanted = logits.max(-1)
    assert torch.equal(value_N.nan_to_num(99), wanted.values.nan_to_num(99))
    assert index_N.tolist() == wanted.indices.tolist()
    assert index_N[1] == 40
    assert index_N[2] == 7
