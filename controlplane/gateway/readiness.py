"""Can a request be served now? Answered from the leader session, the replica table and what workers say. Pure."""
# pyright: strict

from __future__ import annotations

from collections.abc import Callable

from controlplane.gateway.messages import WorkerKey
from controlplane.gateway.state import GatewayState
from controlplane.runtime.messages.route import ReplicaEpoch, ReplicaRow


def readiness(
    state: GatewayState,
    now: float,
    *,
    leaderless_for: float,
    heard_at: Callable[[WorkerKey], float | None],
) -> tuple[bool, str]:
    """True if at least one READY replica moved lately, or is idle and its daemon answers; else why not. What cannot be
    done beside serving is said in both cases.

    `leaderless_for`: seconds without a leader session. `heard_at`: when the worker's live stream last carried a frame,
    None without one. A replica that hangs in a prefill is closed by the leader, who counts its steps.
    """
    serves, why = _serves(state, now, heard_at)
    if leaderless_for > state.timings.session_silence:
        # Requests go by the last replica table meanwhile.
        why += f"; no leading coordinator for {leaderless_for:.1f} s"
    elif state.frozen:
        why += "; the leading coordinator cannot use etcd: it routes, but places nothing"
    return serves, why


def _serves(state: GatewayState, now: float, heard_at: Callable[[WorkerKey], float | None]) -> tuple[bool, str]:
    timings = state.timings
    ready = state.ready_rows()
    if not ready:
        phases = sorted({row.phase.name.lower() for row in state.rows.values()})
        return False, f"no replica is ready ({', '.join(phases)})" if phases else "no replica exists"
    why = ""
    for row in ready:
        heard = heard_at(WorkerKey(row.serve_address))
        if heard is None or now - heard > timings.session_silence:
            why = f"the worker of replica {row.replica} at {row.serve_address} does not answer"
            continue
        moved = _moved_at(state, row)
        if moved is not None and now - moved > timings.failure_timeout:
            why = f"replica {row.replica} has made no progress for {now - moved:.1f} s"
            continue
        return True, f"replica {row.replica} can serve"
    return False, why


def _moved_at(state: GatewayState, row: ReplicaRow) -> float | None:
    """When a token last came from a request that decodes there; None if none of ours does."""
    key = ReplicaEpoch(replica=row.replica, epoch=row.epoch)
    return max(
        (journal.moved_at for journal in state.placed_at(key) if not journal.finished and journal.moved_at is not None),
        default=None,
    )
