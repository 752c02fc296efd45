"""What a leader must never do, however it was led to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from controlplane.core.messages import (
    Recorded,
    RevokeLease,
    SendWorker,
    Tick,
    WorkerClosed,
)
from controlplane.core.state import ClusterState
from controlplane.runtime.ids import Epoch, NodeId, ReplicaId
from controlplane.runtime.messages.common import ReasonKind
from controlplane.runtime.messages.session import PrepareGroup
from tools.sim.duties import Duties
from tools.sim.watching import Act

if TYPE_CHECKING:
    from tools.sim.leader import SimCoordinator
    from tools.sim.world import World


class LeaderSafety:
    """Watches every leader's steps."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.duties: dict[str, Duties] = {}
        # Which life of a replica each epoch stands for.
        self._nonces: dict[tuple[ReplicaId, Epoch], str] = {}
        # When a leader's session with a node last ended.
        self._broke: dict[tuple[str, NodeId], float] = {}

    def step(self, leader: SimCoordinator, event: Any, act: Act) -> list[Any]:
        state = leader.state
        assert state is not None
        duties = self.duties[leader.incarnation]
        frozen, ticked = state.frozen, state.ticked
        spoke = _speaking(state)
        duties.before(event)
        effects = act()
        state.check()
        duties.after(event, effects, frozen=frozen and state.frozen)
        for node in spoke.keys() - _speaking(state).keys():
            self._broke[leader.incarnation, node] = self._world.kernel.now
        for effect in effects:
            match effect:
                case Recorded(name="node_lost", node=node, reason=reason) if reason is not None:
                    if reason.kind is ReasonKind.LEASE_EXPIRED:
                        # A session that ends with this very event does not speak any more.
                        self._lost(leader, state, node, {} if isinstance(event, WorkerClosed) else spoke)
                case Recorded(name="replica_closed", reason=reason) if reason is not None:
                    if reason.kind is ReasonKind.NO_PROGRESS:
                        self._hangs(state, effect)
                case RevokeLease(node=node):
                    self._revokes(leader, state, node)
                case SendWorker(_, PrepareGroup() as prepare):
                    nonce = self._nonces.setdefault((prepare.replica, prepare.epoch), prepare.nonce)
                    assert nonce == prepare.nonce, f"epoch {prepare.epoch} of {prepare.replica} is used twice"
                case _:
                    pass
        if isinstance(event, Tick) and ticked is not None:
            self._judges_pause(state, effects, state.now - ticked)
        return effects

    def _lost(self, leader: SimCoordinator, state: ClusterState, node: NodeId, spoke: dict[NodeId, float]) -> None:
        """A node is dead only without a session; by absence only after grace."""
        timings = state.timings
        silent = spoke.get(node)
        if silent is not None:
            assert silent + 2 * timings.heartbeat_interval >= timings.session_silence, (
                f"{node} speaks and is called dead"
            )
        held = leader.process.now() - leader.won_at
        assert held >= timings.leader_grace - timings.heartbeat_interval, (
            f"{node} is called dead {held:.2f} s into a term"
        )

    def _hangs(self, state: ClusterState, closed: Recorded) -> None:
        """No replica is called hung but for a rank that was."""
        since = self._world.kernel.now - state.timings.progress_deadline - 2 * state.timings.heartbeat_interval
        hung = self._world.house.hung(closed.replica, closed.epoch, since)
        assert hung, f"{closed.replica}@{closed.epoch} is called hung, and none of its ranks was"

    def _revokes(self, leader: SimCoordinator, state: ClusterState, node: NodeId) -> None:
        """Only with proof: since the session broke two connects in a row, a gap apart, were refused."""
        proof = self._world.network.proofs.get((leader.name, state.nodes[node].serve_address))
        broke = self._broke.get((leader.incarnation, node))
        proven = proof is not None and broke is not None and proof >= broke
        assert proven, f"the lease of {node} is revoked without proof of its death ({proof}, {broke})"

    def _judges_pause(self, state: ClusterState, effects: list[Any], elapsed: float) -> None:
        """A leader that was away itself finds nobody silent."""
        if elapsed <= 3 * state.timings.heartbeat_interval:
            return
        for effect in effects:
            if isinstance(effect, Recorded) and effect.reason is not None:
                silent = effect.reason.kind in (ReasonKind.SESSION_SILENT, ReasonKind.NO_PROGRESS)
                judged = effect.name in ("node_unreachable", "replica_closed", "node_lost")
                assert not (silent and judged), f"{effect.name} right after a pause of {elapsed:.1f} s"


def _speaking(state: ClusterState) -> dict[NodeId, float]:
    """Nodes with a session, and for how long each was silent."""
    return {node.node: node.silence_s for node in state.nodes.values() if node.link is not None}
