"""The engine of one replica: submissions in, one step at a time, tokens out.

A step: the scheduler plans it, the runner runs the model, the sampler draws, the scheduler takes the tokens. The host
waits for the device once a step, in `_read_tokens`; log probabilities, where a request asks for them, wait again.

Shape letters: N rows of logits, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from controlplane.runtime.errors import Rejected
from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import Capacity, Reason, ReasonKind, ReplicaSpec
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.packing import unpack_u32
from dataplane.engine.book import Limits
from dataplane.engine.draft import Entry
from dataplane.engine.kv_cache import block_bytes
from dataplane.engine.logprobs import describe
from dataplane.engine.pacing import Pacer
from dataplane.engine.plan import StepPlan
from dataplane.engine.results import PromptLogprobs, step_done
from dataplane.engine.runner import ModelRunner
from dataplane.engine.sampler import Sampler, SampleRow
from dataplane.engine.scheduler import BatchScheduler
from dataplane.engine.sequence import Emitted, Ended, SequenceRequest
from dataplane.engine.sizing import cache_bytes, count_blocks
from dataplane.engine.validation import refusal
from dataplane.frames import AdmittedSequence, LoadReport, Logprobs, SequenceId, StepBegun, StepDone, Submission
from dataplane.models.fit import FittedModel
from dataplane.parallel.mesh import Mesh
from dataplane.progress import ProgressPage

STEP_S_MAX = 0.25
"""Longest step wanted where nobody says otherwise, in seconds."""

PROBE_TOKENS_CPU = 64
"""Length of the prompt that a CPU is measured with; an accelerator takes the largest step."""

LOGIT_BYTES_MAX = 1 << 28
"""Bound on the float32 logits of a step that prompt log probabilities may ask for."""

DIGEST_HASHES = 512
"""Prefix hashes in a load report: 4 KiB of 8 bytes each."""


class Engine:
    """Schedules, runs and samples. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        model: FittedModel,
        spec: ReplicaSpec,
        mesh: Mesh,
        device: torch.device,
        page: ProgressPage | None = None,
        step_s_max: float = STEP_S_MAX,
    ) -> None:
        """Measure a step, size the cache, allocate it. Raises Rejected if the memory does not hold one sequence."""
        assert mesh.degrees.tensor == mesh.degrees.pipeline == 1, "an engine of several ranks needs a plan channel"
        self._model = model
        self._spec = spec
        self._page = page
        self._sampler = Sampler(model.vocab_size, device)
        self._runner = ModelRunner(model, device, spec.block_tokens, page)
        self._pacer = Pacer(step_s_max, spec.max_batch_tokens)
        self._limits = self._size(device)
        self._runner.allocate(self._limits.total_blocks)
        self.reset(Epoch(0))

    # ------------------------------------------------------------ life

    def reset(self, epoch: Epoch) -> None:
        """Drop all sequences and everything cached; frames carry `epoch` from now on."""
        self._epoch = epoch
        self._scheduler = BatchScheduler(self._limits)
        self._prompt_logprobs = PromptLogprobs()
        self._refused: list[Ended] = []
        self._last_step = 0
        if self._page is not None:
            self._page.set_step(0)

    @property
    def capacity(self) -> Capacity:
        """What this engine holds, as its replica reports it."""
        limits = self._limits
        return Capacity(
            total_blocks=limits.total_blocks,
            block_tokens=limits.block_tokens,
            max_sequences=limits.max_sequences,
            max_batch_tokens=limits.max_batch_tokens,
            max_model_tokens=limits.max_model_tokens,
        )

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
        return self._scheduler.has_work or bool(self._refused)

    def step(self, begun: Callable[[StepBegun], None] | None = None) -> StepDone | None:
        """Run one step. `begun` is told before the device is touched. None: there was nothing to do.

        After an exception the engine must be `reset`.
        """
        plan = self._scheduler.plan(self._pacer.tokens)
        if plan is None:
            ended = self._take_ended()
            return step_done(self._epoch, self._last_step, (), ended, ()) if ended else None
        if begun is not None:
            begun(StepBegun(self._epoch, plan.number, plan.sequences))
        self._last_step = plan.number
        self._mark(plan.number)
        started = time.perf_counter()
        done = self._execute(plan)
        self._pacer.observe(len(plan.tokens) // 4, time.perf_counter() - started)
        self._mark(0)
        return done

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

    def _execute(self, plan: StepPlan) -> StepDone:
        logits_NV = self._runner.run(plan)
        entries = self._scheduler.entries(plan.number)
        ends = _last_rows(entries)
        sampled = [index for index, entry in enumerate(entries) if entry.samples]
        rows = [self._sample_row(entries[index]) for index in sampled]
        tokens_N = self._sampler.sample(logits_NV[[ends[index] for index in sampled]], rows) if rows else None
        drawn = dict(zip(sampled, _read_tokens(tokens_N), strict=True))
        tokens = [drawn.get(index, 0) for index in range(len(entries))]
        poisoned = {index for index, token in drawn.items() if token < 0}
        self._describe_prompts(entries, ends, logits_NV)
        completed = self._scheduler.complete(plan.number, tokens, poisoned)
        if completed.scrub:
            self._runner.scrub(list(completed.scrub))
        logprobs = self._logprobs(completed.emitted, completed.ended, entries, ends, logits_NV)
        ended = [*completed.ended, *self._take_ended()]
        return step_done(self._epoch, plan.number, completed.emitted, ended, logprobs)

    def _sample_row(self, entry: Entry) -> SampleRow:
        sequence = entry.sequence
        return SampleRow(
            sequence.request.sampling,
            entry.start + entry.count,
            sequence.tokens,
            sequence.prompt_length,
            sequence.stop_ids,
        )

    def _describe_prompts(self, entries: Sequence[Entry], ends: list[int], logits_NV: Tensor) -> None:
        """Keep the log probabilities of prompt tokens that this step's logits foretell."""
        for entry, end in zip(entries, ends, strict=True):
            sequence = entry.sequence
            best = sequence.request.sampling.prompt_logprobs
            if best is None or not entry.logits or entry.start >= sequence.prompt_length:
                continue
            first = entry.start + entry.count - entry.logits
            for index in range(first + 1, min(entry.start + entry.count + 1, sequence.prompt_length)):
                row = end - (entry.start + entry.count - index)
                token = sequence.tokens[index]
                self._prompt_logprobs.add(describe(logits_NV[row], token, best, sequence.id, index, prompt=True))

    def _logprobs(
        self,
        emitted: Iterable[Emitted],
        ended: Iterable[Ended],
        entries: Sequence[Entry],
        ends: list[int],
        logits_NV: Tensor,
    ) -> list[Logprobs]:
        described: list[Logprobs] = []
        for item in emitted:
            described += self._prompt_logprobs.take(item.sequence)
            best = entries[item.entry].sequence.request.sampling.logprobs
            if best is not None:
                described.append(describe(logits_NV[ends[item.entry]], item.token, best, item.sequence, item.index))
        for item in ended:
            described += self._prompt_logprobs.take(item.sequence)
        return described

    def _take_ended(self) -> list[Ended]:
        refused, self._refused = self._refused, []
        return [*refused, *self._scheduler.take_ended()]

    def _mark(self, step: int) -> None:
        if self._page is not None:
            self._page.set_step(step)
            self._page.advance()

    # ------------------------------------------------------------ size

    def _size(self, device: torch.device) -> Limits:
        spec, model = self._spec, self._model
        probe = min(spec.max_batch_tokens, model.max_model_tokens)
        if device.type == "cpu":
            probe = min(probe, PROBE_TOKENS_CPU)
        self._pacer.observe(probe, self._runner.measure(probe))
        per_block = block_bytes(model.attention, spec.block_tokens, model.dtype)
        if spec.kv_cache_tokens:
            blocks = -(-spec.kv_cache_tokens // spec.block_tokens)
        else:
            step_bytes = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
            room = cache_bytes(device, spec.mem_fraction_static, step_bytes)
            blocks = count_blocks(room, per_block, spec.block_tokens, spec.max_sequences, model.max_model_tokens)
        if blocks < 1:
            text = f"no memory for a KV cache block of {per_block} bytes on {device} beside the weights"
            raise Rejected(Reason(kind=ReasonKind.OUT_OF_MEMORY, text=text))
        sequences = min(spec.max_sequences, spec.max_batch_tokens)
        return Limits(
            total_blocks=blocks,
            block_tokens=spec.block_tokens,
            max_sequences=sequences,
            max_batch_tokens=spec.max_batch_tokens,
            max_model_tokens=min(model.max_model_tokens, blocks * spec.block_tokens),
            vocab_size=model.vocab_size,
            max_logits=max(sequences, LOGIT_BYTES_MAX // (4 * model.vocab_size)),
            eos_ids=frozenset(model.eos_ids),
            fingerprint=model.weights,
            enable_prefix_cache=spec.enable_prefix_cache,
        )


def _read_tokens(tokens_N: Tensor | None) -> list[int]:
    """The step's one wait for the device."""
    return [] if tokens_N is None else tokens_N.tolist()


def _last_rows(entries: Sequence[Entry]) -> list[int]:
    """Row of logits of each entry's last token; -1 behind... see `Entry.logits`."""
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
