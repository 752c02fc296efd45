"""The worker daemon's one mutator: `step(state, event, now) -> effects`."""

from __future__ import annotations

from controlplane.runtime.timing import Timings
from dataplane.core import drain, endings, gateways, groups, health, leader, ranks, starvation, weights
from dataplane.core.messages import (
    DevicesRead,
    Effect,
    Event,
    GatewayClosed,
    GatewayOpened,
    GatewaySaid,
    GatewayWritable,
    LeaderClosed,
    LeaderOpened,
    LeaderSaid,
    LeaseGone,
    LeaseGranted,
    RankExited,
    RankForked,
    RankSaid,
    Recorded,
    StopAsked,
    TermSeen,
    Tick,
)
from dataplane.core.state import Identity, Limits, Rank, Turn, WorkerState
from dataplane.core.terms import see_term


def begin(identity: Identity, timings: Timings, now: float, limits: Limits | None = None) -> WorkerState:
    """The state of a fresh daemon: no ranks yet, no leader; its first Tick forks a rank a device."""
    state = WorkerState(identity=identity, timings=timings, limits=limits or Limits(), started=now)
    state.last_heartbeat = now
    for device in identity.devices:
        state.ranks[device.id] = Rank(device.id, spawn_at=now)
    return state


def step(state: WorkerState, event: Event, now: float) -> list[Effect]:
    """Take one event in, and say what is to be done for it, in order."""
    turn = Turn(state, now)
    _dispatch(turn, event)
    return turn.effects


def _dispatch(turn: Turn, event: Event) -> None:
    match event:
        case RankSaid():
            ranks.on_said(turn, event)
        case GatewayWritable():
            gateways.on_writable(turn, event)
        case GatewaySaid():
            gateways.on_said(turn, event)
        case LeaderSaid():
            leader.on_said(turn, event)
        case Tick():
            _tick(turn, event)
        case _:
            _dispatch_rare(turn, event)


def _dispatch_rare(turn: Turn, event: Event) -> None:
    match event:
        case LeaderOpened():
            leader.on_opened(turn, event)
        case LeaderClosed():
            leader.on_closed(turn, event)
        case GatewayOpened():
            gateways.on_opened(turn, event)
        case GatewayClosed():
            gateways.on_closed(turn, event)
        case RankForked():
            ranks.on_forked(turn, event)
        case RankExited():
            ranks.on_exited(turn, event)
        case LeaseGranted():
            turn.state.lease_id = event.lease_id
        case DevicesRead():
            health.on_read(turn, event)
        case LeaseGone():
            # Whether this node was taken for dead, and which of its epochs are over, is the leader's to say.
            turn.emit(Recorded("lease_gone"))
        case TermSeen():
            see_term(turn, event.term, event.address)
        case StopAsked():
            drain.leave(turn, event.reason)
        case _:
            raise AssertionError(f"unknown event {event}")


def _tick(turn: Turn, event: Tick) -> None:
    state = turn.state
    _notice_pause(turn)
    state.last_tick, state.loop_lag = turn.now, event.loop_lag
    starvation.count(turn, event)
    for device, sample in event.samples.items():
        state.ranks[device].sample = sample
    leader.lapse(turn)
    groups.fail_late_stages(turn)
    weights.kill_stuck(turn)
    endings.kill_holders(turn)
    ranks.spawn_due(turn)
    gateways.expire(turn)
    gateways.beat(turn)
    drain.proceed(turn)
    leader.beat_if_due(turn)


def _notice_pause(turn: Turn) -> None:
    """Time since the last tick in which this daemon did not run (a stopped process, a paused machine) proves nothing
    about others: stages get it back."""
    state = turn.state
    if state.last_tick is None or turn.now - state.last_tick <= state.timings.session_silence:
        return
    paused = turn.now - state.last_tick
    turn.emit(Recorded("pause_noticed", details={"seconds": f"{paused:.2f}"}))
    for replica in state.replicas.values():
        replica.deadline = replica.deadline and replica.deadline + paused
    for rank in state.ranks.values():
        rank.let_go_by = rank.let_go_by and rank.let_go_by + paused
        if rank.preload is not None:
            rank.preload.moved += paused
