"""The driver's engine as a model: the real batch scheduler over a memory of digests."""

from __future__ import annotations

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import Capacity, ReplicaSpec
from controlplane.runtime.packing import unpack_u32
from dataplane import frames
from dataplane.engine.book import Limits
from dataplane.engine.plan import StepPlan
from dataplane.engine.results import step_done
from dataplane.engine.scheduler import BatchScheduler, Completed
from dataplane.engine.sequence import SequenceRequest
from tools.sim.arithmetic import EOS, POISON, VOCABULARY, PagedMemory, extend, next_token

BLOCKS = 96
BLOCK_TOKENS = 4
MODEL_TOKENS = 160


class SimEngine:
    """Steps of one replica epoch, one in flight."""

    def __init__(self, spec: ReplicaSpec, epoch: Epoch) -> None:
        self.capacity = Capacity(
            total_blocks=BLOCKS,
            block_tokens=BLOCK_TOKENS,
            max_sequences=spec.max_sequences,
            max_batch_tokens=spec.max_batch_tokens,
            max_model_tokens=MODEL_TOKENS,
        )
        self.scheduler = BatchScheduler(
            Limits(
                total_blocks=BLOCKS,
                block_tokens=BLOCK_TOKENS,
                max_sequences=spec.max_sequences,
                max_batch_tokens=spec.max_batch_tokens,
                max_model_tokens=MODEL_TOKENS,
                vocab_size=VOCABULARY,
                max_logits=max(spec.max_sequences, spec.max_batch_tokens),
                eos_ids=frozenset({EOS}),
            )
        )
        self.epoch = epoch
        self.poisoned = False
        self._memory = PagedMemory(BLOCKS, BLOCK_TOKENS)
        self._flight: tuple[int, list[int]] | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None

    def submit(self, submissions: tuple[frames.Submission, ...]) -> None:
        for item in submissions:
            self.scheduler.submit(
                SequenceRequest(
                    id=item.sequence,
                    prompt=unpack_u32(item.prompt),
                    delivered=unpack_u32(item.delivered),
                    sampling=item.sampling,
                    priority=item.priority,
                    cache_salt=item.cache_salt,
                    allow_cached=item.allow_cached,
                    solo=item.solo,
                    group=item.group,
                )
            )

    def cancel(self, sequences: tuple[frames.SequenceId, ...]) -> None:
        self.scheduler.cancel(sequences)

    def begin(self) -> frames.StepBegun | None:
        """Plan and compute a step; its outcome is told by `end`. None: nothing can run."""
        plan = self.scheduler.plan(1 << 20)
        if plan is None:
            return None
        self._flight = plan.number, self._run(plan)
        self.poisoned = any(entry.sequence.request.prompt[0] == POISON for entry in self.scheduler.entries(plan.number))
        return frames.StepBegun(self.epoch, plan.number, plan.sequences)

    def end(self) -> frames.StepDone | None:
        """What the step in flight brought; without one, ends that need no step."""
        if self._flight is None:
            ended = self.scheduler.take_ended()
            return self._done(0, Completed(emitted=(), ended=ended)) if ended else None
        number, sampled = self._flight
        self._flight = None
        done = self._done(number, self.scheduler.complete(number, sampled))
        self.scheduler.check()
        return done

    def report(self, step_ms: float) -> frames.LoadReport:
        load = self.scheduler.load()
        return frames.LoadReport(
            epoch=self.epoch,
            free_blocks=load.free_blocks,
            running=load.running,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            step_ms=step_ms,
            queue=load.queue,
            prefix_digest=b"",
            admitted=tuple(frames.AdmittedSequence(*pair) for pair in self.scheduler.take_admitted()),
        )

    def _done(self, number: int, completed: Completed) -> frames.StepDone:
        return step_done(self.epoch, number, completed.emitted, completed.ended, [])

    def _run(self, plan: StepPlan) -> list[int]:
        """Each position's digest from the one before it in the cache."""
        columns = (plan.starts, plan.counts, plan.table_lengths, plan.samples)
        tokens, tables = unpack_u32(plan.tokens), list(unpack_u32(plan.tables))
        entries = self.scheduler.entries(plan.number)
        sampled: list[int] = []
        at = table_at = 0
        for entry, start, count, blocks, samples in zip(entries, *map(unpack_u32, columns), strict=True):
            table = tables[table_at : table_at + blocks]
            table_at += blocks
            digest = self._memory.read(table, start - 1) if start else b""
            for position in range(start, start + count):
                digest = extend(digest, tokens[at])
                at += 1
                self._memory.write(table, position, digest)
            sampled.append(next_token(digest, entry.sequence.request.sampling.seed) if samples else 0)
        return sampled
