"""Random orders of everything that can happen, with the invariants and the ordering duties checked after each step.
In the end the world is healed, and what is wanted must come to be."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from controlplane.core.entities import LeaderPhase, NodePhase
from controlplane.core.messages import (
    AdminAsked,
    ApplyAsked,
    AskId,
    DrainAsked,
    LeaseHeard,
    LeaseMuted,
    UndrainAsked,
)
from controlplane.runtime.ids import Attempt, DeploymentId, NodeId, RequestId
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.messages.route import (
    EndBatch,
    EndEntry,
    Outcome,
    RouteBatch,
)
from tests.scenario.coordinator.journals import Journals
from tests.scenario.coordinator.model import Cluster
from tests.scenario.coordinator.peers import GatewayPeer, Worker, deployment, entry

WORKERS = ("w1", "w2", "w3")
DEVICES = 2
TICKS_OF_GRACE = 9
# A shrunk replica grows once its devices have been there for 10 F, one after the other.
TICKS_TO_HEAL = 150


class RandomOrders(RuleBasedStateMachine):
    cluster: Cluster
    gateway: GatewayPeer
    journals: Journals

    @initialize(
        replicas=st.integers(1, 3),
        tensor=st.integers(1, 2),
        elastic=st.booleans(),
        spares=st.integers(0, 3),
        workers=st.integers(0, 3),
        calm=st.booleans(),
    )
    def start(self, replicas: int, tensor: int, elastic: bool, spares: int, workers: int, calm: bool) -> None:
        self.cluster = Cluster()
        self.journals = Journals()
        self.cluster.watch = self.journals.take
        self.cluster.deployments[DeploymentId("m")] = deployment(
            replicas=replicas, tensor=tensor, elastic=elastic, spares=spares
        )
        self.cluster.load()
        self.requests = 0
        self.gateway = self.cluster.add_gateway("g1")
        for name in WORKERS[:workers]:
            self.worker_comes(name)
        self.cluster.settle()
        if calm:
            for _ in range(TICKS_OF_GRACE):
                self.cluster.tick()

    @invariant()
    def gateway_knows_what_ended(self) -> None:
        """A connected gateway was told of every end of an epoch that it placed requests on."""
        state = self.cluster.state
        if self.gateway.connection is None or state.over:
            return
        for name, epoch in self.journals.placed.values():
            replica = state.replicas.get(name)
            assert replica is not None, f"{name} went without a word"
            assert replica.epoch == epoch, f"{name} went from {epoch} to {replica.epoch} without a word"
            assert replica.holds_devices, f"{name} was closed without a word"

    # ------------------------------------------------------------ workers

    def connected(self) -> list[Worker]:
        return [worker for worker in self.cluster.workers.values() if worker.session and worker.connection is not None]

    @rule(name=st.sampled_from(WORKERS))
    def worker_comes(self, name: str) -> None:
        known = self.cluster.workers.get(NodeId(name))
        if known is None or not known.alive:
            if NodeId(name) in self.cluster.keys:
                return  # the name is taken until the lease of the dead one is gone
            fresh = self.cluster.add_worker(name, DEVICES)
            self.cluster.register(fresh)
            self.cluster.attach(fresh)
        elif known.connection is None and not known.stopped:
            if known.node not in self.cluster.keys:
                self.cluster.register(known)
            self.cluster.attach(known)

    @precondition(lambda self: self.connected())
    @rule(data=st.data(), settles=st.booleans())
    def worker_dies(self, data: st.DataObject, settles: bool) -> None:
        self.cluster.kill(data.draw(st.sampled_from(self.connected())))
        if settles:
            self.cluster.settle()

    @precondition(lambda self: self.connected())
    @rule(data=st.data(), refuses=st.booleans(), settles=st.booleans(), unnoticed=st.booleans())
    def worker_stream_breaks(self, data: st.DataObject, refuses: bool, settles: bool, unnoticed: bool) -> None:
        worker = data.draw(st.sampled_from(self.connected()))
        worker.refuses = refuses
        if unnoticed:
            self.cluster.attach(worker)
        else:
            self.cluster.break_stream(worker)
        if settles:
            self.cluster.settle()

    @precondition(lambda self: self.connected())
    @rule(data=st.data(), stops=st.booleans(), ticks=st.integers(0, 8))
    def worker_stops_or_goes_on(self, data: st.DataObject, stops: bool, ticks: int) -> None:
        data.draw(st.sampled_from(self.connected())).stopped = stops
        for _ in range(ticks):
            self.cluster.tick()

    @precondition(lambda self: any(worker.inbox and not worker.stopped for worker in self.connected()))
    @rule(data=st.data(), count=st.integers(1, 4))
    def worker_answers(self, data: st.DataObject, count: int) -> None:
        worker = data.draw(st.sampled_from([one for one in self.connected() if one.inbox and not one.stopped]))
        for _ in range(count):
            if worker.inbox and worker.connection is not None:
                self.cluster.answer_next(worker)

    @precondition(lambda self: any(worker.held for worker in self.connected()))
    @rule(data=st.data())
    def rank_exits(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from([one for one in self.connected() if one.held]))
        held = data.draw(st.sampled_from(sorted(worker.held)))
        device = data.draw(st.sampled_from(sorted(worker.held[held].devices)))
        self.cluster.rank_exits(worker, device)

    @precondition(lambda self: any(node.spares for node in self.cluster.state.nodes.values()))
    @rule(data=st.data(), exits=st.booleans())
    def spare_fails(self, data: st.DataObject, exits: bool) -> None:
        spares = [(worker, device) for worker in self.connected() for device in self._spares_of(worker)]
        if not spares:
            return
        worker, device = data.draw(st.sampled_from(spares))
        if exits:
            self.cluster.rank_exits(worker, device)
        else:
            worker.unwell.add(device)

    def _spares_of(self, worker: Worker) -> list[str]:
        node = self.cluster.state.nodes.get(worker.node)
        return [] if node is None else [device for device in sorted(node.spares) if device not in worker.down]

    @precondition(lambda self: any(worker.down for worker in self.connected()))
    @rule()
    def rank_comes_up(self) -> None:
        self.cluster.rank_comes_up(next(worker for worker in self.connected() if worker.down))

    @precondition(lambda self: self.cluster.keys)
    @rule(data=st.data())
    def lease_expires(self, data: st.DataObject) -> None:
        node = data.draw(st.sampled_from(sorted(self.cluster.keys)))
        worker = self.cluster.workers[node]
        self.cluster.lease_gone(node)
        if worker.alive and not worker.stopped and data.draw(st.booleans()):
            self.cluster.register(worker)

    @rule(replay=st.booleans())
    def all_answer(self, replay: bool) -> None:
        self.cluster.settle()
        if replay:
            self.replays_come()

    # ------------------------------------------------------------ etcd

    @precondition(lambda self: self.cluster.writes)
    @rule()
    def etcd_answers(self) -> None:
        self.cluster.write_next()

    @precondition(lambda self: self.cluster.probes)
    @rule()
    def probe_ends(self) -> None:
        self.cluster.probe_next()

    @precondition(lambda self: self.cluster.revokes)
    @rule()
    def revoke_ends(self) -> None:
        self.cluster.revoke_next()

    @rule(up=st.booleans(), ticks=st.integers(0, 3))
    def etcd_goes_or_comes(self, up: bool, ticks: int) -> None:
        self.cluster.etcd_up = up
        self.cluster.step(LeaseHeard() if up else LeaseMuted())
        for _ in range(ticks):
            self.cluster.tick()

    def watch_starts_over(self, restored: bool) -> None:
        self.cluster.load(restored=restored)

    # ------------------------------------------------------------ requests

    @rule(count=st.integers(1, 12), n=st.integers(1, 3), priority=st.integers(-1, 1))
    def requests_come(self, count: int, n: int, priority: int) -> None:
        if self.gateway.connection is None:
            return
        fresh = [RequestId(f"r{self.requests + index}") for index in range(count)]
        self.requests += count
        self.journals.attempts.update({request: Attempt(1) for request in fresh})
        entries = tuple(entry(request, n=n, priority=priority) for request in fresh)
        self.cluster.tell(self.gateway, RouteBatch(entries=entries))

    @rule()
    def replays_come(self) -> None:
        if self.gateway.connection is None or not self.journals.asking:
            return
        asking = dict(self.journals.asking)
        self.journals.asking.clear()
        entries = tuple(
            entry(request, attempt=self.journals.attempts[request], cause=cause) for request, cause in asking.items()
        )
        self.cluster.tell(self.gateway, RouteBatch(entries=entries))

    @precondition(lambda self: self.journals.attempts and self.gateway.connection is not None)
    @rule(data=st.data())
    def request_ends(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.journals.attempts)))
        attempt = self.journals.attempts.pop(request)
        self.journals.placed.pop(request, None)
        self.journals.asking.pop(request, None)
        ended = EndEntry(request=request, attempt=attempt, outcome=Outcome.FINISHED, tokens=3)
        self.cluster.tell(self.gateway, EndBatch(entries=(ended,)))

    def gateway_stream_changes(self) -> None:
        if self.gateway.connection is not None:
            self.cluster.close_gateway(self.gateway)
        else:
            self.cluster.open_gateway(self.gateway, self.journals.inventory())

    # ------------------------------------------------------------ operators, leaders, time

    def operator_drains(self, node: str, back: bool) -> None:
        body = UndrainAsked(NodeId(node)) if back else DrainAsked(NodeId(node), 1000)
        self.cluster.step(AdminAsked(AskId(1), body))

    def operator_applies(self, replicas: int, tensor: int, path: str, elastic: bool, spares: int) -> None:
        asked = deployment(replicas=replicas, tensor=tensor, path=path, elastic=elastic, spares=spares)
        self.cluster.step(AdminAsked(AskId(2), ApplyAsked(asked)))

    def leader_changes(self) -> None:
        self.cluster = self.cluster.successor()
        self.cluster.load()

    @rule(data=st.data(), what=st.sampled_from(("watch", "gateway", "drain", "apply", "leader")))
    def something_rare_happens(self, data: st.DataObject, what: str) -> None:
        match what:
            case "watch":
                self.watch_starts_over(data.draw(st.booleans()))
            case "gateway":
                self.gateway_stream_changes()
            case "drain":
                self.operator_drains(data.draw(st.sampled_from(WORKERS)), data.draw(st.booleans()))
            case "apply":
                paths = st.sampled_from(("/models/m", "/models/n"))
                replicas, tensor = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2))
                elastic, spares = data.draw(st.booleans()), data.draw(st.integers(0, 3))
                self.operator_applies(replicas, tensor, data.draw(paths), elastic, spares)
            case _:
                self.leader_changes()

    @rule(count=st.integers(1, 4), late=st.booleans())
    def time_passes(self, count: int, late: bool) -> None:
        for _ in range(count):
            self.cluster.tick()
        if late:
            self.cluster.tick(10.0)

    # ------------------------------------------------------------ the end

    def teardown(self) -> None:
        """Heal everything; then every wanted replica comes up and every request runs."""
        if not hasattr(self, "gateway"):
            return
        self._heal()
        state = self.cluster.state
        assert state.phase is LeaderPhase.LEADING
        assert all(node.phase is NodePhase.LIVE for node in state.nodes.values()), state.nodes
        record = state.deployments[DeploymentId("m")].record
        phases = {name: replica.phase for name, replica in state.replicas.items()}
        assert list(phases.values()) == [ReplicaPhase.READY] * record.replicas, phases
        assert all(replica.spec == record.spec for replica in state.replicas.values()), "one is shrunk without need"
        spares = [spare for node in state.nodes.values() for spare in node.spares.values()]
        free = DEVICES * len(WORKERS) - sum(len(replica.members) for replica in state.replicas.values())
        assert len(spares) == (min(record.spares, free) if record.replicas else 0)
        assert all(spare.ready and spare.spec == record.spec for spare in spares)
        if record.replicas:
            assert not state.deployments[DeploymentId("m")].queue
            assert self.journals.placed.keys() == self.journals.attempts.keys()

    def _heal(self) -> None:
        cluster = self.cluster
        cluster.etcd_up = True
        cluster.step(LeaseHeard())
        for name in WORKERS:
            worker = cluster.workers.get(NodeId(name))
            if worker is not None:
                worker.stopped = worker.refuses = worker.draining = False
                worker.unwell.clear()
            cluster.step(AdminAsked(AskId(3), UndrainAsked(NodeId(name))))
        # fewer requests than all windows hold, so that each can run
        for request in sorted(self.journals.attempts)[4:]:
            del self.journals.attempts[request]
            self.journals.placed.pop(request, None)
            self.journals.asking.pop(request, None)
        if self.gateway.connection is not None:
            cluster.close_gateway(self.gateway)
        for worker in cluster.workers.values():
            worker.assigned = {name: at for name, at in worker.assigned.items() if name in self.journals.attempts}
        for _ in range(TICKS_TO_HEAL):
            self._heal_step()
        asked = cluster.state.deployments[DeploymentId("m")].record
        cluster.step(AdminAsked(AskId(4), ApplyAsked(asked)))
        for _ in range(TICKS_TO_HEAL):
            self._heal_step()

    def _heal_step(self) -> None:
        for name in WORKERS:
            known = self.cluster.workers.get(NodeId(name))
            if known is not None and not known.alive and known.node in self.cluster.keys:
                self.cluster.lease_gone(known.node)
            self.worker_comes(name)
            if known is not None and known.alive and known.node not in self.cluster.keys:
                self.cluster.register(known)
        if self.gateway.connection is None:
            self.cluster.open_gateway(self.gateway, self.journals.inventory())
        self.replays_come()
        self.cluster.settle()
        self.cluster.tick()


RandomOrders.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRandomOrders = RandomOrders.TestCase
