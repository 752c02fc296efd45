"""Whatever is shuffled, doubled, dropped or broken: each token index reaches the client at most once and in order, the
sequence is the one that the source gives, and when the chaos ends every request ends."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.gateway.messages import (
    AskRoute,
    ClientDrained,
    ConnectWorker,
    Deliver,
    Effect,
    Event,
    Failed,
    LeaderLost,
    LeaderOpened,
    LeaderSaid,
    SendWorker,
    Tick,
    WorkerBroken,
    WorkerGone,
    WorkerKey,
    WorkerSaid,
    WorkerUp,
)
from controlplane.gateway.state import JournalLimits
from controlplane.runtime.ids import Epoch, ReplicaId, RequestId, Slot
from controlplane.runtime.messages.route import (
    JournalPhase,
    MoveRequests,
    ReplicaClosed,
    RouteCode,
    RoutedBatch,
    RouteEntry,
    RouteRefused,
)
from controlplane.runtime.messages.serve import (
    Admitted,
    CancelSlots,
    EndRequests,
    Finish,
    FinishReason,
    OpenCode,
    OpenRefused,
    OpenRequest,
    ServeDown,
    ServeUp,
    SlotsLost,
    StepTokens,
    SyncReply,
    SyncSlots,
)
from controlplane.runtime.packing import pack_u32, unpack_u32
from tests.unit.controlplane.gateway.builders import WHY, Core, accepted, routed

MAX_TOKENS = 6
WORKERS = (WorkerKey("w1:1"), WorkerKey("w2:1"), WorkerKey("w3:1"))


def truth(request: RequestId, choice: int, index: int) -> int:
    return (int(request[:4], 16) * 31 + choice * 7 + index) % 1000


@dataclass
class Sequence:
    request: RequestId
    choice: int
    attempt: int
    have: int
    sent: int
    finish_sent: bool = False


@dataclass
class Worker:
    """A worker that keeps its sequences over broken streams, and loses them when told to."""

    key: WorkerKey
    up: bool = False
    connected: bool = False
    epoch: int = 1
    sequences: dict[Slot, Sequence] = field(default_factory=dict)

    def take(self, body: ServeUp) -> ServeDown | None:
        match body:
            case OpenRequest():
                return self._open(body)
            case SyncSlots():
                return self._sync(body)
            case CancelSlots():
                for slot in body.slots:
                    self.sequences.pop(slot, None)
            case EndRequests():
                self.sequences = {s: q for s, q in self.sequences.items() if q.request not in body.requests}
            case _:
                raise AssertionError(body)
        return None

    def _open(self, body: OpenRequest) -> ServeDown:
        permit = body.permit
        if permit.epoch != self.epoch:
            return OpenRefused(request=permit.request, attempt=permit.attempt, code=OpenCode.STALE_EPOCH, reason=WHY)
        for choice in body.choices:
            delivered = list(unpack_u32(choice.delivered))
            assert delivered == [truth(permit.request, choice.index, index) for index in range(len(delivered))]
            if not choice.finished:
                have = len(delivered)
                self.sequences[choice.slot] = Sequence(permit.request, choice.index, permit.attempt, have, have)
        return Admitted(request=permit.request, attempt=permit.attempt)

    def _sync(self, body: SyncSlots) -> ServeDown:
        known = [cursor for cursor in body.slots if cursor.slot in self.sequences]
        for cursor in known:
            sequence = self.sequences[cursor.slot]
            sequence.sent, sequence.finish_sent = cursor.next_index, False
        names = tuple(cursor.slot for cursor in known)
        return SyncReply(known=names, unknown=tuple(c.slot for c in body.slots if c.slot not in names))

    def step(self, random: Random | None) -> StepTokens | None:
        """Some sequences get a token; one message takes everything since the cursors."""
        columns = array("I"), array("I"), array("I"), array("I")
        finishes: list[Finish] = []
        for slot, sequence in self.sequences.items():
            if sequence.have < MAX_TOKENS and (random is None or random.random() < 0.8):
                sequence.have += 1
            fresh = [truth(sequence.request, sequence.choice, index) for index in range(sequence.sent, sequence.have)]
            done = sequence.have == MAX_TOKENS and not sequence.finish_sent
            if fresh:
                for column, value in zip(columns, (slot, sequence.sent, len(fresh)), strict=False):
                    column.append(value)
                columns[3].extend(fresh)
            sequence.sent = sequence.have
            if done:
                sequence.finish_sent = True
                finishes.append(Finish(slot=slot, reason=FinishReason.LENGTH))
        if not columns[0] and not finishes:
            return None
        packed = [pack_u32(column) for column in columns]
        return StepTokens(
            slots=packed[0], first_index=packed[1], counts=packed[2], tokens=packed[3], finish=tuple(finishes)
        )


class World:
    """One gateway core, a leader that routes anywhere, workers, and a wire that loses, doubles and reorders."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.core = Core(JournalLimits(refusals_max=10**6), max_retries=10**6)
        self.workers = {key: Worker(key) for key in WORKERS}
        self.wire: list[Event] = []
        self.received: dict[tuple[RequestId, int], list[int]] = {}
        self.finished: set[tuple[RequestId, int]] = set()
        self.requests: list[RequestId] = []
        self.failed: list[Failed] = []

    def do(self, event: Event) -> None:
        for effect in self.core.do(event):
            self.perform(effect)

    def perform(self, effect: Effect) -> None:
        match effect:
            case Deliver():
                key = (effect.request, effect.choice)
                got = self.received.setdefault(key, [])
                assert key not in self.finished, "a delivery after the finish"
                assert effect.first_index == len(got), "an index twice, or one left out"
                got.extend(effect.tokens)
                assert got == [truth(*key, index) for index in range(len(got))]
                if effect.finish is not None:
                    assert len(got) == MAX_TOKENS, "a finish without all its tokens"
                    self.finished.add(key)
            case SendWorker():
                worker = self.workers[effect.worker]
                assert worker.up, "a frame for a stream that is down"
                if worker.connected and (answer := worker.take(effect.body)) is not None:
                    self.wire.append(WorkerSaid(worker.key, answer))
            case AskRoute():
                self.wire.append(self.route(effect.entry))
            case Failed():
                self.failed.append(effect)
            case ConnectWorker() | _:
                pass

    def route(self, entry: RouteEntry) -> Event:
        if self.random.random() < 0.1:
            refused = RouteRefused(
                request=entry.request, attempt=entry.attempt, code=RouteCode.NO_REPLICA, reason=WHY, retry_ms=10
            )
            return LeaderSaid(RoutedBatch(refused=(refused,)))
        worker = self.random.choice(list(self.workers.values()))
        return routed(entry.request, attempt=entry.attempt, worker=worker.key, epoch=worker.epoch)

    def open(self) -> None:
        if len(self.requests) < 4:
            request = RequestId(f"{len(self.requests) + 1:04x}" * 8)
            self.requests.append(request)
            self.do(accepted(request, n=self.random.choice((1, 1, 2, 3)), max_tokens=MAX_TOKENS, deadline=1e12))

    def carry(self) -> None:
        """Something on the wire arrives, arrives twice, or never does."""
        if not self.wire:
            return
        place = self.random.randrange(len(self.wire))
        fate = self.random.random()
        event = self.wire[place] if fate < 0.15 else self.wire.pop(place)
        if fate < 0.9:
            self.do(event)

    def step(self) -> None:
        worker = self.random.choice(list(self.workers.values()))
        if worker.connected and (message := worker.step(self.random)) is not None:
            self.wire.append(WorkerSaid(worker.key, message))

    def break_stream(self) -> None:
        worker = self.random.choice(list(self.workers.values()))
        if worker.up:
            worker.up = worker.connected = False
            self.do(WorkerBroken(worker.key, self.core.now))

    def connect(self) -> None:
        worker = self.random.choice(list(self.workers.values()))
        if worker.key in self.core.state.workers and not worker.up:
            worker.up = worker.connected = True
            self.do(WorkerUp(worker.key))

    def stall(self) -> None:
        """The connection is dead, but nobody has noticed yet."""
        self.random.choice(list(self.workers.values())).connected = False

    def die(self) -> None:
        worker = self.random.choice(list(self.workers.values()))
        worker.sequences.clear()
        if worker.up:
            worker.up = worker.connected = False
            self.do(WorkerBroken(worker.key, self.core.now))
        self.do(WorkerGone(worker.key, WHY))

    def lose_slots(self) -> None:
        worker = self.random.choice(list(self.workers.values()))
        slots = tuple(slot for slot in worker.sequences if self.random.random() < 0.5)
        for slot in slots:
            del worker.sequences[slot]
        self.wire.append(WorkerSaid(worker.key, SlotsLost(slots=slots, reason=WHY)))

    def close_replica(self) -> None:
        worker = self.random.choice(list(self.workers.values()))
        body = ReplicaClosed(replica=ReplicaId(f"r-{worker.key}"), epoch=Epoch(worker.epoch), reason=WHY)
        worker.epoch += 1
        worker.sequences.clear()
        self.wire.append(LeaderSaid(body))

    def move(self) -> None:
        worker = self.random.choice(list(self.workers.values()))
        body = MoveRequests(replica=ReplicaId(f"r-{worker.key}"), epoch=Epoch(worker.epoch), deadline_ms=0, reason=WHY)
        self.wire.append(LeaderSaid(body))

    def change_leader(self) -> None:
        self.do(LeaderLost())
        self.elect()

    def elect(self) -> None:
        asked = [
            info.entry
            for chunk in self.core.state.inventory(self.core.now)
            for info in chunk.journals
            if info.phase is JournalPhase.ROUTING
        ]
        self.do(LeaderOpened())
        self.wire.extend(self.route(entry) for entry in asked)

    def wait(self) -> None:
        self.core.now += self.random.choice((0.01, 0.05, 0.5, 2.0))
        self.do(Tick())

    def heal(self) -> None:
        """No more faults: everything arrives in order, all streams are up. Every request must end."""
        self.random = _Calm()
        # A real wire loses frames only by breaking; what was dropped above comes to light now.
        self.change_leader()
        for worker in self.workers.values():
            if worker.up:
                worker.up = worker.connected = False
                self.do(WorkerBroken(worker.key, self.core.now))
        for _ in range(200):
            for worker in self.workers.values():
                if not worker.up and worker.key in self.core.state.workers:
                    worker.up = worker.connected = True
                    self.do(WorkerUp(worker.key))
                if (message := worker.step(None)) is not None:
                    self.wire.append(WorkerSaid(worker.key, message))
            pending, self.wire = self.wire, []
            for event in pending:
                self.do(event)
            self.core.now += 0.2
            self.do(Tick())
            if all(journal.finished for journal in self.core.state.journals.values()):
                return
        raise AssertionError(f"not ended: {[(j.phase, j.attempt) for j in self.core.state.journals.values()]}")

    def check(self) -> None:
        gone = {failed.request for failed in self.failed}
        for request in self.requests:
            if request in gone:
                continue
            for choice in self.core.state.journals[request].choices:
                assert (request, choice.index) in self.finished
                assert len(self.received[request, choice.index]) == MAX_TOKENS
            self.do(ClientDrained(request))
        assert self.core.state.journals == {}
        assert self.core.state.journal_tokens == 0


class _Calm(Random):
    """Chance after the faults: nothing unlikely happens any more."""

    def random(self) -> float:
        return 0.5

    def choice(self, seq):  # type: ignore[override]
        return seq[0]


def actions(world: World) -> list[tuple[int, Callable[[], None]]]:
    return [
        (4, world.open),
        (30, world.carry),
        (16, world.step),
        (6, world.connect),
        (3, world.break_stream),
        (1, world.stall),
        (1, world.die),
        (1, world.lose_slots),
        (1, world.close_replica),
        (1, world.move),
        (1, world.change_leader),
        (3, world.wait),
    ]


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(20, 250))
def test_every_index_at_most_once_in_order_and_all_of_them_in_the_end(seed: int, length: int):
    world = World(Random(seed))
    world.elect()
    world.open()
    weights, moves = zip(*actions(world), strict=True)
    for _ in range(length):
        world.random.choices(moves, weights)[0]()
    world.heal()
    world.check()
