"""A step being put together. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from controlplane.runtime.packing import pack_u32
from dataplane.engine.plan import NO_FEEDBACK, StepPlan
from dataplane.engine.sequence import Sequence
from dataplane.frames import SequenceId


@dataclass(slots=True, eq=False)
class Entry:
    """A run of consecutive tokens of one sequence in one step. Not frozen: hundreds are made a step."""

    sequence: Sequence
    # The sequence's life when it was planned.
    life: int
    start: int
    count: int
    logits: int
    samples: bool
    # Entry of the step before whose sampled token this one computes; NO_FEEDBACK: its tokens are known.
    feedback: int


class Draft:
    """Entries so far and what is left of the step's budgets."""

    def __init__(self, tokens_max: int, logits_max: int) -> None:
        self.entries: list[Entry] = []
        self.tokens_left = tokens_max
        self.logits_left = logits_max
        # Something lost its blocks for this step: nothing new is admitted in it.
        self.preempted = False
        self._members: set[SequenceId] = set()

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.id in self._members

    def add(self, sequence: Sequence, count: int) -> None:
        """Compute `count` more tokens of the sequence, and sample if they are its last."""
        finishes = count == sequence.missing
        samples = finishes and not sequence.is_complete
        logits = count if sequence.wants_prompt_logprobs else int(samples)
        self.entries.append(
            Entry(
                sequence,
                sequence.life,
                sequence.computed,
                count,
                logits,
                samples,
                sequence.last_entry if sequence.pending else NO_FEEDBACK,
            )
        )
        self._members.add(sequence.id)
        self.tokens_left -= count
        self.logits_left -= logits

    def build(self, number: int, block_tokens: int, scrub: Iterable[int]) -> StepPlan:
        """The plan of the drafted entries."""
        entries = self.entries
        tokens = array("I")
        tables = array("I")
        table_lengths = array("I")
        for entry in entries:
            end = entry.start + entry.count
            blocks = -(-end // block_tokens)
            table_lengths.append(blocks)
            tables.extend(entry.sequence.blocks[:blocks])
            if entry.feedback == NO_FEEDBACK:
                tokens += entry.sequence.tokens[entry.start : end]
            else:
                tokens.append(0)
        return StepPlan(
            number=number,
            sequences=pack_u32([entry.sequence.id for entry in entries]),
            starts=pack_u32([entry.start for entry in entries]),
            counts=pack_u32([entry.count for entry in entries]),
            tokens=pack_u32(tokens),
            table_lengths=pack_u32(table_lengths),
            tables=pack_u32(tables),
            logit_counts=pack_u32([entry.logits for entry in entries]),
            samples=pack_u32([entry.samples for entry in entries]),
            rope_lengths=pack_u32([entry.sequence.tokens_max for entry in entries]),
            feedback=pack_u32([entry.feedback for entry in entries]),
            scrub=pack_u32(scrub),
        )
