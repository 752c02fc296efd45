"""What the engine is measured with: models by their shape, and lists of requests. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """A model known by its dimensions."""

    name: str
    family: str
    config: dict[str, Any]
    # Tokens of a step: as many as take about a fifth of a second, or fewer.
    batch_tokens: int

    @property
    def parameters(self) -> int:
        """Weights that a decode step reads: everything but an embedding table that is only looked up in."""
        c = self.config
        attention = c["hidden_size"] * c["head_dim"] * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
        layer = attention + 3 * c["hidden_size"] * c["intermediate_size"]
        return c["num_hidden_layers"] * layer + c["vocab_size"] * c["hidden_size"]

    @property
    def cache_bytes_a_token(self) -> int:
        """Keys and values of one position, bf16."""
        c = self.config
        return 2 * 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * c["head_dim"]

    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of each product of a step, in order."""
        c = self.config
        h, i, d = c["hidden_size"], c["intermediate_size"], c["head_dim"]
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        layer = [((heads + 2 * kv) * d, h), (h, heads * d), (2 * i, h), (h, i)]
        return layer * c["num_hidden_layers"] + [(c["vocab_size"], h)]


SHAPES = {
    "8b": Shape(
        "Llama-3.1-8B's shape",
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
        batch_tokens=8192,
    ),
    "0.6b": Shape(
        "Qwen3-0.6B's shape",
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
        batch_tokens=16384,
    ),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One request: greedy, no token ends it early."""

    prompt: list[int]
    answer_tokens: int


def mixed_jobs(count: int = 256, shortest: int = 100, longest: int = 1024, vocabulary: int = 10000) -> list[Job]:
    """Prompts and answers of random lengths: with the usual arguments 142,827 and 133,966 tokens in all."""
    chooser = random.Random(0)
    prompts: list[list[int]] = []
    for _ in range(count):
        length = chooser.randint(shortest, longest)
        prompts.append([chooser.randint(0, vocabulary) for _ in range(length)])
    return [Job(prompt, chooser.randint(shortest, longest)) for prompt in prompts]


def equal_jobs(count: int, prompt_tokens: int, answer_tokens: int, vocabulary: int = 10000) -> list[Job]:
    """Requests of one size."""
    chooser = random.Random(1)
    return [Job([chooser.randint(0, vocabulary) for _ in range(prompt_tokens)], answer_tokens) for _ in range(count)]
