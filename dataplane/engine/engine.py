"""The engine of one replica, at its driver: submissions in, one step at a time, tokens out.

A step: the scheduler plans it, every rank runs its part of the model, the sampler draws, the scheduler takes the
tokens. The host waits for the device once a step, for its tokens; log probabilities, where a request asks for them,
wait again. With pipeline stages as many steps are in flight as there are stages, each of other sequences. Of a single
stage the next step may be launched before the last one is read (`ReplicaSpec.overlap`): it takes the sampled tokens
from the device.

Shape letters: N rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import Capacity, Reason, ReasonKind, ReplicaSpec
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.packing import unpack_u32
from dataplane.engine.draft import Entry
from dataplane.engine.logprobs import describe
from dataplane.engine.numerics import is_exact
from dataplane.engine.pacing import Pacer
from dataplane.engine.plan import StepPlan
from dataplane.engine.readback import Readback
from dataplane.engine.results import PromptLogprobs, step_done
from dataplane.engine.sampler import Sampler, SampleRow
from dataplane.engine.scheduler import BatchScheduler
from dataplane.engine.sequence import Emitted, Ended, SequenceRequest
from dataplane.engine.setup import Report, capacity, set_up
from dataplane.engine.validation import refusal
from dataplane.frames import AdmittedSequence, LoadReport, SequenceId, StepBegun, StepDone, Submission
from dataplane.models.fit import FittedModel
from dataplane.parallel.collectives import broadcast_data
from dataplane.progress import ProgressPage

STEP_S_MAX = 0.25
"""Longest step wanted where nobody says otherwise, in seconds."""

DIGEST_HASHES = 512
"""Prefix hashes in a load report: 4 KiB of 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step gave, on the device."""

    logits_NV: Tensor
    # By row of logits; of no meaning for one that nothing is sampled from.
    tokens: Readback


@dataclass(slots=True)
class Flight:
    """A step under way."""

    plan: StepPlan
    # time.perf_counter at its launch.
    launched: float
    # Last row of logits of each entry; of no meaning for one without.
    ends: list[int]
    # Set once its tokens are drawn.
    drawn: Drawn | None = None

    @property
    def rows(self) -> int:
        return sum(unpack_u32(self.plan.logit_counts))


class Engine:
    """Schedules, runs and samples. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        model: FittedModel,
        spec: ReplicaSpec,
        device: torch.device,
        page: ProgressPage | None = None,
        step_s_max: float = STEP_S_MAX,
        report: Report = lambda *_: None,
    ) -> None:
        """All ranks of the model's mesh together: measure a step, size the cache, allocate it.

        Raises Rejected if a rank's memory does not hold a block, PeerLost if a peer is.
        """
        ready = set_up(model, spec, device, page, report)
        self._model = model
        self._page = page
        self._runner = ready.runner
        self._limits = ready.limits
        self._facts = ready.facts
        self._device = device
        alone = device.type == "cuda" and is_exact(spec.numerics, device)
        self._sampler = Sampler(model.vocab_size, device, alone=alone)
        self._pacer = Pacer(step_s_max, spec.max_batch_tokens)
        # First what any step takes: it is no part of what a prompt's tokens cost.
        self._pacer.observe(1, ready.token_s)
        self._pacer.observe(ready.probe_tokens, ready.probe_s)
        # Seconds that the host has waited for the device, in all.
        self.waited_s = 0.0
        self._scheduler = BatchScheduler(self._limits)
        self.reset(Epoch(0))

    # ------------------------------------------------------------ life

    def reset(self, epoch: Epoch) -> None:
        """Drop all sequences and everything cached; frames carry `epoch` from now on."""
        self._epoch = epoch
        self._scheduler = BatchScheduler(self._limits, self._scheduler.unscrubbed)
        self._prompt_logprobs = PromptLogprobs()
        self._refused: list[Ended] = []
        self._flights: deque[Flight] = deque()
        self._landed = 0.0
        if self._page is not None:
            self._page.set_step(0)

    def leave(self) -> None:
        """The mesh is over: drop all sequences, and what holds on to its groups. An `attach` may follow."""
        self.reset(Epoch(0))
        self._runner.leave()

    def attach(self, model: FittedModel, report: Report) -> None:
        """Go on with the same weights and cache on another epoch's mesh, all its ranks together. A `reset` follows."""
        self._model = model
        self._runner.attach(model, lambda share: report("capture", share))

    def close(self) -> None:
        """Let the followers go, until they `run` again. For an engine without a daemon, which would end them."""
        broadcast_data(self._model.mesh.control, None, 0)

    @property
    def _depth(self) -> int:
        """Steps under way before the oldest one is finished."""
        return self._model.mesh.pipeline.size + self._limits.lookahead

    @property
    def settled(self) -> list[int]:
        """See ModelRunner."""
        return self._runner.settled

    @property
    def capacity(self) -> Capacity:
        """What this engine holds, as its replica reports it."""
        return capacity(self._limits, self._facts)

    # ------------------------------------------------------------ work

    def submit(self, submissions: Iterable[Submission]) -> None:
        """Queue sequences. One that cannot run is reported as finished by the next step."""
        for submission in submissions:
            text = refusal(submission.sampling, self._limits.vocab_size)
            if text is None:
                self._scheduler.submit(_request(submission))
            else:
                error = Reason(kind=ReasonKind.INVALID, text=text)
                self._refused.append(Ended(sequence=submission.sequence, reason=FinishReason.ERROR, error=error))

    def cancel(self, sequences: Iterable[SequenceId]) -> None:
        """End sequences; each is reported as finished. Unknown ids are finished ones."""
        self._scheduler.cancel(sequences)

    @property
    def has_work(self) -> bool:
        """A call of `step` would do something."""
        return self._scheduler.has_work or bool(self._refused) or bool(self._flights)

    def step(self, begun: Callable[[StepBegun], None] | None = None) -> StepDone | None:
        """Launch a step if one can be, then finish the oldest one under way unless another may be launched first.

        `begun` is told before the device is touched. None: nothing is finished yet. After an exception the engine must
        be `reset`.
        """
        plan = self._scheduler.plan(self._pacer.tokens(decoding=self._scheduler.decodes))
        if plan is not None:
            if begun is not None:
                begun(StepBegun(self._epoch, plan.number, plan.sequences))
            self._launch(plan)
            if len(self._flights) < self._depth:
                return None
        if self._flights:
            return self._land()
        ended = self._take_ended()
        return self._done(0, (), ended, logits_NV=None) if ended else None

    def load_report(self) -> LoadReport:
        """The state of the queue now."""
        load = self._scheduler.load()
        hashes = self._scheduler.newest_prefixes(DIGEST_HASHES)
        return LoadReport(
            epoch=self._epoch,
            free_blocks=load.free_blocks,
            running=load.running,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            step_ms=self._pacer.step_s * 1000,
            queue=load.queue,
            prefix_digest=b"".join(link[:8] for link in hashes),
            admitted=tuple(AdmittedSequence(*pair) for pair in self._scheduler.take_admitted()),
        )

    # ------------------------------------------------------------ one step

    def _launch(self, plan: StepPlan) -> None:
        flight = Flight(plan, time.perf_counter(), _last_rows(self._scheduler.entries(plan.number)))
        self._flights.append(flight)
        self._mark(plan.number)
        broadcast_data(self._model.mesh.control, plan, 0)
        self._runner.launch(plan)
        if self._limits.lookahead:
            flight.drawn = self._draw(flight)

    def _draw(self, flight: Flight) -> Drawn:
        """Sample a launched step's tokens, on the device."""
        entries = self._scheduler.entries(flight.plan.number)
        output = self._runner.finish(flight.rows)
        logits_NV, best_N = output.logits_NV[: flight.rows], output.best_N
        rows: list[SampleRow | None] = [None] * flight.rows
        for entry, end in zip(entries, flight.ends, strict=True):
            if entry.samples and not entry.sequence.takes_best:
                rows[end] = _sample_row(entry)
        tokens_N = self._sampler.sample(logits_NV, rows, None if best_N is None else best_N[: flight.rows])
        if self._limits.lookahead:
            self._runner.feed(tokens_N)
        if output.passing and any(entry.sequence.request.sampling.logprobs is not None for entry in entries):
            logits_NV = logits_NV.clone()
        return Drawn(logits_NV, Readback(tokens_N))

    def _land(self) -> StepDone:
        """Finish the oldest step."""
        flight = self._flights.popleft()
        entries = self._scheduler.entries(flight.plan.number)
        given = flight.drawn or self._draw(flight)
        logits_NV = given.logits_NV
        # The step's one wait for the device.
        waiting = time.perf_counter()
        drawn = given.tokens.wait()
        self._model.mesh.check()
        now = time.perf_counter()
        self.waited_s += now - waiting
        prompts = sum(entry.count for entry in entries if entry.count > 1)
        self._pacer.observe(prompts, now - max(flight.launched, self._landed))
        self._landed = now
        self._describe_prompts(entries, flight.ends, logits_NV)
        tokens = [drawn[end] if entry.samples else 0 for entry, end in zip(entries, flight.ends, strict=True)]
        poisoned = {index for index, token in enumerate(tokens) if token < 0}
        completed = self._scheduler.complete(flight.plan.number, tokens, poisoned)
        self._mark(self._flights[0].plan.number if self._flights else 0)
        ended = [*completed.ended, *self._take_ended()]
        return self._done(flight.plan.number, completed.emitted, ended, logits_NV, entries, flight.ends)

    def _describe_prompts(self, entries: Sequence[Entry], ends: list[int], logits_NV: Tensor) -> None:
        """Keep the log probabilities of prompt tokens that this step's logits foretell."""
        for entry, end in zip(entries, ends, strict=True):
            sequence = entry.sequence
            best = sequence.request.sampling.prompt_logprobs
            if best is None or not entry.logits or entry.start >= sequence.prompt_length:
                continue
            stop = entry.start + entry.count
            for index in range(stop - entry.logits + 1, min(stop + 1, sequence.prompt_length)):
                row_V = logits_NV[end - (stop - index)]
                self._prompt_logprobs.add(
                    describe(row_V, sequence.tokens[index], best, sequence.id, index, prompt=True)
                )

    def _done(
        self,
        number: int,
        emitted: Sequence[Emitted],
        ended: Sequence[Ended],
        logits_NV: Tensor | None,
        entries: Sequence[Entry] = (),
        ends: Sequence[int] = (),
    ) -> StepDone:
        """The frame, with the log probabilities that belong to its tokens."""
        logprobs = [item for token in emitted for item in self._prompt_logprobs.take(token.sequence)]
        for token in emitted:
            best = entries[token.entry].sequence.request.sampling.logprobs
            if best is not None:
                assert logits_NV is not None, "a token comes from logits"
                row_V = logits_NV[ends[token.entry]]
                logprobs.append(describe(row_V, token.token, best, token.sequence, token.index))
        logprobs += [item for end in ended for item in self._prompt_logprobs.take(end.sequence)]
        return step_done(self._epoch, number, emitted, ended, logprobs)

    def _take_ended(self) -> list[Ended]:
        refused, self._refused = self._refused, []
        return [*refused, *self._scheduler.take_ended()]

    def _mark(self, step: int) -> None:
        if self._page is not None:
            self._page.set_step(step)
            self._page.advance()


def _sample_row(entry: Entry) -> SampleRow:
    sequence = entry.sequence
    position = entry.start + entry.count
    return SampleRow(sequence.request.sampling, position, sequence.tokens, sequence.prompt_length, sequence.stop_ids)


def _last_rows(entries: Sequence[Entry]) -> list[int]:
    """Row of logits of each entry's last token."""
    ends: list[int] = []
    row = -1
    for entry in entries:
        row += entry.logits
        ends.append(row)
    return ends


def _request(submission: Submission) -> SequenceRequest:
    return SequenceRequest(
        id=submission.sequence,
        prompt=unpack_u32(submission.prompt),
        delivered=unpack_u32(submission.delivered),
        sampling=submission.sampling,
        priority=submission.priority,
        cache_salt=submission.cache_salt,
        allow_cached=submission.allow_cached,
        solo=submission.solo,
        group=submission.group,
    )
