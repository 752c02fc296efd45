"""All sequences of one engine and the blocks they hold: who waits, who runs, who ended. Pure.

The scheduler decides (scheduler.py); the book carries it out and keeps its invariants.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import FinishReason
from dataplane.engine.blocks import BlockPool, extend_chain, seed_hash
from dataplane.engine.sequence import Ended, Sequence, SequenceRequest
from dataplane.frames import SequenceId

by_rank = attrgetter("rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the cache and a step can hold."""

    total_blocks: int
    block_tokens: int
    max_sequences: int
    max_batch_tokens: int
    max_model_tokens: int
    vocab_size: int
    # Rows of logits that a step may ask for.
    max_logits: int
    eos_ids: frozenset[int] = frozenset()
    # What the weights are: prefixes are shared only under the same.
    fingerprint: str = ""
    enable_prefix_cache: bool = True
    # A sequence may go on in the step after the one that still samples its token.
    lookahead: bool = False

    def __post_init__(self) -> None:
        assert self.max_model_tokens <= self.total_blocks * self.block_tokens, "one sequence must fit in the cache"
        assert self.max_logits >= self.max_sequences, "each sequence of a step may ask for logits"
        assert self.max_batch_tokens >= self.max_sequences, "each running sequence may decode in every step"

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


class SequenceBook:
    """Owns every sequence and block."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.total_blocks)
        self.sequences: dict[SequenceId, Sequence] = {}
        self.running: dict[SequenceId, Sequence] = {}
        # Sorted by rank.
        self.waiting: list[Sequence] = []
        self._ended: list[Ended] = []
        self._admitted: list[tuple[SequenceId, int]] = []
        self._arrivals = 0

    @property
    def has_ended(self) -> bool:
        return bool(self._ended)

    def take_ended(self) -> tuple[Ended, ...]:
        ended, self._ended = tuple(self._ended), []
        return ended

    def take_admitted(self) -> tuple[tuple[SequenceId, int], ...]:
        admitted, self._admitted = tuple(self._admitted), []
        return admitted

    def open(self, request: SequenceRequest, place: int) -> None:
        """Queue a sequence at `place` of the order; one that cannot run, or has nothing left to do, ends at once."""
        assert request.id not in self.sequences, "a sequence id is used once"
        error = self._refusal(request)
        if error is not None:
            self._ended.append(Ended(sequence=request.id, reason=FinishReason.ERROR, error=error))
            return
        sequence = self._sequence(request, place)
        over = _over_already(sequence)
        if over is not None:
            self._ended.append(over)
            return
        self.sequences[sequence.id] = sequence
        insort(self.waiting, sequence, key=by_rank)

    def extend_chain(self, sequence: Sequence) -> None:
        """Bring the hashes of a sequence's full blocks up to its known tokens."""
        extend_chain(sequence.chain, sequence.seed, sequence.tokens, self.limits.block_tokens)

    def admit(self, sequence: Sequence, hits: list[int]) -> None:
        """Let a waiting sequence run, its prefix taken from these published blocks."""
        self._leave_queue(sequence)
        self.running[sequence.id] = sequence
        self.pool.acquire(hits)
        sequence.blocks = list(hits)
        sequence.published = len(hits)
        sequence.computed = sequence.settled = len(hits) * self.limits.block_tokens
        if not sequence.admitted:
            sequence.admitted = True
            self._admitted.append((sequence.id, sequence.computed))

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence; it waits at its old place and is computed again."""
        del self.running[sequence.id]
        self._drop_blocks(sequence)
        sequence.computed = sequence.settled = sequence.published = 0
        sequence.life += 1
        insort(self.waiting, sequence, key=by_rank)

    def settle(self, sequence: Sequence, position: int) -> None:
        """Everything before `position` is computed: publish the blocks that became full."""
        sequence.settled = position
        full = position // self.limits.block_tokens
        if not sequence.shares or full <= sequence.published:
            return
        self.extend_chain(sequence)
        for index in range(sequence.published, full):
            self.pool.publish(sequence.blocks[index], sequence.chain[index])
        sequence.published = full

    def end(self, sequence: Sequence, ended: Ended) -> None:
        """Forget a sequence and free its blocks."""
        del self.sequences[sequence.id]
        if self.running.pop(sequence.id, None) is None:
            self._leave_queue(sequence)
        self._drop_blocks(sequence)
        self._ended.append(ended)

    def expel(self, sequence: Sequence) -> list[int]:
        """End a sequence whose logits are no numbers; returns the blocks that hold what made them."""
        held = list(sequence.blocks)
        for block in held:
            self.pool.forget(block)
        error = Reason(kind=ReasonKind.POISON, text="the model's logits are not numbers")
        self.end(sequence, Ended(sequence=sequence.id, reason=FinishReason.ERROR, error=error))
        return held

    def cancel(self, ids: Iterable[SequenceId]) -> None:
        """End these sequences; unknown ids are finished ones."""
        for sequence_id in ids:
            sequence = self.sequences.get(sequence_id)
            if sequence is not None:
                self.end(sequence, Ended(sequence=sequence_id, reason=FinishReason.CANCELLED))

    def check(self) -> None:
        """Assert the invariants between sequences, queues and blocks."""
        self.pool.check(block for sequence in self.sequences.values() for block in sequence.blocks)
        waiting = {sequence.id for sequence in self.waiting}
        assert waiting.isdisjoint(self.running), "a sequence both waits and runs"
        assert waiting | self.running.keys() == self.sequences.keys(), "a sequence neither waits nor runs"
        assert self.waiting == sorted(self.waiting, key=by_rank), "the queue is out of order"
        assert len(self.running) <= self.limits.max_sequences, "too many sequences run"
        for sequence in self.waiting:
            assert not sequence.blocks, "a waiting sequence holds blocks"
            assert sequence.computed == 0, "a waiting sequence has computed tokens"
        for sequence in self.running.values():
            assert sequence.settled <= sequence.computed <= sequence.length, "progress out of order"
            assert len(sequence.blocks) >= self.limits.blocks_for(sequence.computed), "a position has no block"

    def _refusal(self, request: SequenceRequest) -> Reason | None:
        limits = self.limits
        total = len(request.prompt) + len(request.delivered)
        text = ""
        if not request.prompt:
            text = "the prompt is empty"
        elif total > limits.max_model_tokens or (total == limits.max_model_tokens and request.sampling.max_tokens):
            text = f"{total} tokens leave no room for another within the limit of {limits.max_model_tokens}"
        elif max(max(request.prompt), max(request.delivered, default=0)) >= limits.vocab_size:
            text = f"a token id is outside the vocabulary of {limits.vocab_size}"
        return Reason(kind=ReasonKind.INVALID, text=text) if text else None

    def _sequence(self, request: SequenceRequest, place: int) -> Sequence:
        limits = self.limits
        stops = frozenset(request.sampling.stop_ids)
        public = limits.enable_prefix_cache and request.allow_cached
        circle = "" if public else f"group {request.group}"
        self._arrivals += 1
        return Sequence(
            request=request,
            tokens=request.prompt + request.delivered,
            tokens_max=min(len(request.prompt) + request.sampling.max_tokens, limits.max_model_tokens),
            stop_ids=stops if request.sampling.ignore_eos else stops | limits.eos_ids,
            rank=(place, self._arrivals),
            seed=seed_hash(request.cache_salt, limits.fingerprint, circle),
            shares=public or request.group != 0,
        )

    def _drop_blocks(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _leave_queue(self, sequence: Sequence) -> None:
        del self.waiting[bisect_left(self.waiting, sequence.rank, key=by_rank)]


def _over_already(sequence: Sequence) -> Ended | None:
    """A replay of a sequence whose end was not delivered, or a request for nothing."""
    if sequence.request.delivered:
        return sequence.verdict(sequence.tokens[-1])
    if sequence.is_complete and not sequence.wants_prompt_logprobs:
        return Ended(sequence=sequence.id, reason=FinishReason.LENGTH)
    return None
