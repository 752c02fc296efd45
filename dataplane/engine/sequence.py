"""One sequence as the batch scheduler sees it. Pure; owned by the scheduler alone."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from controlplane.runtime.messages.common import SOLO_TOKENS, Reason, Sampling
from controlplane.runtime.messages.serve import FinishReason
from dataplane.frames import SequenceId


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """What is to run: `prompt` then `delivered` are its tokens so far; generation goes on at index len(delivered)."""

    id: SequenceId
    prompt: array[int]
    delivered: array[int]
    sampling: Sampling
    priority: int = 0
    cache_salt: str = ""
    allow_cached: bool = True
    solo: bool = False
    group: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Why a sequence is over."""

    sequence: SequenceId
    reason: FinishReason
    stop_id: int | None = None
    error: Reason | None = None


@dataclass(slots=True, kw_only=True)
class Emitted:
    """A token that a step gave, at `index` of the sequence's generated tokens. Not frozen: hundreds are made a step."""

    sequence: SequenceId
    entry: int
    index: int
    token: int


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Mutable state of a sequence. Positions count from 0 over prompt, delivered and generated tokens."""

    request: SequenceRequest
    # Known tokens; those sampled by a step under way are counted in `pending`.
    tokens: array[int]
    # Generation ends when this many tokens exist.
    tokens_max: int
    stop_ids: frozenset[int]
    # Place in the one order of all sequences; unique, lowest first (scheduler.py).
    rank: tuple[int, int]
    # Start of its hash chain, and whether its blocks may be found by others.
    seed: bytes
    shares: bool
    pending: int = 0
    # Positions whose KV is computed or being computed, and those whose step is done.
    computed: int = 0
    settled: int = 0
    blocks: list[int] = field(default_factory=list[int])
    chain: list[bytes] = field(default_factory=list[bytes])
    published: int = 0
    # Counts preemptions: a step of an earlier life must not settle positions of this one.
    life: int = 0
    # The last step that it is part of, and its entry there.
    last_step: int = 0
    last_entry: int = 0
    admitted: bool = False
    # What never changes, computed once: the scheduler asks at every step.
    id: SequenceId = field(init=False)
    prompt_length: int = field(init=False)
    # Its next draw depends on the tokens before it beyond the logits.
    needs_history: bool = field(init=False)
    # Its next token is the arg-max of the raw logits, wherever it stands.
    takes_best: bool = field(init=False)

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.id = self.request.id
        self.prompt_length = len(self.request.prompt)
        self.needs_history = bool(
            sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
        )
        plain = sampling.temperature == 0 and not sampling.logit_bias and not sampling.min_tokens
        self.takes_best = plain and not self.needs_history

    @property
    def is_solo(self) -> bool:
        """It must run alone. Over after SOLO_TOKENS tokens: else every stream that a killed engine held would go on one
        by one."""
        if not self.request.solo:
            return False
        given = len(self.tokens) - self.prompt_length - len(self.request.delivered)
        return given < SOLO_TOKENS

    @property
    def length(self) -> int:
        """Tokens that exist or will when the steps under way are done."""
        return len(self.tokens) + self.pending

    @property
    def missing(self) -> int:
        """Tokens whose KV is to be computed before the next one can be sampled."""
        return len(self.tokens) + self.pending - self.computed

    @property
    def is_decoding(self) -> bool:
        return self.computed >= self.prompt_length and len(self.tokens) + self.pending - self.computed == 1

    @property
    def is_complete(self) -> bool:
        """Nothing is left to sample."""
        return len(self.tokens) + self.pending >= self.tokens_max

    @property
    def wants_prompt_logprobs(self) -> bool:
        """They travel with the first token: a replay that has one delivered them already."""
        return self.request.sampling.prompt_logprobs is not None and self.length == self.prompt_length

    def verdict(self, token: int) -> Ended | None:
        """The end that `token`, its last one, brings, if any."""
        generated = len(self.tokens) - self.prompt_length
        if token in self.stop_ids and generated > self.request.sampling.min_tokens:
            return Ended(sequence=self.id, reason=FinishReason.STOP, stop_id=token)
        if len(self.tokens) >= self.tokens_max:
            return Ended(sequence=self.id, reason=FinishReason.LENGTH)
        return None

    def append(self, token: int) -> int:
        """Add a token that was pending; returns its index among the generated ones."""
        assert self.pending > 0, "a token that no step sampled"
        self.pending -= 1
        self.tokens.append(token)
        return len(self.tokens) - self.prompt_length - 1
