"""The engine as a library call, for benchmarks, tests and scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from controlplane.runtime.messages.common import Sampling
from controlplane.runtime.packing import pack_u32, unpack_u32
from dataplane.engine.engine import Engine
from dataplane.frames import Finished, Logprobs, SequenceId, StepDone, Submission


@dataclass(slots=True)
class Generated:
    """One sequence's answer: what followed its delivered tokens."""

    # Index of its first token here.
    first: int = 0
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[Logprobs] = field(default_factory=list[Logprobs])
    finished: Finished | None = None


def submission(
    number: int, prompt: Sequence[int], sampling: Sampling, delivered: Sequence[int] = (), **options: object
) -> Submission:
    """A Submission with everything else left at its usual value; `options` name what is not."""
    usual = {"priority": 0, "cache_salt": "", "allow_cached": True, "solo": False, "group": 0}
    return Submission(
        sequence=SequenceId(number),
        prompt=pack_u32(prompt),
        delivered=pack_u32(delivered),
        sampling=sampling,
        **{**usual, **options},  # type: ignore[arg-type]
    )


def generate(engine: Engine, submissions: Sequence[Submission]) -> list[Generated]:
    """Run the submissions on an idle engine to their ends; answers in their order."""
    answers = {item.sequence: Generated() for item in submissions}
    engine.submit(submissions)
    while engine.has_work:
        done = engine.step()
        if done is not None:
            collect(done, answers)
    return list(answers.values())


def collect(done: StepDone, answers: dict[SequenceId, Generated]) -> None:
    """Add what a step gave to the answers; asserts that every token has the next index."""
    sequences, firsts, counts = (unpack_u32(column) for column in (done.sequences, done.first_index, done.counts))
    tokens = iter(unpack_u32(done.tokens))
    for sequence, first, count in zip(sequences, firsts, counts, strict=True):
        answer = answers[SequenceId(sequence)]
        assert not answer.tokens or first == answer.first + len(answer.tokens), "a token is lost or doubled"
        answer.first = first if not answer.tokens else answer.first
        answer.tokens += [next(tokens) for _ in range(count)]
    for item in done.logprobs:
        answers[item.sequence].logprobs.append(item)
    for item in done.finished:
        answers[item.sequence].finished = item
