"""`perdure ctl rollout restart`: every daemon ended in order and awaited back, one after the other, under load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from protos.perdure.v1 import admin_pb2, common_pb2
from tools.ctl.client import CALL_TIMEOUT_S, CtlError, admin

POLL_S = 0.5

Say = Callable[[str], None]
Status = admin_pb2.StatusResponse


@dataclass(frozen=True, slots=True)
class Restart:
    """What is restarted, and how."""

    # Of control planes, each of which is asked to leave by itself.
    addresses: list[str]
    # None: all live ones.
    nodes: list[str] | None
    controlplanes: bool
    # Running streams move after so long; 0: the cluster's default.
    deadline_s: float
    # For each to be back.
    timeout_s: float


def restart(plan: Restart, say: Say) -> None:
    """Workers first, then control planes, the leader last. Raises CtlError at the first that does not come back."""
    before = _status(plan.addresses)
    known = {node.id: node.incarnation for node in before.nodes if node.phase == admin_pb2.NODE_PHASE_LIVE}
    for node in plan.nodes or []:
        if node not in known:
            raise CtlError(f"no live node {node}: {', '.join(sorted(known)) or 'there are none'}")
    for node in sorted(known) if plan.nodes is None else plan.nodes:
        _restart_worker(plan, before, node, known[node], say)
    if plan.controlplanes:
        for address in _in_order(plan.addresses, before, say):
            _restart_controlplane(plan, before, address, say)


def _restart_worker(plan: Restart, before: Status, node: str, incarnation: str, say: Say) -> None:
    say(f"{node}: draining")
    with admin(plan.addresses) as stub:
        request = admin_pb2.DrainRequest(node=node, deadline_ms=round(plan.deadline_s * 1000), exit=True)
        stub.Drain(request, timeout=CALL_TIMEOUT_S)

    def lacking() -> str:
        status = _status(plan.addresses)
        row = next((row for row in status.nodes if row.id == node), None)
        if row is None:
            return "the node is gone"
        if row.incarnation == incarnation or row.phase != admin_pb2.NODE_PHASE_LIVE:
            return f"the node is {admin_pb2.NodePhase.Name(row.phase).removeprefix('NODE_PHASE_').lower()}"
        return _lacking(status, before)

    _await(node, lacking, plan.timeout_s)
    say(f"{node}: restarted, {_ready(before)} replicas ready")


def _in_order(addresses: list[str], before: Status, say: Say) -> list[str]:
    """The leader last, so that at most one more has to be elected. Says whom nobody can ask."""
    names = {address: _status([address]).answered_by for address in addresses}
    for gateway in before.gateways:
        if gateway.id not in names.values():
            say(f"{gateway.id}: left alone, for its address was not given")
    return sorted(addresses, key=lambda address: names[address] == before.leader.id)


def _restart_controlplane(plan: Restart, before: Status, address: str, say: Say) -> None:
    name = _status([address]).answered_by
    say(f"{name}: leaving")
    with admin([address]) as stub:
        left = stub.Leave(admin_pb2.LeaveRequest(), timeout=CALL_TIMEOUT_S).incarnation

    def lacking() -> str:
        status = _status([address])
        if status.answerer == left:
            return "its streams still end"
        return _lacking(status, before)

    _await(name, lacking, plan.timeout_s)
    say(f"{name}: restarted")


def _lacking(status: Status, before: Status) -> str:
    """What is less than it was; empty if nothing."""
    if not status.HasField("leader"):
        return "nobody leads"
    if len(status.gateways) < len(before.gateways):
        return f"{len(status.gateways)} of {len(before.gateways)} gateways are there"
    if _ready(status) < _ready(before):
        return f"{_ready(status)} of {_ready(before)} replicas are ready"
    return ""


def _await(name: str, lacking: Callable[[], str], timeout_s: float) -> None:
    """Wait until nothing is lacking any more. Raises CtlError."""
    deadline = time.monotonic() + timeout_s
    seen = "no answer"
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        try:
            seen = lacking()
        except CtlError as error:
            # Whoever restarts does not answer; a leader may change meanwhile.
            seen = str(error)
        if not seen:
            return
    hint = "is it started again when it exits?"
    raise CtlError(f"{name} did not come back within {timeout_s:g} s ({seen}); {hint} The others are left alone.")


def _status(addresses: list[str]) -> Status:
    with admin(addresses) as stub:
        return stub.Status(admin_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)


def _ready(status: Status) -> int:
    return sum(replica.phase == common_pb2.REPLICA_PHASE_READY for replica in status.replicas)
