"""Names of all keys in etcd (records.py says what stands under each)."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.runtime.errors import invalid
from controlplane.runtime.ids import DeploymentId, NodeId, ReplicaId


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one cluster. Raises Rejected for a name that would leave its own folder."""

    cluster_name: str

    def __post_init__(self) -> None:
        _check("cluster", self.cluster_name)

    @property
    def prefix(self) -> str:
        return f"/perdure/{self.cluster_name}/"

    @property
    def cluster(self) -> str:
        return f"{self.prefix}cluster"

    @property
    def term(self) -> str:
        return f"{self.prefix}term"

    @property
    def leader(self) -> str:
        return f"{self.prefix}leader"

    @property
    def peers(self) -> str:
        return f"{self.prefix}controlplanes/"

    @property
    def nodes(self) -> str:
        return f"{self.prefix}nodes/"

    @property
    def deployments(self) -> str:
        return f"{self.prefix}deployments/"

    @property
    def deleted(self) -> str:
        """Below it, the names of deployments that an operator deleted, without content."""
        return f"{self.prefix}deleted/"

    @property
    def placements(self) -> str:
        return f"{self.prefix}placements/"

    def peer(self, name: str) -> str:
        return self.peers + _check("control plane", name)

    def node(self, node: NodeId) -> str:
        return self.nodes + _check("node", node)

    def deployment(self, deployment: DeploymentId) -> str:
        return self.deployments + _check("deployment", deployment)

    def deleted_deployment(self, deployment: DeploymentId) -> str:
        return self.deleted + _check("deployment", deployment)

    def placement(self, replica: ReplicaId) -> str:
        return self.placements + _check("replica", replica)


def _check(what: str, name: str) -> str:
    if not name or "/" in name or not name.isascii() or not name.isprintable():
        raise invalid(f"{what} name {name!r}: printable ASCII without '/', not empty")
    return name
