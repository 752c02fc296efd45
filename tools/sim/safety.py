"""Safety, checked after every step of every core by someone who sees what goes in and out, and the whole world."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from controlplane.core import messages as leader_core
from controlplane.runtime.etcd_types import Get, Put, Target, Txn
from controlplane.runtime.ids import Term
from controlplane.runtime.keys import Keys
from controlplane.runtime.messages.common import Reason
from dataplane.core import messages as worker_core
from tools.sim.duties import Duties
from tools.sim.engine import BLOCKS
from tools.sim.safety_gateway import GatewaySafety
from tools.sim.safety_leader import LeaderSafety
from tools.sim.safety_worker import WorkerSafety
from tools.sim.telling import tell_recorded, tell_request
from tools.sim.watching import Act

if TYPE_CHECKING:
    from tools.sim.gateway import SimGateway
    from tools.sim.leader import SimCoordinator
    from tools.sim.worker import SimWorker
    from tools.sim.world import ControlPlane, World

VALUE_BYTES_MAX = 4096


class Safety:
    """Watches every step; an assertion that fails ends the run."""

    def __init__(self, world: World, keys: Keys) -> None:
        self._world = world
        self._keys = keys
        self._leaders = LeaderSafety(world)
        self._gateways: dict[str, GatewaySafety] = {}
        self._workers = WorkerSafety(world)
        self._terms: dict[Term, str] = {}

    # ------------------------------------------------------------ terms and etcd

    def term_begun(self, leader: SimCoordinator) -> None:
        assert leader.term is not None
        other = self._terms.setdefault(leader.term, leader.incarnation)
        # After a restore a term may come again if nobody who stands for election knows of it; workers then refuse it.
        unique = other == leader.incarnation or self._world.etcd.restores > 0
        assert unique, f"term {leader.term} has two leaders"
        self._leaders.duties[leader.incarnation] = Duties(leader.term)
        self._world.kernel.tell(leader.name, "leads", term=leader.term)

    def term_ended(self, leader: SimCoordinator, reason: Reason) -> None:
        self._leaders.duties.pop(leader.incarnation, None)
        self._world.kernel.tell(leader.name, "leads_no_more", term=leader.term, reason=reason.text)

    def process_died(self, control_plane: ControlPlane) -> None:
        self._leaders.duties.pop(control_plane.coordinator.incarnation, None)

    def txn(self, txn: Txn, succeeded: bool) -> None:
        """A leader's writes are guarded by the leader key's value; nothing stands in etcd for a request."""
        writes = [op for op in (txn.success if succeeded else txn.failure) if not isinstance(op, Get)]
        for op in writes:
            if op.key.startswith((self._keys.placements, self._keys.deployments, self._keys.deleted)):
                guarded = any(one.key == self._keys.leader and one.target is Target.VALUE for one in txn.when)
                assert guarded, f"{op.key} is written without the leader's guard"
            else:
                singles = (self._keys.leader, self._keys.term, self._keys.cluster)
                named = op.key.startswith((self._keys.peers, self._keys.nodes))
                assert op.key in singles or named, op.key
                if isinstance(op, Put) and (named or op.key == self._keys.leader):
                    assert op.lease, f"{op.key} is put under no lease"
            assert len(getattr(op, "value", b"")) <= VALUE_BYTES_MAX, f"{op.key} grows"

    # ------------------------------------------------------------ steps

    def leader_step(self, leader: SimCoordinator, event: Any, act: Act) -> list[Any]:
        effects = self._leaders.step(leader, event, act)
        for effect in effects:
            if isinstance(effect, leader_core.Recorded):
                tell_recorded(self._world.kernel, leader.name, effect)
        return effects

    def gateway_step(self, gateway: SimGateway, event: Any, act: Act) -> list[Any]:
        watch = self._gateways.setdefault(gateway.identity.incarnation, GatewaySafety(gateway))
        effects = watch.step(event, act)
        for effect in effects:
            tell_request(self._world.kernel, gateway.process.name, effect)
        return effects

    def worker_step(self, worker: SimWorker, event: Any, act: Act) -> list[Any]:
        effects = self._workers.step(worker, event, act)
        for effect in effects:
            if isinstance(effect, worker_core.Recorded):
                tell_recorded(self._world.kernel, worker.name, effect)
        return effects

    # ------------------------------------------------------------ in the end

    def leftovers(self) -> str | None:
        """What somebody still holds although nothing is asked of anyone."""
        for worker in self._world.workers.values():
            state = worker.state
            if state.sequences or state.requests or state.reservations or state.shadow_bytes:
                return f"{worker.name} holds {sorted(state.requests)[:3]}"
        for rank in self._world.house.all:
            engine = rank.engine if rank.alive else None
            if engine is not None and (engine.has_work or engine.scheduler.load().free_blocks != BLOCKS):
                return f"{rank.name} computes for nobody"
        leader = self._world.leader()
        if leader is not None and leader.state is not None:
            for replica in leader.state.replicas.values():
                if replica.load.outstanding or replica.load.sequences:
                    return f"the leader counts {replica.load.sequences} sequences on idle {replica.replica}"
        for gateway in self._world.gateways():
            if gateway.state.journals or gateway.state.journal_tokens or gateway.state.slots:
                return f"{gateway.process.name} keeps journals"
        return None
