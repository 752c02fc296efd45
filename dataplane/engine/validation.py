"""Whether sampling parameters can be followed. Pure."""

from __future__ import annotations

import math

from controlplane.runtime.messages.common import Sampling

SEED_MAX = (1 << 64) - 1


def refusal(sampling: Sampling, vocab_size: int) -> str | None:
    """What is wrong with the first parameter that cannot be followed; None: nothing."""
    numbers = (
        ("temperature", sampling.temperature, 0.0, math.inf),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("repetition_penalty", sampling.repetition_penalty, math.ulp(0.0), math.inf),
        ("presence_penalty", sampling.presence_penalty, -math.inf, math.inf),
        ("frequency_penalty", sampling.frequency_penalty, -math.inf, math.inf),
        ("top_k", sampling.top_k, 0, math.inf),
        ("seed", sampling.seed, 0, SEED_MAX),
        ("max_tokens", sampling.max_tokens, 0, math.inf),
        ("min_tokens", sampling.min_tokens, 0, math.inf),
        ("logprobs", sampling.logprobs or 0, 0, vocab_size),
        ("prompt_logprobs", sampling.prompt_logprobs or 0, 0, vocab_size),
    )
    for name, value, low, high in numbers:
        if not math.isfinite(value) or not low <= value <= high:
            return f"{name} must lie between {low:g} and {high:g}, not be {value:g}"
    if any(not math.isfinite(bias) for bias in sampling.logit_bias.values()):
        return "logit_bias must hold finite numbers"
    for name, ids in (("logit_bias", sampling.logit_bias.keys()), ("stop_ids", sampling.stop_ids)):
        outside = next((token for token in ids if not 0 <= token < vocab_size), None)
        if outside is not None:
            return f"{name} names token {outside}, outside the vocabulary of {vocab_size}"
    return None
