"""Whether waiting for a deployment helps, and why not."""

from __future__ import annotations

from dataclasses import replace

from controlplane.core.elastic import is_shrunk
from controlplane.core.entities import GIVEN_UP, Deployment, Replica
from controlplane.core.prediction import fits
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.route import RouteEntry


def runs(replica: Replica, entry: RouteEntry) -> bool:
    """The replica runs the model that the request was made for."""
    return not entry.model_path or replica.spec is None or replica.spec.model_path == entry.model_path


def replaced(deployment: Deployment, entry: RouteEntry) -> Reason | None:
    """Why no replica will ever go on with it: the deployment asks for another model, and none that takes requests runs
    the former one. Tokens of two models are nobody's answer."""
    wanted = deployment.record.spec.model_path
    if entry.model_path in ("", wanted):
        return None
    replicas = deployment.replicas.values()
    if any(runs(one, entry) and (one.phase is ReplicaPhase.READY or one.adopting) for one in replicas):
        return None
    text = f"{deployment.record.deployment} serves {wanted} now, in place of {entry.model_path}"
    return Reason(kind=ReasonKind.REPLACED, text=text)


def too_long(entry: RouteEntry, deployment: Deployment) -> Reason | None:
    """No replica will ever take it. A shrunk one proves nothing: what it has no room for waits until it grows back."""
    replicas = [replica for replica in deployment.replicas.values() if runs(replica, entry)]
    # Asked for every request: the first replica says yes, mostly.
    if any(replica.capacity is not None and fits(entry, replica.capacity) for replica in replicas):
        return None
    capacities = [replica.capacity for replica in replicas if replica.capacity is not None]
    if not capacities or any(is_shrunk(deployment.record, replica) for replica in replicas):
        return None
    largest = max(capacity.max_model_tokens for capacity in capacities)
    text = f"{entry.prompt_tokens} prompt tokens; a replica takes {largest or 'what its KV blocks hold'}"
    return Reason(kind=ReasonKind.INVALID, text=text)


def failed(deployment: Deployment) -> Reason | None:
    """Why no replica can come up, whatever anybody waits for."""
    first: Replica | None = None
    for replica in deployment.replicas.values():
        if not replica.retiring:
            if replica.phase is not ReplicaPhase.FAILED:
                return None
            first = first or replica
    if first is None or first.reason is None:
        return None
    return replace(first.reason, text=f"{first.replica} cannot come up: {first.reason.text}")


def hopeless(deployment: Deployment) -> Reason | None:
    """Why waiting will not help soon; None while a replica serves or comes up.

    Of kind NO_CAPACITY while a node's return would help: worth a wait of timings.node_return.
    """
    idle = GIVEN_UP | {ReplicaPhase.HELD}
    if any(replica.phase not in idle and not replica.retiring for replica in deployment.replicas.values()):
        return None
    replicas = [replica for replica in deployment.replicas.values() if not replica.retiring]
    for replica in replicas:
        if replica.phase is ReplicaPhase.HELD:
            text = replica.reason.text if replica.reason else f"{replica.replica} waits for its nodes"
            return Reason(kind=ReasonKind.NO_CAPACITY, text=text)
    for replica in replicas:
        text = replica.reason.text if replica.reason else ""
        return Reason(kind=ReasonKind.GROUP_FAILED, text=f"{replica.replica} is {replica.phase.name.lower()}: {text}")
    text = f"{deployment.record.deployment} has no replicas"
    # right after a deployment was made its replicas are still to be planned
    kind = ReasonKind.NO_CAPACITY if deployment.record.replicas else ReasonKind.ADMIN
    return Reason(kind=kind, text=text)
