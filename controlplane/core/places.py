"""Which replicas stand on which nodes, which devices they hold, and which wait for a place or drain.

Kept beside ClusterState.replicas, so that an event costs by what it concerns and not by the size of the cluster; with
1,000 nodes, looking through all replicas at each event was most of the leader's work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from controlplane.core.entities import GIVEN_UP, Replica
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId
from controlplane.runtime.messages.common import Member, ReplicaPhase

_WAITING = frozenset({ReplicaPhase.CLOSED, ReplicaPhase.HELD})


@dataclass(slots=True)
class Places:
    """An index of replicas. `note` one after each change of its phase or members."""

    # Without a place, and draining.
    homeless: dict[ReplicaId, Replica] = field(default_factory=dict[ReplicaId, Replica])
    draining: dict[ReplicaId, Replica] = field(default_factory=dict[ReplicaId, Replica])
    # DEGRADED, FAILED, or too large for their devices' memory.
    given_up: dict[ReplicaId, Replica] = field(default_factory=dict[ReplicaId, Replica])
    # Nodes with a device that no replica holds, and perhaps some that are full. Also to be told of those that come.
    roomy: dict[NodeId, None] = field(default_factory=dict[NodeId, None], compare=False)
    _on: dict[NodeId, dict[ReplicaId, Replica]] = field(default_factory=dict[NodeId, dict[ReplicaId, Replica]])
    # Devices held, and by whom: etcd may say of two that they do, until their workers tell.
    _holders: dict[NodeId, set[tuple[str, ReplicaId]]] = field(default_factory=dict[NodeId, set[tuple[str, ReplicaId]]])
    _siblings: Counter[tuple[DeploymentId, NodeId]] = field(default_factory=Counter[tuple[DeploymentId, NodeId]])
    # What each replica was noted with.
    _members: dict[ReplicaId, tuple[Member, ...]] = field(default_factory=dict[ReplicaId, tuple[Member, ...]])
    _held: dict[ReplicaId, tuple[Member, ...]] = field(default_factory=dict[ReplicaId, tuple[Member, ...]])

    def note(self, replica: Replica) -> None:
        """Take the replica as it is now."""
        name = replica.replica
        if self._members.get(name, ()) is not replica.members:
            self._stand(replica, replica.members)
        held = replica.members if replica.holds_devices else ()
        if self._held.get(name, ()) is not held:
            self._hold(replica, held)
        _keep(self.homeless, replica, kept=replica.phase in _WAITING)
        _keep(self.draining, replica, kept=replica.drain is not None)
        _keep(self.given_up, replica, kept=replica.phase in GIVEN_UP or replica.oom_ranks > 0)

    def forget(self, replica: Replica) -> None:
        """The replica is no more."""
        self._stand(replica, ())
        self._hold(replica, ())
        for index in (self.homeless, self.draining, self.given_up):
            index.pop(replica.replica, None)

    def on(self, node: NodeId) -> list[Replica]:
        """Replicas that have ranks on the node, or had their last ones there."""
        return list(self._on.get(node, {}).values())

    def taken(self, node: NodeId) -> set[str]:
        """Devices of the node that a replica holds."""
        return {device for device, _ in self._holders.get(node, ())}

    @property
    def siblings(self) -> Mapping[tuple[DeploymentId, NodeId], int]:
        """How many replicas of each deployment hold devices of a node."""
        return self._siblings

    def _stand(self, replica: Replica, members: tuple[Member, ...]) -> None:
        for node in _nodes(self._members.pop(replica.replica, ())):
            del self._on[node][replica.replica]
            if not self._on[node]:
                del self._on[node]
        for node in _nodes(members):
            self._on.setdefault(node, {})[replica.replica] = replica
        if members:
            self._members[replica.replica] = members

    def _hold(self, replica: Replica, members: tuple[Member, ...]) -> None:
        name, before = replica.replica, self._held.pop(replica.replica, ())
        for member in before:
            self._holders[member.node].discard((member.device, name))
        for node in _nodes(before):
            self.roomy[node] = None
            self._siblings[replica.deployment, node] -= 1
            if not self._holders[node]:
                del self._holders[node]
            if not self._siblings[replica.deployment, node]:
                del self._siblings[replica.deployment, node]
        for member in members:
            self._holders.setdefault(member.node, set()).add((member.device, name))
        for node in _nodes(members):
            self._siblings[replica.deployment, node] += 1
        if members:
            self._held[name] = members


def _nodes(members: tuple[Member, ...]) -> dict[NodeId, None]:
    return dict.fromkeys(member.node for member in members)


def _keep(index: dict[ReplicaId, Replica], replica: Replica, *, kept: bool) -> None:
    if kept:
        index[replica.replica] = replica
    else:
        index.pop(replica.replica, None)
