"""Where a request may run while nobody leads: on what the last leader's replica table says. Pure.

The worker is the last to judge: it admits such a permit only while it has no leader itself, and says FULL by itself
(PROTOCOL H2).
"""
# pyright: strict

from __future__ import annotations

from controlplane.gateway.journal import Journal
from controlplane.gateway.messages import WorkerKey
from controlplane.gateway.state import GatewayState, WorkerPhase
from controlplane.runtime.messages.common import Permit, PermitMode
from controlplane.runtime.messages.route import ReplicaEpoch, ReplicaRow, Routed

_ID_BASE = 16


def may_route(state: GatewayState, now: float) -> bool:
    """The leader has been gone for as long as its successor may take to be elected."""
    return not state.leader_up and state.leaderless_from is not None and now >= state.leaderless_from


def route(state: GatewayState, journal: Journal) -> Routed | None:
    """The less loaded of two replicas, as far as this gateway's own requests tell; None if there is none to ask."""
    rows = _candidates(state, journal)
    if not rows:
        return None
    # The request's id was drawn at random: it is all the chance that is needed.
    draw = int(journal.request, _ID_BASE) + journal.attempt
    first, second = rows[draw % len(rows)], rows[(draw // len(rows)) % len(rows)]
    row = min(first, second, key=lambda row: len(state.placed_at(_key(row))))
    permit = Permit(
        request=journal.request,
        attempt=journal.attempt,
        replica=row.replica,
        epoch=row.epoch,
        term=state.term,
        mode=PermitMode.LEADERLESS,
        solo=bool(journal.crashes),
        priority=journal.asked.priority,
    )
    return Routed(permit=permit, serve_address=row.serve_address, node=row.node)


def _candidates(state: GatewayState, journal: Journal) -> list[ReplicaRow]:
    """Ready replicas whose worker can be reached; those that were left before only if there are no others."""
    rows = [
        row
        for row in state.ready_rows()
        if row.deployment == journal.asked.deployment
        and journal.asked.model_path in ("", row.model_path)
        and _is_up(state, WorkerKey(row.serve_address))
    ]
    fresh = [row for row in rows if _key(row) not in journal.exclude]
    return sorted(fresh or rows, key=lambda row: row.replica)


def _is_up(state: GatewayState, key: WorkerKey) -> bool:
    worker = state.workers.get(key)
    return worker is not None and worker.phase == WorkerPhase.UP


def _key(row: ReplicaRow) -> ReplicaEpoch:
    return ReplicaEpoch(replica=row.replica, epoch=row.epoch)
