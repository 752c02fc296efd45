"""Prompts of the matrix, and what transformers itself makes of them."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from tests.support.models import VOCABULARY
from tests.unit.dataplane.engine.reference import reference_model

PROMPTS = 64
TOKENS = 16


def prompts(seed: int = 1) -> list[list[int]]:
    """64 random prompts of 1 to 150 tokens; every fourth begins as the first of the three before it does."""
    chooser = random.Random(seed)
    result: list[list[int]] = []
    while len(result) < PROMPTS:
        result += [_tokens(chooser, chooser.randint(1, 150)) for _ in range(3)]
        result.append(result[-3][: len(result[-3]) * 3 // 4] + _tokens(chooser, 5))
    return result


def _tokens(chooser: random.Random, count: int) -> list[int]:
    return [chooser.randrange(VOCABULARY) for _ in range(count)]


def write_reference(folder: Path, path: Path) -> None:
    """Store prompts, greedy tokens (P, N) and the raw logits of each (P, N, V) of the model in `folder`."""
    model = reference_model(folder)
    model.generation_config.eos_token_id = None
    tokens: list[list[int]] = []
    logits: list[torch.Tensor] = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append(torch.cat(out.logits))
    torch.save({"prompts": prompts(), "tokens": tokens, "logits": torch.stack(logits)}, path)
