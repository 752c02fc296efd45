"""All that the gateway's core knows, and the invariants it keeps. Pure."""
# pyright: strict

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from controlplane.gateway.journal import ChoiceJournal, Journal
from controlplane.gateway.messages import WorkerKey
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId, RequestId, Slot, Term
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.messages.route import Inventory, JournalPhase, ReplicaEpoch, ReplicaRow
from controlplane.runtime.messages.serve import Shadow
from controlplane.runtime.timing import Timings

INVENTORY_JOURNALS_MAX = 256
"""Journals in one inventory frame: with 256 hashes of 8 bytes an entry stays under 4 KiB, a frame under 1 MiB."""


@dataclass(frozen=True, slots=True)
class JournalLimits:
    """Bounds on what one gateway holds. Past `journal_tokens_max` new requests are refused."""

    journal_tokens_max: int = 64 * 1024 * 1024
    # Consecutive refusals by workers after which a request is given up.
    refusals_max: int = 16


class WorkerPhase(Enum):
    CONNECTING = "connecting"
    UP = "up"
    BROKEN = "broken"


@dataclass(slots=True, eq=False)
class Worker:
    """The stream to one worker, as the core sees it."""

    key: WorkerKey
    node: NodeId
    phase: WorkerPhase = WorkerPhase.CONNECTING
    broken_at: float = 0.0
    # When its sequences are taken for unreachable, while the phase is BROKEN.
    back_by: float | None = None
    # Requests that ended while it could not be told.
    owed_ends: list[RequestId] = field(default_factory=list[RequestId])


@dataclass(slots=True, eq=False)
class Search:
    """The question which workers hold a stream's shadow."""

    request: RequestId
    deadline: float
    # Workers that have not answered.
    waiting: set[WorkerKey]
    # All workers that may be alive were asked: else others may hold it.
    informed: bool
    # What they answered, as far as it came.
    parts: dict[WorkerKey, Shadow] = field(default_factory=dict[WorkerKey, Shadow])
    # Those that did not answer in time.
    silent: set[WorkerKey] = field(default_factory=set[WorkerKey])


@dataclass(slots=True, eq=False)
class GatewayState:
    """Owned by one shell; changed by `step` only."""

    timings: Timings
    limits: JournalLimits
    journals: dict[RequestId, Journal] = field(default_factory=dict[RequestId, Journal])
    slots: dict[Slot, tuple[Journal, ChoiceJournal]] = field(default_factory=dict[Slot, tuple[Journal, ChoiceJournal]])
    workers: dict[WorkerKey, Worker] = field(default_factory=dict[WorkerKey, Worker])
    rows: dict[ReplicaId, ReplicaRow] = field(default_factory=dict[ReplicaId, ReplicaRow])
    # All workers that the leader told of, also those without a replica.
    told: dict[WorkerKey, NodeId] = field(default_factory=dict[WorkerKey, NodeId])
    # Outlives the rows: a deployment may have no replica just when its requests are replayed.
    max_retries: dict[DeploymentId, int] = field(default_factory=dict[DeploymentId, int])
    searches: dict[RequestId, Search] = field(default_factory=dict[RequestId, Search])
    leader_up: bool = False
    # The leader says that it cannot reach etcd.
    frozen: bool = False
    # When it last said that no worker is alive that it did not tell of.
    complete_at: float | None = None
    # Highest term that a leader or a permit had.
    term: Term = Term(0)
    # From when on requests are routed without a leader; None before there was one.
    leaderless_from: float | None = None
    # Prompt and delivered tokens of all journals.
    journal_tokens: int = 0
    last_slot: int = 0
    scan_at: float = 0.0
    timers: list[tuple[float, RequestId]] = field(default_factory=list[tuple[float, RequestId]])

    def mint_slot(self) -> Slot:
        """A slot no stream of this process ever had."""
        self.last_slot += 1
        return Slot(self.last_slot)

    def wake_at(self, when: float, journal: Journal) -> float:
        """Have the journal reviewed at `when`; returns it."""
        heapq.heappush(self.timers, (when, journal.request))
        return when

    def placed_at(self, key: ReplicaEpoch) -> list[Journal]:
        """Journals whose current attempt runs, or is to run, on this replica epoch."""
        return [journal for journal in self.journals.values() if journal.placement and journal.placement.key == key]

    def placed_on(self, worker: WorkerKey) -> list[Journal]:
        return [
            journal for journal in self.journals.values() if journal.placement and journal.placement.worker == worker
        ]

    def inventory(self, now: float) -> Iterator[Inventory]:
        """All journals, in chunks, the last one marked."""
        journals = [journal.info(now) for journal in self.journals.values()]
        starts = range(0, max(1, len(journals)), INVENTORY_JOURNALS_MAX)
        for start in starts:
            chunk = tuple(journals[start : start + INVENTORY_JOURNALS_MAX])
            yield Inventory(journals=chunk, last=start == starts[-1])

    def ready_rows(self) -> list[ReplicaRow]:
        return [row for row in self.rows.values() if row.phase == ReplicaPhase.READY]

    def cut_off_s(self, now: float) -> float:
        """How long the streams to all workers have been broken that serve by the leader's word; 0: they are not.

        Either this gateway is apart from them, or they are gone: then the leader says so within its grace.
        """
        serving = [self.workers.get(WorkerKey(row.serve_address)) for row in self.ready_rows()]
        broken = [worker.broken_at for worker in serving if worker and worker.phase == WorkerPhase.BROKEN]
        return now - max(broken) if broken and len(broken) == len(serving) else 0.0

    def check(self) -> None:
        """Assert every invariant."""
        seen: set[Slot] = set()
        tokens = 0
        for request, journal in self.journals.items():
            assert request == journal.request
            tokens += journal.prompt_tokens + journal.delivered_tokens
            placed = journal.placement is not None
            assert placed == (journal.phase != JournalPhase.ROUTING) or journal.finished
            assert (journal.phase == JournalPhase.DRAINING_CLIENT) == journal.finished
            for choice in journal.choices:
                assert choice.slot is None or choice.finished is None
                assert choice.slot is None or placed
                assert choice.slot is not None or choice.finished is not None or not placed
                assert len(choice.tokens) <= journal.asked.sampling.max_tokens
                if choice.slot is not None:
                    assert self.slots[choice.slot] == (journal, choice)
                    seen.add(choice.slot)
        assert seen == set(self.slots), "a slot without an open choice"
        assert tokens == self.journal_tokens, "journal tokens miscounted"
