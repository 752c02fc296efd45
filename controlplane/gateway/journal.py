"""A request's journal: its prompt, parameters and the tokens already delivered. Kept by its gateway, and by it alone.

The one delivery rule: a token goes to the client if its slot is current and its index is the next one. A slot stands
for (request, choice, attempt, replica, epoch), so a token of an older attempt finds no slot. Pure.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from controlplane.gateway.messages import RequestAccepted, WorkerKey
from controlplane.runtime.ids import Attempt, Epoch, NodeId, ReplicaId, RequestId, Slot
from controlplane.runtime.messages.common import Permit
from controlplane.runtime.messages.route import JournalInfo, JournalPhase, ReplicaEpoch, RouteCause, RouteEntry
from controlplane.runtime.messages.serve import Choice, FinishReason, OpenRequest, SlotCursor
from controlplane.runtime.packing import pack_u32

TOKEN_BYTES = 4


@dataclass(slots=True, eq=False)
class ChoiceJournal:
    """One of a request's n answers."""

    index: int
    seed: int
    tokens: array[int] = field(default_factory=lambda: array("I"))
    # Prompt positions below this had their logprobs delivered.
    prompt_next: int = 0
    slot: Slot | None = None
    finished: FinishReason | None = None
    # A token past the next one came: nothing is taken from this slot until the worker has answered a Sync.
    gap: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an attempt runs."""

    key: ReplicaEpoch
    worker: WorkerKey
    node: NodeId
    permit: Permit


@dataclass(slots=True, eq=False)
class Journal:
    """See the state table of the request; `phase` moves only in the rules beside this file."""

    asked: RequestAccepted
    created: float
    choices: list[ChoiceJournal]
    phase: JournalPhase = JournalPhase.ROUTING
    attempt: Attempt = Attempt(1)
    cause: RouteCause = RouteCause.NEW
    placement: Placement | None = None
    # The body went out on a stream, so that a Sync may find it there.
    opened: bool = False
    # Some attempt was admitted: from then on the request is held, not refused.
    admitted: bool = False
    retries: int = 0
    refusals: int = 0
    # Engines that died with it in their unfinished step, since it last was acquitted.
    crashes: set[ReplicaEpoch] = field(default_factory=set[ReplicaEpoch])
    # Tokens that the current attempt delivered.
    attempt_tokens: int = 0
    past: set[ReplicaEpoch] = field(default_factory=set[ReplicaEpoch])
    exclude: tuple[ReplicaEpoch, ...] = ()
    # Every worker that was sent the body: each keeps a shadow until End.
    visited: dict[WorkerKey, None] = field(default_factory=dict[WorkerKey, None])
    ask_at: float | None = None
    open_by: float | None = None
    starved_since: float | None = None
    # When the current attempt last gave a token.
    moved_at: float | None = None
    # When a client last had a token, of an attempt that was lost and has no successor's token yet.
    stuck_since: float | None = None

    @property
    def request(self) -> RequestId:
        return self.asked.request

    @property
    def prompt_tokens(self) -> int:
        return len(self.asked.prompt) // TOKEN_BYTES

    @property
    def delivered_tokens(self) -> int:
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def finished(self) -> bool:
        return all(choice.finished is not None for choice in self.choices)

    def acquit(self) -> None:
        """It ran past where its engines died: they died of something else, and late news of them proves nothing."""
        self.crashes.clear()
        self.past.clear()

    def live_slots(self) -> tuple[Slot, ...]:
        return tuple(choice.slot for choice in self.choices if choice.slot is not None)

    def cursors(self) -> list[SlotCursor]:
        """Where each open choice goes on, for a Sync."""
        return [
            SlotCursor(
                slot=choice.slot,
                request=self.request,
                choice=choice.index,
                attempt=self.attempt,
                next_index=len(choice.tokens),
            )
            for choice in self.choices
            if choice.slot is not None
        ]

    def entry(self, now: float, *, hashes: bool = True) -> RouteEntry:
        """The question where this attempt may run."""
        asked = self.asked
        return RouteEntry(
            request=asked.request,
            attempt=self.attempt,
            deployment=asked.deployment,
            cause=self.cause,
            prompt_tokens=self.prompt_tokens,
            delivered_tokens=self.delivered_tokens,
            max_tokens=asked.sampling.max_tokens,
            n=len(self.choices),
            priority=asked.priority,
            tenant=asked.tenant,
            waited_ms=round((now - self.created) * 1000),
            remaining_ms=self.remaining_ms(now),
            prefix_hashes=asked.prefix_hashes if hashes else (),
            exclude=self.exclude,
            crashes=len(self.crashes),
            model_path=asked.model_path,
        )

    def info(self, now: float) -> JournalInfo:
        """This journal in the inventory that a new leader gets."""
        routing = self.phase == JournalPhase.ROUTING
        place = self.placement
        return JournalInfo(
            phase=self.phase,
            replica=place.key.replica if place else ReplicaId(""),
            epoch=place.key.epoch if place else Epoch(0),
            entry=self.entry(now, hashes=routing),
        )

    def body(self, permit: Permit, now: float) -> OpenRequest:
        """The request itself, for the worker that the permit names."""
        asked = self.asked
        return OpenRequest(
            permit=permit,
            choices=tuple(
                Choice(
                    index=choice.index,
                    slot=choice.slot or Slot(0),
                    seed=choice.seed,
                    delivered=pack_u32(choice.tokens),
                    finished=choice.finished is not None,
                )
                for choice in self.choices
            ),
            prompt=asked.prompt,
            sampling=asked.sampling,
            tenant_salt=asked.tenant_salt,
            render=asked.render,
            remaining_ms=self.remaining_ms(now),
            # What once crashed an engine does not get its cached blocks again.
            allow_cached=not self.crashes and asked.sampling.prompt_logprobs is None,
        )

    def remaining_ms(self, now: float) -> int:
        """Budget until the deadline; at least 1, for 0 would mean none."""
        return max(1, round((self.asked.deadline - now) * 1000))


def new_journal(asked: RequestAccepted, now: float) -> Journal:
    """An empty journal with one choice a seed."""
    choices = [ChoiceJournal(index=index, seed=seed) for index, seed in enumerate(asked.seeds)]
    return Journal(asked=asked, created=now, choices=choices)


def take_fresh(choice: ChoiceJournal, first_index: int, tokens: array[int]) -> array[int] | None:
    """The delivery rule: append what continues the journal and return it, maybe nothing; None if there is a gap."""
    known = len(choice.tokens)
    if first_index > known:
        return None
    fresh = tokens[known - first_index :] if first_index < known else tokens
    choice.tokens.extend(fresh)
    return fresh
