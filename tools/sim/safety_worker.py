"""What a worker daemon must never do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from controlplane.runtime.ids import Incarnation, Term
from controlplane.runtime.messages.serve import (
    OpenRequest,
    ServeHeartbeat,
    SlotCursor,
    StepTokens,
    SyncReply,
    SyncSlots,
)
from controlplane.runtime.messages.session import Fenced, SessionRefused, WorkerWelcome
from dataplane import frames
from dataplane.core.messages import (
    GatewayOpened,
    GatewaySaid,
    LeaderSaid,
    RankSaid,
    SendGateway,
    SendLeader,
    SendRank,
    SpawnRank,
    TermSeen,
    Tick,
)
from dataplane.core.state import WorkerState
from tools.sim.watching import Act

if TYPE_CHECKING:
    from tools.sim.worker import SimWorker
    from tools.sim.world import World


class WorkerSafety:
    """Watches every daemon's steps."""

    def __init__(self, world: World) -> None:
        self._world = world
        # The highest term that each daemon was told of, and who led it there in each term.
        self._told: dict[Incarnation, Term] = {}
        self._leaders: dict[tuple[Incarnation, Term], Incarnation] = {}

    def step(self, worker: SimWorker, event: Any, act: Act) -> list[Any]:
        state = worker.state
        term = self._hear(worker.identity.incarnation, event)
        kept: set[int] = set()
        over = False
        match event:
            case GatewaySaid(stream, SyncSlots() as sync):
                holder = state.streams.get(stream)
                incarnation = holder.incarnation if holder is not None else ""
                kept = {cursor.slot for cursor in sync.slots if _is_held(state, incarnation, cursor)}
            case RankSaid(device, _, frames.StepDone() as done):
                replica = state.replicas.get(state.ranks[device].replica)
                over = replica is None or replica.epoch != done.epoch
            case _:
                pass
        effects = act()
        if not effects and isinstance(event, Tick):
            return effects
        state.check()
        self._judge(worker, event, effects, term, kept, over)
        if isinstance(event, LeaderSaid) and isinstance(event.body, WorkerWelcome):
            self._welcomed(worker, event.body)
        return effects

    def _hear(self, daemon: Incarnation, event: Any) -> Term:
        """The highest term that the daemon had been told of before the event."""
        before = self._told.get(daemon, Term(0))
        match event:
            case TermSeen(term):
                told = term
            case GatewayOpened(_, hello):
                told = hello.highest_term_seen
            case GatewaySaid(_, ServeHeartbeat() as beat):
                told = beat.highest_term_seen
            case LeaderSaid(_, _, WorkerWelcome() as welcome):
                told = welcome.term
            case LeaderSaid(_, _, SessionRefused() as refused):
                told = refused.highest_term
            case _:
                told = before
        self._told[daemon] = max(before, told)
        return before

    def _welcomed(self, worker: SimWorker, welcome: WorkerWelcome) -> None:
        """One leader's frames alone are accepted in a term."""
        leader = worker.state.leader
        if leader is not None and leader.session == welcome.session and leader.term == welcome.term:
            key = worker.identity.incarnation, welcome.term
            other = self._leaders.setdefault(key, welcome.leader)
            assert other == welcome.leader, f"{worker.name} obeys two leaders of term {welcome.term}"

    def _judge(self, worker: SimWorker, event: Any, effects: list[Any], term: int, kept: set[int], over: bool) -> None:
        stale = isinstance(event, LeaderSaid) and event.head.term < term
        if stale and not isinstance(event.body, SessionRefused | WorkerWelcome):
            _assert_fenced(effects, f"{type(event.body).__name__} of term {event.head.term} after term {term}")
        if isinstance(event, GatewaySaid) and isinstance(event.body, OpenRequest):
            _judge_open(worker.state, event.body, effects, term)
        for effect in effects:
            match effect:
                case SendGateway(_, SyncReply() as reply):
                    assert not kept & set(reply.unknown), f"slots {kept & set(reply.unknown)} are here and denied"
                case SendGateway(_, StepTokens()):
                    assert not over, "tokens of an epoch that is over are sent"
                case SpawnRank(device):
                    assert worker.rank_on(device) is None, f"two processes for {device}"
                case _:
                    pass


def _assert_fenced(effects: list[Any], what: str) -> None:
    for effect in effects:
        fenced = isinstance(effect, SendLeader) and isinstance(effect.body, Fenced)
        assert fenced, f"{what} is obeyed: {type(effect).__name__}"


def _judge_open(state: WorkerState, body: OpenRequest, effects: list[Any], term: int) -> None:
    """A body runs on a valid permit alone."""
    permit = body.permit
    for effect in effects:
        if isinstance(effect, SendRank) and isinstance(effect.frame, frames.Submit):
            assert permit.term >= term, f"{permit.request} runs on a permit of term {permit.term} after term {term}"
            epoch = state.replicas[permit.replica].epoch
            assert permit.epoch == epoch, f"{permit.request} runs on a permit of epoch {permit.epoch} in epoch {epoch}"


def _is_held(state: WorkerState, incarnation: str, cursor: SlotCursor) -> bool:
    """The daemon can go on from the cursor."""
    request = state.requests.get(cursor.request)
    if request is None or request.attempt != cursor.attempt or request.incarnation != incarnation:
        return False
    return any(
        choice.index == cursor.choice
        and not choice.closed
        and choice.delivered <= cursor.next_index <= len(choice.tokens)
        for choice in request.choices
    )
