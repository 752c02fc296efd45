"""What a gateway must never do. Its clients check the tokens themselves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from controlplane.gateway.messages import Deliver, LeaderSaid, Moved, SendWorker, Tick, WorkerKey, WorkerSaid
from controlplane.gateway.request_rules import CRASHES_MAX as _CRASHES_MAX
from controlplane.runtime.ids import RequestId, Slot
from controlplane.runtime.messages.route import ReplicaClosed, ReplicaEpoch, RoutedBatch
from controlplane.runtime.messages.serve import OpenRequest, StepTokens, SyncSlots
from controlplane.runtime.packing import unpack_u32
from tools.sim.watching import Act

if TYPE_CHECKING:
    from tools.sim.gateway import SimGateway

CRASHES_MAX = 2
"""Engines that one request may end (PROTOCOL H9)."""
assert CRASHES_MAX == _CRASHES_MAX


@dataclass(frozen=True, slots=True)
class _Meaning:
    """What a slot stands for at its worker, by what that was told."""

    worker: WorkerKey
    request: RequestId
    choice: int
    attempt: int


class GatewaySafety:
    """Watches one gateway process."""

    def __init__(self, gateway: SimGateway) -> None:
        self._gateway = gateway
        self._slots: set[Slot] = set()
        # Attempts lost without a plan, by request, of those whose body left.
        self._lost: Counter[RequestId] = Counter()
        self._opened: set[tuple[RequestId, int]] = set()
        self._meanings: dict[int, _Meaning] = {}

    def step(self, event: Any, act: Act) -> list[Any]:
        state = self._gateway.state
        body = event.body if isinstance(event, LeaderSaid) else None
        placed = {}
        if isinstance(body, ReplicaClosed):
            placed = {name: journal.placement.key for name, journal in state.journals.items() if journal.placement}
        current = self._current(event)
        effects = act()
        if not effects and isinstance(event, Tick):
            return effects
        state.check()
        if isinstance(body, ReplicaClosed):
            self._closed(ReplicaEpoch(replica=body.replica, epoch=body.epoch), placed, effects)
        elif isinstance(body, RoutedBatch):
            self._routed()
        for effect in effects:
            if isinstance(effect, SendWorker):
                self._tells(effect)
            elif isinstance(effect, Moved) and not effect.planned:
                self._moves(effect)
            elif isinstance(effect, Deliver):
                key = effect.request, effect.choice
                assert key in current, f"{effect.request}: tokens of an attempt that is over are taken"
        return effects

    def _current(self, event: Any) -> set[tuple[RequestId, int]]:
        """The choices whose present attempt a frame of tokens brings something of."""
        if not isinstance(event, WorkerSaid) or not isinstance(event.body, StepTokens):
            return set()
        slots = [*unpack_u32(event.body.slots), *(finish.slot for finish in event.body.finish)]
        meant = [meaning for slot in slots if (meaning := self._meanings.get(slot)) and meaning.worker == event.worker]
        journals = self._gateway.state.journals
        return {
            (meaning.request, meaning.choice)
            for meaning in meant
            if meaning.request in journals and journals[meaning.request].attempt == meaning.attempt
        }

    def _tells(self, sent: SendWorker) -> None:
        """A body, or a Sync after another gateway's, says what its slots stand for."""
        match sent.body:
            case OpenRequest(permit=permit, choices=choices):
                self._opens(sent.body)
                for choice in choices:
                    if not choice.finished:
                        meaning = _Meaning(sent.worker, permit.request, choice.index, permit.attempt)
                        self._meanings[choice.slot] = meaning
            case SyncSlots(slots=cursors):
                for cursor in cursors:
                    meaning = _Meaning(sent.worker, cursor.request, cursor.choice, cursor.attempt)
                    self._meanings[cursor.slot] = meaning
            case _:
                pass

    def _closed(self, key: ReplicaEpoch, placed: dict[RequestId, ReplicaEpoch], effects: list[Any]) -> None:
        """Whoever ran there moves, and nobody else."""
        for effect in effects:
            if isinstance(effect, Moved):
                assert placed.get(effect.request) == key, f"{effect.request} moves though it did not run on {key}"
        left = [journal.request for journal in self._gateway.state.placed_at(key) if not journal.finished]
        assert not left, f"{left} stay on {key}, which is over"

    def _routed(self) -> None:
        """A permit counts for the attempt it was given for."""
        for journal in self._gateway.state.journals.values():
            if journal.placement is not None and not journal.finished:
                granted = journal.placement.permit.attempt
                assert granted == journal.attempt, (
                    f"{journal.request}: a permit of attempt {granted} for {journal.attempt}"
                )

    def _opens(self, body: OpenRequest) -> None:
        slots = {choice.slot for choice in body.choices if not choice.finished}
        assert not slots & self._slots, f"slots {slots & self._slots} are used again"
        self._slots |= slots
        self._opened.add((body.permit.request, body.permit.attempt))
        journal = self._gateway.state.journals[body.permit.request]
        assert len(journal.crashes) < CRASHES_MAX, (
            f"{journal.request} killed {len(journal.crashes)} engines and runs again"
        )

    def _moves(self, moved: Moved) -> None:
        self._lost[moved.request] += (moved.request, moved.attempt - 1) in self._opened
        journal = self._gateway.state.journals[moved.request]
        budget = self._gateway.state.max_retries[journal.asked.deployment]
        assert self._lost[moved.request] <= budget, f"{moved.request} is replayed {self._lost[moved.request]} times"
