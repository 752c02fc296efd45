"""What a step gave, as frames for the daemon."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.runtime.ids import Epoch
from controlplane.runtime.packing import pack_u32
from dataplane.engine.sequence import Emitted, Ended
from dataplane.frames import Finished, Logprobs, SequenceId, StepDone


def step_done(
    epoch: Epoch, step: int, emitted: Iterable[Emitted], ended: Iterable[Ended], logprobs: Iterable[Logprobs]
) -> StepDone:
    """The frame for one step; each emitted token is the only one of its sequence."""
    emitted = tuple(emitted)
    return StepDone(
        epoch=epoch,
        step=step,
        sequences=pack_u32([item.sequence for item in emitted]),
        first_index=pack_u32([item.index for item in emitted]),
        counts=pack_u32([1] * len(emitted)),
        tokens=pack_u32([item.token for item in emitted]),
        logprobs=tuple(logprobs),
        finished=tuple(Finished(item.sequence, item.reason, item.stop_id, item.error) for item in ended),
    )


class PromptLogprobs:
    """Log probabilities of prompts under way: they leave together with their sequence's first token."""

    def __init__(self) -> None:
        self._by_sequence: dict[SequenceId, dict[int, Logprobs]] = {}

    def add(self, logprobs: Logprobs) -> None:
        """Keep one; a prompt computed again after a preemption replaces it by the same."""
        self._by_sequence.setdefault(logprobs.sequence, {})[logprobs.index] = logprobs

    def take(self, sequence: SequenceId) -> list[Logprobs]:
        """All of a sequence's, by position."""
        kept = self._by_sequence.pop(sequence, {})
        return [kept[index] for index in sorted(kept)]
