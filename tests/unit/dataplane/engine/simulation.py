"""A model without arithmetic: each cached position holds a digest of all tokens up to it, and the next token is a
function of the digest before it. Reading a wrong, stale or foreign position therefore shows at once."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

from controlplane.runtime.messages.common import Sampling
from controlplane.runtime.packing import unpack_u32
from dataplane.engine.book import Limits
from dataplane.engine.plan import NO_FEEDBACK, StepPlan
from dataplane.engine.scheduler import BatchScheduler, Completed
from dataplane.engine.sequence import Ended, SequenceRequest
from dataplane.frames import SequenceId

VOCABULARY = 50


def next_token(digest: bytes) -> int:
    return digest[0] % VOCABULARY


def digest(tokens: Iterable[int]) -> bytes:
    value = b""
    for token in tokens:
        value = _extend(value, token)
    return value


def continuation(request: SequenceRequest, tokens_max: int) -> list[int]:
    """What the model adds to a request's prompt, alone and undisturbed, up to `tokens_max` tokens in all."""
    value, out = digest(request.prompt), []
    stops = set(request.sampling.stop_ids)
    while len(request.prompt) + len(out) < tokens_max:
        out.append(next_token(value))
        if out[-1] in stops and len(out) > request.sampling.min_tokens:
            break
        value = _extend(value, out[-1])
    return out


def request(
    number: int,
    prompt: Iterable[int],
    sampling: Sampling | None = None,
    delivered: Iterable[int] = (),
    **options: object,
) -> SequenceRequest:
    return SequenceRequest(
        id=SequenceId(number),
        prompt=array("I", prompt),
        delivered=array("I", delivered),
        sampling=sampling or Sampling(max_tokens=8),
        **options,  # type: ignore[arg-type]
    )


def limits(**changes: object) -> Limits:
    defaults: dict[str, object] = {
        "total_blocks": 16,
        "block_tokens": 4,
        "max_sequences": 4,
        "max_batch_tokens": 16,
        "max_model_tokens": 40,
        "vocab_size": VOCABULARY,
        "max_logits": 16,
    }
    return Limits(**{**defaults, **changes})  # type: ignore[arg-type]


class Machine:
    """A scheduler and a device with up to `depth` steps under way."""

    def __init__(self, limits: Limits, depth: int = 1) -> None:
        self.limits = limits
        self.scheduler = BatchScheduler(limits)
        self.depth = depth
        self.tokens: dict[SequenceId, list[int]] = {}
        self.ends: dict[SequenceId, Ended] = {}
        self.plans: list[StepPlan] = []
        self._memory = [[b""] * limits.block_tokens for _ in range(limits.total_blocks)]
        # Steps under way, oldest first, with what they sampled.
        self._flying: list[tuple[StepPlan, list[int]]] = []

    def submit(self, *requests: SequenceRequest) -> None:
        for item in requests:
            self.tokens[item.id] = []
            self.scheduler.submit(item)

    def turn(self, tokens_max: int = 1000) -> bool:
        """Launch a step if one can be, and finish the oldest if the device is full or nothing else moves. False:
        nothing happened."""
        plan = self.scheduler.plan(tokens_max)
        self.scheduler.check()
        if plan is not None:
            self.plans.append(plan)
            self._flying.append((plan, self._run(plan)))
        if self._flying and (plan is None or len(self._flying) >= self.depth):
            self._land()
        elif plan is None:
            ended = self.scheduler.take_ended()
            self._take(Completed(emitted=(), ended=ended))
            return bool(ended)
        return True

    def drain(self, turns_max: int = 10_000) -> None:
        """Run until nothing is left."""
        for _ in range(turns_max):
            if not self.scheduler.has_work and not self._flying:
                return
            assert self.turn(), "work is left and nothing moves"
        raise AssertionError("starvation")

    def members(self, plan: StepPlan) -> list[int]:
        return list(unpack_u32(plan.sequences))

    def _land(self) -> None:
        plan, sampled = self._flying.pop(0)
        self._take(self.scheduler.complete(plan.number, sampled))
        self.scheduler.check()

    def _take(self, completed: Completed) -> None:
        for item in completed.emitted:
            sofar = self.tokens[item.sequence]
            sofar.append(item.token)
        for ended in completed.ended:
            assert ended.sequence not in self.ends, "a sequence ended twice"
            self.ends[ended.sequence] = ended

    def _run(self, plan: StepPlan) -> list[int]:
        """Compute the step's positions, each from the one before it in the cache."""
        columns = (plan.starts, plan.counts, plan.table_lengths, plan.logit_counts, plan.samples, plan.feedback)
        tokens, tables = unpack_u32(plan.tokens), unpack_u32(plan.tables)
        assert len(tokens) <= max(self.limits.max_batch_tokens, 1), "over the token budget"
        assert sum(unpack_u32(plan.logit_counts)) <= self.limits.max_logits, "over the budget of logits"
        sampled: list[int] = []
        at = table_at = 0
        for start, count, blocks, logits, samples, feedback in zip(*map(unpack_u32, columns), strict=True):
            table = tables[table_at : table_at + blocks]
            table_at += blocks
            run = list(tokens[at : at + count])
            at += count
            if feedback != NO_FEEDBACK:
                run = [self._flying[-1][1][feedback]]
            value = self._at(table, start - 1) if start else b""
            for position, token in enumerate(run, start):
                value = _extend(value, token)
                self._store(table, position, value)
            assert logits >= samples
            sampled.append(next_token(value) if samples else VOCABULARY)
        return sampled

    def _at(self, table: array[int], position: int) -> bytes:
        block, offset = divmod(position, self.limits.block_tokens)
        value = self._memory[table[block]][offset]
        assert value, "a position is read before it was computed"
        return value

    def _store(self, table: array[int], position: int, value: bytes) -> None:
        block, offset = divmod(position, self.limits.block_tokens)
        self._memory[table[block]][offset] = value


def _extend(value: bytes, token: int) -> bytes:
    return hashlib.blake2b(value + token.to_bytes(4, "little"), digest_size=8).digest()
