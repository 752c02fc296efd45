"""How many tokens a step may compute, so that no step takes longer than others can wait for. Pure."""

from __future__ import annotations

_WEIGHT = 0.3
"""Share of the newest measurement in the running estimate."""

_TOKENS_MIN = 32
"""A step of so many tokens is always allowed: below it, overhead outweighs them."""

_COST_MIN = 0.1
"""Least share of a long step's time that its tokens are taken to cost: the rest is what any step takes."""


class Pacer:
    """Learns what any step takes and what a token adds, and sizes the next step by it.

    A step of a whole token budget can take seconds on a slow device; decoding streams would stall behind it and the
    judge of progress would have nothing to see. Where a step without prompts is long already, prompts may double it:
    a few tokens beside each would keep whoever waits for a prompt waiting for many long steps.
    """

    def __init__(self, step_s_max: float, tokens_max: int) -> None:
        self._step_s_max = step_s_max
        self._tokens_max = tokens_max
        self._base_s = 0.0
        # Decaying sums of what prompts added and of their tokens: a short one, which costs more a token, weighs little.
        self._added_s = 0.0
        self._added_tokens = 0.0
        self._step_s = 0.0

    def tokens(self, *, decoding: bool) -> int:
        """Tokens that a step may have. Where no stream is `decoding`, a step may take twice as long: it keeps none
        waiting but those that come meanwhile, and every further step reads all weights again."""
        if not self._added_tokens:
            return self._tokens_max
        step_s_max = self._step_s_max * (1 if decoding else 2)
        room_s = max(step_s_max - self._base_s, self._base_s)
        return max(_TOKENS_MIN, min(int(room_s * self._added_tokens / self._added_s), self._tokens_max))

    @property
    def step_s(self) -> float:
        """Running estimate of a step's time."""
        return self._step_s

    def observe(self, tokens: int, seconds: float) -> None:
        """A step with so many tokens of prompts took so long. One with few of them tells what any step takes, however
        many sequences decode in it; one with more, what a token adds."""
        self._step_s = _blend(self._step_s, seconds)
        if tokens < _TOKENS_MIN:
            self._base_s = _blend(self._base_s, seconds)
        else:
            added_s = max(seconds - self._base_s, seconds * _COST_MIN)
            self._added_s = _blend(self._added_s, added_s)
            self._added_tokens = _blend(self._added_tokens, tokens)


def _blend(old: float, new: float) -> float:
    return old + _WEIGHT * (new - old) if old else new
