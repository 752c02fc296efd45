"""What gateways say: their streams, bodies, cursors and ends (PROTOCOL §4 Serve, §5 "sequence (worker)")."""

from __future__ import annotations

from controlplane.runtime.ids import GatewayId
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import (
    CancelSlots,
    EndRequests,
    FinishReason,
    OpenRequest,
    ResumeRequest,
    ServeHeartbeat,
    ServeHello,
    SyncSlots,
    WorkerDraining,
)
from dataplane.core import bodies, drain
from dataplane.core.cursors import flush, mark, send
from dataplane.core.messages import CloseGateway, GatewayClosed, GatewayOpened, GatewaySaid, GatewayWritable
from dataplane.core.shadows import drop, finish_choice, orphan, stop_choices
from dataplane.core.state import Request, Stream, Turn
from dataplane.core.sync import resume, sync
from dataplane.core.terms import see_term


def on_opened(turn: Turn, event: GatewayOpened) -> None:
    """A gateway's stream with its Hello; an older stream of the same process is over."""
    state, hello = turn.state, event.hello
    if hello.cluster != state.identity.cluster:
        text = f"this is cluster {state.identity.cluster}, not {hello.cluster}"
        turn.emit(CloseGateway(event.stream, Reason(kind=ReasonKind.INVALID, text=text)))
        return
    see_term(turn, hello.highest_term_seen, hello.leader_address)
    for other in [other for other in state.streams.values() if other.incarnation == hello.incarnation]:
        turn.emit(CloseGateway(other.stream, Reason(kind=ReasonKind.SUPERSEDED, text="the gateway opened another")))
        _forget_stream(turn, other)
    stream = Stream(event.stream, GatewayId(hello.name), hello.incarnation)
    state.streams[event.stream] = stream
    send(turn, stream, _hello(turn))
    if state.draining:
        send(turn, stream, WorkerDraining(deadline_ms=drain.budget_ms(turn)))


def on_closed(turn: Turn, event: GatewayClosed) -> None:
    stream = turn.state.streams.get(event.stream)
    if stream is not None:
        _forget_stream(turn, stream)


def on_writable(turn: Turn, event: GatewayWritable) -> None:
    stream = turn.state.streams.get(event.stream)
    if stream is not None:
        stream.writable = True
        flush(turn, stream)


def on_said(turn: Turn, event: GatewaySaid) -> None:
    """One frame of a gateway. Frames of a stream that is over are dropped."""
    stream = turn.state.streams.get(event.stream)
    if stream is None:
        return
    match event.body:
        case OpenRequest() as body:
            bodies.open_request(turn, stream, body)
        case CancelSlots() as body:
            bodies.cancel(turn, stream, body)
        case EndRequests() as body:
            bodies.end(turn, stream, body)
        case SyncSlots() as body:
            sync(turn, stream, body)
        case ResumeRequest() as body:
            resume(turn, stream, body)
        case ServeHello() as body:
            see_term(turn, body.highest_term_seen, body.leader_address)


def _hello(turn: Turn) -> ServeHello:
    state = turn.state
    return ServeHello(
        cluster=state.identity.cluster,
        name=state.identity.node,
        incarnation=state.identity.incarnation,
        highest_term_seen=state.highest_term,
        leader_address=state.leader_address,
        heartbeat_interval_ms=round(state.timings.heartbeat_interval * 1000),
    )


def _forget_stream(turn: Turn, stream: Stream) -> None:
    del turn.state.streams[stream.stream]
    for request in turn.state.requests.values():
        if request.stream == stream.stream:
            orphan(turn, request)


def expire(turn: Turn) -> None:
    """Drop shadows whose grace is over; end what is past its deadline."""
    for request in list(turn.state.requests.values()):
        if request.expires is not None and turn.now >= request.expires:
            drop(turn, request)
        elif request.running and request.deadline is not None and turn.now >= request.deadline:
            _end_late(turn, request)


def _end_late(turn: Turn, request: Request) -> None:
    unfinished = [choice for choice in request.choices if not choice.done]
    stop_choices(turn, request, unfinished)
    error = Reason(kind=ReasonKind.DEADLINE, text="the request's time is over")
    for choice in unfinished:
        finish_choice(turn, request, choice, FinishReason.ERROR, error=error)
    if request.stream is not None:
        stream = turn.state.streams[request.stream]
        for choice in unfinished:
            mark(stream, choice)
        flush(turn, stream)


def beat(turn: Turn) -> None:
    """Something on every quiet stream each interval: a gateway takes silence for a loss."""
    state = turn.state
    for stream in state.streams.values():
        if stream.writable and turn.now - stream.last_sent >= state.timings.heartbeat_interval:
            send(turn, stream, _heartbeat(turn))


def tell_leader(turn: Turn) -> None:
    """Another leader was met: gateways that are cut off from etcd hear of it now."""
    for stream in turn.state.streams.values():
        if stream.writable:
            send(turn, stream, _heartbeat(turn))


def _heartbeat(turn: Turn) -> ServeHeartbeat:
    state = turn.state
    return ServeHeartbeat(highest_term_seen=state.highest_term, leader_address=state.leader_address)
