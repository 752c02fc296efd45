"""Prompts, and what transformers itself generates for them."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.support.models import VOCABULARY


def mixed_prompts(count: int, seed: int = 1) -> list[list[int]]:
    """Random prompts of 1 to 150 tokens."""
    chooser = random.Random(seed)
    return [[chooser.randrange(VOCABULARY) for _ in range(chooser.randint(1, 150))] for _ in range(count)]


@cache
def reference_model(folder: Path) -> Any:
    """The model in `folder`, float32, as its authors run it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """The `count` tokens that greedy generation adds to `prompt`; no token ends it."""
    return list(_greedy(folder, tuple(prompt), count))


@cache
def _greedy(folder: Path, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    model = reference_model(folder)
    model.generation_config.eos_token_id = None
    # A mask of ones: a token that equals a padding id is a token like any other.
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return tuple(out[0, len(prompt) :].tolist())
