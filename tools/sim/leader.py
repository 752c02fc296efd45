"""The coordinator's shell as a model: Coordinator, SessionStreams and Connection, their effects and nothing decided.

Faithful to controlplane/coordinator.py: items carry the term they belong to; each effect that can fail comes back as an
event; a tick follows the input that was there.
"""

from __future__ import annotations

import itertools
from random import Random
from typing import Any, assert_never

from controlplane.connection import refusal
from controlplane.core import messages as core
from controlplane.core.state import ClusterState, Limits
from controlplane.core.step import step
from controlplane.election import ElectionEvent, Heard, Lost, Muted, Won
from controlplane.runtime.errors import FencedError, Retryable
from controlplane.runtime.etcd_watch import WatchBatch
from controlplane.runtime.ids import ClusterId, Incarnation, SessionId, Term
from controlplane.runtime.keys import Keys
from controlplane.runtime.messages.common import Head, Reason, ReasonKind
from controlplane.runtime.messages.route import GatewayHello, GatewayWelcome
from controlplane.runtime.messages.session import WorkerHello, WorkerWelcome
from controlplane.runtime.records import DeploymentRecord, PeerRecord
from controlplane.runtime.timing import Timings
from controlplane.store import PlacementChanged, Store, StoreEvent, StoreView
from tools.sim.electing import SimElection, SimLeaderWatch
from tools.sim.etcd_client import SimEtcdClient, SimPrefixWatch
from tools.sim.network import Network, Side
from tools.sim.probing import refused_twice
from tools.sim.process import Process, Task
from tools.sim.watching import Watcher


class SessionStream:
    """The leader's end of one session: heads on frames, in both directions."""

    def __init__(self, coordinator: SimCoordinator, side: Side) -> None:
        self._coordinator = coordinator
        self._side = side
        self._connection: core.ConnectionId | None = None
        self._term = Term(0)
        self._session = SessionId(0)
        self._sent = 0
        self._received = 0
        self._worker = False
        side.on_frame = self._take
        side.on_closed = self._end
        coordinator.process.later(coordinator.timings.stage, self._expect_hello)

    def send(self, body: Any) -> None:
        if isinstance(body, WorkerWelcome | GatewayWelcome):
            self._session = body.session
        self._sent += 1
        head = Head(term=self._term, session=self._session, seq=self._sent, ack=self._received)
        self._side.send((head, body))

    def close(self) -> None:
        """End the stream after what was sent."""
        self._side.close()
        self._end()

    def _take(self, frame: tuple[Head, Any]) -> None:
        head, body = frame
        if self._connection is None:
            self._greet(body)
            return
        self._received = max(self._received, head.seq)
        said = core.WorkerSaid if self._worker else core.GatewaySaid
        self._coordinator.hand_in(self._term, said(self._connection, head, body))

    def _greet(self, hello: WorkerHello | GatewayHello) -> None:
        coordinator = self._coordinator
        term = coordinator.term
        current = coordinator.leader.current
        highest = max(coordinator.leader.highest_term, term or Term(0))
        if term is None:
            address = current.address if current is not None else ""
            self.send(refusal(ReasonKind.NOT_LEADER, "this control plane does not lead", highest, address))
            self._side.close()
            return
        self._term, self._worker = term, isinstance(hello, WorkerHello)
        self._connection = coordinator.connect(self, hello)

    def _expect_hello(self) -> None:
        if self._connection is None:
            self._side.close()

    def _end(self) -> None:
        if self._connection is not None:
            self._coordinator.disconnect(self._connection, self._term, worker=self._worker)


class SimCoordinator:
    """Runs the core while its process leads."""

    def __init__(
        self,
        process: Process,
        client: SimEtcdClient,
        network: Network,
        leader: SimLeaderWatch,
        candidate: PeerRecord,
        cluster: ClusterId,
        keys: Keys,
        timings: Timings,
        watcher: Watcher,
        initial: DeploymentRecord | None,
        limits: Limits,
    ) -> None:
        self.process = process
        self.network = network
        self.leader = leader
        self.timings = timings
        self.state: ClusterState | None = None
        self.won_at = 0.0
        self._candidate = candidate
        self._cluster = cluster
        self._watcher = watcher
        self._initial = initial
        self._limits = limits
        self._client = client
        self._keys = keys
        self._random = Random(process.kernel.random.getrandbits(32))
        self.election = SimElection(client, keys, candidate, leader, timings, self._random, self._heard)
        self._store = Store(client, keys, self.election, timings, process, self._random)  # pyright: ignore[reportArgumentType]
        self._numbers = itertools.count(1)
        self._streams: dict[core.ConnectionId, SessionStream] = {}
        self._store_watch: Task | None = None
        process.spawn(self.election.begin())
        process.spawn(self._tick())

    @property
    def name(self) -> str:
        return self.process.name

    @property
    def incarnation(self) -> Incarnation:
        return self._candidate.incarnation

    @property
    def term(self) -> Term | None:
        return self.state.term if self.state is not None else None

    # ------------------------------------------------------------ sessions

    def accept(self, side: Side) -> None:
        SessionStream(self, side)

    def connect(self, stream: SessionStream, hello: WorkerHello | GatewayHello) -> core.ConnectionId:
        connection = core.ConnectionId(next(self._numbers))
        self._streams[connection] = stream
        if isinstance(hello, WorkerHello):
            self._step(core.WorkerOpened(connection, hello))
        else:
            self._step(core.GatewayOpened(connection, hello))
        return connection

    def hand_in(self, term: Term, event: core.Event) -> None:
        if term == self.term:
            self._step(event)

    def disconnect(self, connection: core.ConnectionId, term: Term, *, worker: bool) -> None:
        self._streams.pop(connection, None)
        self.hand_in(term, core.WorkerClosed(connection) if worker else core.GatewayClosed(connection))

    def end(self) -> None:
        """The process leaves: no term, no session any more."""
        self._end_term(Reason(kind=ReasonKind.ADMIN, text="the process was stopped"))

    def take_wish(self, body: core.DrainAsked | core.UndrainAsked | core.CancelAsked | core.ApplyAsked) -> None:
        """An operator's; lost if this process does not lead."""
        self._step(core.AdminAsked(core.AskId(next(self._numbers)), body))

    # ------------------------------------------------------------ terms

    def _heard(self, event: ElectionEvent) -> None:
        # As through a mailbox: after what is being done now.
        self.process.soon(self._take, event)

    def _take(self, event: ElectionEvent) -> None:
        match event:
            case Won(term):
                self._begin_term(term)
            case Lost(reason):
                self._end_term(reason)
            case Muted():
                self._step(core.LeaseMuted())
            case Heard():
                self._step(core.LeaseHeard())

    def _begin_term(self, term: Term) -> None:
        assert self.state is None, "a term begins while another runs"
        self.state = ClusterState.new(
            term=term,
            name=self.name,
            incarnation=self._candidate.incarnation,
            cluster=self._cluster,
            timings=self.timings,
            limits=self._limits,
            rng_seed=self.process.kernel.random.getrandbits(64),
            address=self._candidate.address,
        )
        self.won_at = self.process.now()
        self._watcher.term_begun(self)
        self._store_watch = self.process.spawn(self._follow_store(term))

    def _end_term(self, reason: Reason) -> None:
        if self.state is None:
            return
        self._watcher.term_ended(self, reason)
        self.state = None
        if self._store_watch is not None:
            self._store_watch.cancel()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.close()

    async def _follow_store(self, term: Term) -> None:
        view = StoreView(self._keys, self.name)

        def take(batch: WatchBatch) -> None:
            for event in view.take(batch):
                self._store_said(term, event)

        await SimPrefixWatch(self._client, self._keys.prefix, self.timings, self._random).follow(take)

    def _store_said(self, term: Term, event: StoreEvent) -> None:
        if isinstance(event, PlacementChanged):
            return
        self.hand_in(term, event)
        if not isinstance(event, core.StoreLoaded):
            return
        initial, known = self._initial, event.deployments.keys() | event.deleted
        if initial is not None and initial.deployment not in known:
            self.hand_in(term, core.AdminAsked(core.AskId(next(self._numbers)), core.ApplyAsked(initial)))

    async def _tick(self) -> None:
        while True:
            await self.process.sleep(self.timings.heartbeat_interval)
            self._step(core.Tick())

    # ------------------------------------------------------------ the core

    def _step(self, event: core.Event) -> None:
        state = self.state
        if state is None:
            return
        effects = self._watcher.leader_step(self, event, lambda: step(state, event, self.process.now()))
        for effect in effects:
            self._perform(effect, state.term)

    def _perform(self, effect: core.Effect, term: Term) -> None:
        match effect:
            case core.SendWorker() | core.SendGateway():
                if stream := self._streams.get(effect.connection):
                    stream.send(effect.body)
            case core.CloseConnection():
                if stream := self._streams.pop(effect.connection, None):
                    stream.close()
            case core.Recorded() | core.AdminAnswered():
                pass
            case core.StepDown():
                self.process.spawn(self.election.step_down(effect.reason, effect.pause_s, effect.highest_term))
            case core.Probe():
                self.process.spawn(self._probe(effect, term))
            case core.RevokeLease():
                self.process.spawn(self._revoke(effect, term))
            case core.WritePlacement() | core.DeletePlacement() | core.WriteDeployment() | core.DeleteDeployment():
                self.process.spawn(self._write(effect, term))
            case _:
                assert_never(effect)

    async def _probe(self, probe: core.Probe, term: Term) -> None:
        refused = await refused_twice(self.process, self.network, probe.address, self.timings)
        self.hand_in(term, core.ProbeDone(probe.node, probe.incarnation, refused))

    async def _revoke(self, revoke: core.RevokeLease, term: Term) -> None:
        ok = False
        try:
            if self.election.trusted:
                await self._store.revoke_lease(revoke.lease_id)
                ok = True
        except Retryable:
            pass
        self.hand_in(term, core.RevokeDone(revoke.node, revoke.incarnation, ok))

    async def _write(
        self,
        effect: core.WritePlacement | core.DeletePlacement | core.WriteDeployment | core.DeleteDeployment,
        term: Term,
    ) -> None:
        try:
            match effect:
                case core.WritePlacement():
                    ok = await self._store.write_placement(effect.record)
                case core.DeletePlacement():
                    ok = await self._store.delete_placement(effect.replica)
                case core.WriteDeployment():
                    ok = await self._store.write_deployment(effect.record)
                case core.DeleteDeployment():
                    ok = await self._store.delete_deployment(effect.deployment)
            reason = None if ok else Reason(kind=ReasonKind.NOT_LEADER, text="the leader key is another's")
        except (Retryable, FencedError) as error:
            ok, reason = False, error.reason
        self.hand_in(term, core.WriteDone(effect.write, ok, reason))
