"""Gemma 3 270M with its own weights, on real text, against transformers and against itself."""

from __future__ import annotations

from importlib.util import find_spec
from math import exp, fsum, prod
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from dataplane.models.demo import DEMO_PACKAGE, prepare_demo_model
from tests.matrix.conftest import Tell
from tests.matrix.texts import OPENINGS, pages
from tests.support.ranks import RankPool

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec(DEMO_PACKAGE) is None, reason="the demo model is not installed: the extra `demo`"),
]

COUNT = 100
COUNT_EXACT = 60


@pytest.fixture(scope="module")
def model() -> Path:
    """The folder that `perdure up` prepares."""
    return prepare_demo_model(lambda *_: None)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="module")
def wanted(model: Path, tokenizer: Tokenizer) -> tuple[list[list[int]], list[float]]:
    """transformers' greedy tokens after each opening, and its sum of log probabilities for each page."""
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    prompts = [tokenizer.encode(opening).ids for opening in OPENINGS]
    # In one batch, padded on the left: in float32 its tokens are those of each prompt alone.
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.generate(ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False)
    tokens: list[list[int]] = out[:, width:].tolist()
    sums: list[float] = []
    for page in pages(lambda text: tokenizer.encode(text).ids):
        ids = torch.tensor(page)
        with torch.no_grad():
            logprobs = theirs(ids[None, :-1]).logits[0].log_softmax(-1)
        sums.append(float(logprobs[torch.arange(len(page) - 1), ids[1:]].double().sum()))
    return tokens, sums


@pytest.mark.parametrize(
    "degrees",
    [{"tensor": 1}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}],
    ids=lambda degrees: "x".join(f"{axis}{size}" for axis, size in degrees.items()),
)
def test_text_and_perplexity_are_those_of_transformers(
    degrees: dict[str, int],
    model: Path,
    tokenizer: Tokenizer,
    wanted: tuple[list[list[int]], list[float]],
    ranks: RankPool,
    tell: Tell,
) -> None:
    tokens, sums = wanted
    texts = pages(lambda text: tokenizer.encode(text).ids)
    told = ranks.run(
        "tests.matrix.demo_jobs:read_and_write",
        prod(degrees.values()),
        timeout_s=1500,
        path=str(model),
        degrees=degrees,
        prompts=[tokenizer.encode(opening).ids for opening in OPENINGS],
        pages=texts,
        count=COUNT,
    )[0]
    predicted = sum(len(page) - 1 for page in texts)
    theirs, ours = (exp(-fsum(found) / predicted) for found in (sums, told["sums"]))
    equal = sum(a == b for a, b in zip(told["tokens"], tokens, strict=True))
    tell(
        f"gemma-3-270m {degrees} float32: {equal}/{len(OPENINGS)} texts of {COUNT} tokens equal; perplexity over "
        f"{predicted} tokens {ours:.5f}, transformers {theirs:.5f} ({(ours / theirs - 1) * 100:+.5f} %)"
    )
    assert told["tokens"] == tokens
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("degrees", [{"tensor": 1}, {"tensor": 2}], ids=["tensor1", "tensor2"])
def test_bfloat16_tokens_are_the_same_whatever_else_happens(
    degrees: dict[str, int], model: Path, tokenizer: Tokenizer, ranks: RankPool, tell: Tell
) -> None:
    """`numerics: exact`."""
    told = ranks.run(
        "tests.matrix.demo_jobs:disturb",
        prod(degrees.values()),
        timeout_s=1500,
        path=str(model),
        degrees=degrees,
        prompts=[tokenizer.encode(opening).ids for opening in OPENINGS],
        count=COUNT_EXACT,
    )[0]
    alone = told["tokens"].pop("alone")
    for name, tokens in told["tokens"].items():
        equal = sum(a == b for a, b in zip(tokens, alone, strict=True))
        tell(f"gemma-3-270m {degrees} bfloat16: {name}, {equal}/{len(alone)} answers of {COUNT_EXACT} tokens as alone")
    assert all(tokens == alone for tokens in told["tokens"].values())
    assert told["cached"] > 0
