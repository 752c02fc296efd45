"""The batch scheduler: which tokens of which sequences the next step computes. Pure.

Continuous batching (Orca, OSDI 2022) over paged blocks (vLLM, SOSP 2023) with chunked prefill (Sarathi-Serve, OSDI
2024): every running sequence decodes one token a step, what is left of the token budget goes to prompts. All
sequences stand in one order, their *rank*: the clock (tokens scheduled so far) at which a fair server would have
computed the prompt, less a credit by priority. A short prompt overtakes a long one only as far as it came early
enough, a higher priority goes first, and nobody starves, since the clock runs on. When blocks run out, the lowest
rank is preempted and computed again later; published blocks make that cheap.

Several steps may be in flight, in order. With `lookahead`, a sequence whose token is still being sampled goes on in
the next step, which takes the token from the device (`StepPlan.feedback`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Column
from dataclasses import dataclass

from controlplane.runtime.messages.serve import FinishReason
from dataplane.engine.book import Limits, SequenceBook, by_rank
from dataplane.engine.draft import Draft, Entry
from dataplane.engine.plan import StepPlan
from dataplane.engine.sequence import Emitted, Ended, Sequence, SequenceRequest
from dataplane.frames import SequenceId

PRIORITY_TOKENS = 1 << 20
"""Worth of one priority level, in tokens of the clock: who waited so long passes one level up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """What a finished step brought."""

    emitted: tuple[Emitted, ...]
    ended: tuple[Ended, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Load of the engine, for the coordinator."""

    free_blocks: int
    running: int
    waiting: int
    waiting_tokens: int
    # (priority, count, tokens) of the waiting sequences.
    queue: tuple[tuple[int, int, int], ...]


class BatchScheduler:
    """Plans steps over the sequences of its book."""

    def __init__(self, limits: Limits, scrub: Iterable[int] = ()) -> None:
        """`scrub`: blocks that its first step is to zero."""
        self._limits = limits
        self._book = SequenceBook(limits)
        self._pool = self._book.pool
        self._flights: dict[int, list[Entry]] = {}
        self._clock = 0
        self._steps = 0
        self._solo_next = True
        self._scrub = list(scrub)

    # ------------------------------------------------------------ input and state

    def submit(self, request: SequenceRequest) -> None:
        """Queue a sequence. One that cannot run, or has nothing left to do, ends at once (`take_ended`)."""
        tokens = len(request.prompt) + len(request.delivered)
        self._book.open(request, self._clock + tokens - request.priority * PRIORITY_TOKENS)

    def cancel(self, ids: Iterable[SequenceId]) -> None:
        """End these sequences and free their blocks; unknown ids are finished ones."""
        self._book.cancel(ids)

    def take_ended(self) -> tuple[Ended, ...]:
        """Ends that no step brought: refusals, cancellations, replays with nothing left to do."""
        return self._book.take_ended()

    def take_admitted(self) -> tuple[tuple[SequenceId, int], ...]:
        """Sequences first scheduled since the last call, each with the number of its tokens found cached."""
        return self._book.take_admitted()

    @property
    def has_work(self) -> bool:
        """There are sequences to run or ends to take."""
        return bool(self._book.sequences) or self._book.has_ended

    @property
    def decodes(self) -> bool:
        """Some running sequence's prompt is done."""
        return any(sequence.is_decoding for sequence in self._book.running.values())

    def find(self, sequence_id: SequenceId) -> Sequence | None:
        """The sequence, while it lives: its parameters and tokens, for the sampler."""
        return self._book.sequences.get(sequence_id)

    def load(self) -> Load:
        levels: dict[int, tuple[int, int]] = {}
        for sequence in self._book.waiting:
            count, tokens = levels.get(sequence.request.priority, (0, 0))
            levels[sequence.request.priority] = (count + 1, tokens + sequence.missing)
        return Load(
            free_blocks=self._pool.available,
            running=len(self._book.running),
            waiting=len(self._book.waiting),
            waiting_tokens=sum(tokens for _, tokens in levels.values()),
            queue=tuple((priority, *levels[priority]) for priority in sorted(levels, reverse=True)),
        )

    def newest_prefixes(self, count: int) -> list[bytes]:
        """Hashes of the blocks published or used last, newest first."""
        return self._pool.newest(count)

    @property
    def unscrubbed(self) -> Column[int]:
        """Blocks that the next step is to zero: a sequence left values in them that are no numbers."""
        return self._scrub

    def check(self) -> None:
        """Assert the invariants between sequences, queues and blocks."""
        self._book.check()

    # ------------------------------------------------------------ steps

    def plan(self, tokens_max: int) -> StepPlan | None:
        """The next step, of at most about `tokens_max` tokens: running sequences always decode, and some prompt goes
        on. None: nothing can run before a step in flight is done."""
        if any(entry.sequence.is_solo for flight in self._flights.values() for entry in flight):
            return None
        floor = len(self._book.running) + self._limits.block_tokens
        draft = Draft(min(max(tokens_max, floor), self._limits.max_batch_tokens), self._limits.max_logits)
        if not (self._solo_next and self._plan_solo(draft)):
            self._plan_shared(draft)
            if not draft.entries:
                self._plan_solo(draft)
        if not draft.entries:
            return None
        # Turn by turn. A solo sequence whose turn it is keeps it while steps in flight hold it up.
        self._solo_next = not draft.entries[0].sequence.is_solo
        return self._launch(draft)

    def complete(self, number: int, tokens: Column[int], poisoned: Collection[int] = ()) -> Completed:
        """Step `number`, the oldest in flight, is done. Entry i sampled tokens[i] (ignored if it samples none);
        `poisoned` are entries whose logits were no numbers."""
        assert next(iter(self._flights)) == number, "steps complete in order"
        emitted: list[Emitted] = []
        for index, entry in enumerate(self._flights.pop(number)):
            sequence = entry.sequence
            if sequence.id not in self._book.sequences:
                continue
            if index in poisoned:
                self._scrub += self._book.expel(sequence)
                continue
            emission = self._finish_entry(entry, index, tokens)
            if emission is not None:
                emitted.append(emission)
        return Completed(emitted=tuple(emitted), ended=self._book.take_ended())

    def entries(self, number: int) -> Column[Entry]:
        """What step `number`, in flight, computes."""
        return self._flights[number]

    def _launch(self, draft: Draft) -> StepPlan:
        self._steps += 1
        plan = draft.build(self._steps, self._limits.block_tokens, self._scrub)
        self._scrub = []
        for index, entry in enumerate(draft.entries):
            sequence = entry.sequence
            sequence.computed += entry.count
            sequence.pending += entry.samples
            sequence.last_step, sequence.last_entry = self._steps, index
            self._clock += entry.count
        self._flights[self._steps] = draft.entries
        return plan

    def _finish_entry(self, entry: Entry, index: int, tokens: Column[int]) -> Emitted | None:
        sequence = entry.sequence
        if entry.life == sequence.life:
            self._book.settle(sequence, entry.start + entry.count)
        if not entry.samples:
            if sequence.is_complete and sequence.settled == sequence.length:
                self._book.end(sequence, Ended(sequence=sequence.id, reason=FinishReason.LENGTH))
            return None
        token = tokens[index]
        emission = Emitted(sequence=sequence.id, entry=index, index=sequence.append(token), token=token)
        over = sequence.verdict(token)
        if over is not None:
            self._book.end(sequence, over)
        return emission

    # ------------------------------------------------------------ who goes on

    def _plan_solo(self, draft: Draft) -> bool:
        """Give the whole step to the first sequence that must run alone; steps in flight must end before. False: there
        is none, or it cannot run yet. One that waits is let in only before all others that wait: these would never get
        its place or its blocks if such ones kept coming."""
        book = self._book
        solos = sorted((s for s in (*book.running.values(), *book.waiting[:1]) if s.is_solo), key=by_rank)
        solo = next((s for s in solos if s.id in book.running or self._admit(s)), None)
        if solo is None:
            return False
        if self._flights:
            return True
        self._advance(solo, draft)
        return bool(draft.entries)

    def _plan_shared(self, draft: Draft) -> None:
        """Decodes of all running sequences, then prompts by rank."""
        self._yield_to_priority()
        prompts: list[Sequence] = []
        for sequence in sorted(self._book.running.values(), key=by_rank):
            if sequence.is_solo:
                continue
            if sequence.is_decoding:
                self._advance(sequence, draft)
            else:
                prompts.append(sequence)
        self._plan_prompts(draft, prompts)

    def _plan_prompts(self, draft: Draft, running: list[Sequence]) -> None:
        waiting = self._book.waiting
        coming = _coming(running) if waiting else set[bytes]()
        admits = not draft.preempted
        for sequence in sorted([*running, *waiting], key=by_rank) if waiting else running:
            if draft.tokens_left <= 0:
                return
            if sequence.id not in self._book.running:
                if not admits or self._shares_soon(sequence, coming):
                    continue
                # Until it fits, nobody behind it takes the blocks it waits for.
                admits = self._admit(sequence)
                if not admits or sequence.is_solo:
                    continue
                coming.update(sequence.chain[sequence.published :])
            self._advance(sequence, draft)
            admits = admits and not draft.preempted

    def _advance(self, sequence: Sequence, draft: Draft) -> None:
        """Compute more of a running sequence in this step, as far as budgets and blocks go."""
        missing = sequence.missing
        if sequence.id not in self._book.running or not self._may_continue(sequence, missing):
            return
        count = min(missing, draft.tokens_left)
        count = min(count, draft.logits_left) if sequence.wants_prompt_logprobs else count
        if count <= 0 or draft.logits_left <= 0:
            return
        count = self._grow(sequence, count, draft)
        if count:
            draft.add(sequence, count)

    def _may_continue(self, sequence: Sequence, missing: int) -> bool:
        if not sequence.pending:
            return missing > 0
        return (
            self._limits.lookahead
            and missing == 1
            and sequence.last_step == self._steps
            and not sequence.is_complete
            and not sequence.needs_history
        )

    # ------------------------------------------------------------ blocks

    def _grow(self, sequence: Sequence, count: int, draft: Draft) -> int:
        """Give it blocks for up to `count` more tokens, taking them from lower ranks if it has none at all. Returns
        for how many tokens there is room."""
        limits = self._limits
        if sequence.computed + count <= len(sequence.blocks) * limits.block_tokens:
            return count
        while True:
            room = (len(sequence.blocks) + self._pool.available) * limits.block_tokens - sequence.computed
            if room > 0:
                break
            victim = self._lowest(sequence, draft)
            if victim is None:
                return 0
            self._book.preempt(victim)
            draft.preempted = True
        count = min(count, room)
        lacking = limits.blocks_for(sequence.computed + count) - len(sequence.blocks)
        if lacking > 0:
            sequence.blocks += self._pool.allocate(lacking)
        return count

    def _lowest(self, sequence: Sequence, draft: Draft) -> Sequence | None:
        """The running sequence of the lowest rank below this one's that is not part of the step."""
        below = (s for s in self._book.running.values() if s.rank > sequence.rank and s not in draft)
        return max(below, key=by_rank, default=None)

    def _hits(self, sequence: Sequence) -> list[int]:
        """Published blocks it can begin with. At least its last token is computed, for its logits."""
        # Only now: a long queue of prompts would hold the first of them up.
        self._book.extend_chain(sequence)
        return self._pool.match(sequence.chain, self._shareable(sequence))

    def _shareable(self, sequence: Sequence) -> int:
        if not sequence.shares or sequence.wants_prompt_logprobs:
            return 0
        # Its chain knows nothing of tokens that are still being sampled.
        return min((sequence.length - 1) // self._limits.block_tokens, len(sequence.chain))

    def _fits(self, sequence: Sequence, hits: list[int]) -> bool:
        """There is a place and blocks for all its tokens, beside what prompts under way still need and a block for
        each running sequence."""
        running = self._book.running.values()
        if len(running) >= self._limits.max_sequences or sequence.pending:
            return False
        promised = sum(self._limits.blocks_for(s.length) - len(s.blocks) if not s.is_decoding else 0 for s in running)
        free = self._pool.available - self._pool.idle_among(hits) - promised - len(running)
        return self._limits.blocks_for(sequence.length) - len(hits) <= free

    def _admit(self, sequence: Sequence) -> bool:
        hits = self._hits(sequence)
        fits = self._fits(sequence, hits)
        if fits:
            self._book.admit(sequence, hits)
        return fits

    def _shares_soon(self, sequence: Sequence, coming: set[bytes]) -> bool:
        """The next block it needs is just being computed for another sequence: wait for it."""
        hits = len(self._hits(sequence))
        return hits < self._shareable(sequence) and sequence.chain[hits] in coming

    def _yield_to_priority(self) -> None:
        """Preempt running sequences of a lower priority until the first waiting one fits."""
        if not self._book.waiting:
            return
        first = self._book.waiting[0]
        if self._shares_soon(first, _coming(s for s in self._book.running.values() if not s.is_decoding)):
            return
        while not self._fits(first, self._hits(first)):
            below = (
                s
                for s in self._book.running.values()
                if s.request.priority < first.request.priority and s.rank > first.rank
            )
            victim = max(below, key=by_rank, default=None)
            if victim is None:
                return
            self._book.preempt(victim)


def _coming(prompts: Iterable[Sequence]) -> set[bytes]:
    """Blocks that will be published when these prompts are computed."""
    return {link for sequence in prompts if sequence.shares for link in sequence.chain[sequence.published :]}
