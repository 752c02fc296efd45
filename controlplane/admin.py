"""Servicer of Admin: what people and programs ask of a cluster.

Any control-plane process answers. What only the leader knows is asked of it; without a leader `Status` still says what
this process sees, and everything else is UNAVAILABLE with the reason.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from controlplane.coordinator import Coordinator
from controlplane.core.messages import (
    AdminAnswered,
    ApplyAsked,
    CancelAsked,
    DeleteAsked,
    DrainAsked,
    ScaleAsked,
    UndrainAsked,
    Wish,
)
from controlplane.core.views import failures_view, requests_view, status_view
from controlplane.event_log import EventRecord
from controlplane.runtime.codec import WireError, codec_of
from controlplane.runtime.errors import Retryable
from controlplane.runtime.ids import DeploymentId, NodeId, RequestId
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.messages.common import ReasonKind
from controlplane.runtime.records import DeploymentRecord
from controlplane.runtime.timing import Timings, channel_options
from protos.perdure.v1 import admin_pb2, admin_pb2_grpc, common_pb2

Context = grpc.aio.ServicerContext[Any, Any]

_STATUS_OF = {
    ReasonKind.UNKNOWN_ID: grpc.StatusCode.NOT_FOUND,
    ReasonKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ReasonKind.NO_CAPACITY: grpc.StatusCode.FAILED_PRECONDITION,
    ReasonKind.STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ReasonKind.NOT_LEADER: grpc.StatusCode.UNAVAILABLE,
}


LEADERLESS = (
    "no control plane leads, as far as this one can see: gateways go on with the replicas that served last, but failed "
    "ones stay away, and no operator's change is taken"
)


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Answers from the coordinator where this process leads, else with what the leader's Admin answers."""

    def __init__(
        self, coordinator: Coordinator, leader: LeaderWatch, timings: Timings, leave: Callable[[], None]
    ) -> None:
        """`leave` has this process end in order."""
        self._coordinator = coordinator
        self._leader = leader
        self._timings = timings
        self._leave = leave

    async def Status(self, request: admin_pb2.StatusRequest, context: Context) -> Any:
        view = self._coordinator.view(status_view)
        if view is None:
            return self._signed(await self._leaders_status(request))
        return self._signed(codec_of(type(view), admin_pb2.StatusResponse.DESCRIPTOR).to_proto(view))

    async def ListRequests(self, request: admin_pb2.ListRequestsRequest, context: Context) -> Any:
        rows = self._coordinator.view(requests_view)
        if rows is None:
            return await self._ask_leader("ListRequests", request, context)
        descriptor = admin_pb2.RequestStatus.DESCRIPTOR
        return admin_pb2.ListRequestsResponse(requests=[codec_of(type(row), descriptor).to_proto(row) for row in rows])

    async def ListFailures(self, request: admin_pb2.ListFailuresRequest, context: Context) -> Any:
        rows = self._coordinator.view(failures_view)
        if rows is None:
            return await self._ask_leader("ListFailures", request, context)
        descriptor = admin_pb2.FailureStatus.DESCRIPTOR
        return admin_pb2.ListFailuresResponse(failures=[codec_of(type(row), descriptor).to_proto(row) for row in rows])

    async def Events(self, request: admin_pb2.EventsRequest, context: Context) -> AsyncIterator[Any]:
        address = "" if request.own else self._leader_address
        if self._coordinator.term is None and address:
            async with self._channel_to(address) as channel:
                async for event in admin_pb2_grpc.AdminStub(channel).Events(request):
                    yield event
            return
        codec = codec_of(EventRecord, admin_pb2.EventsResponse.DESCRIPTOR)
        async for record in self._coordinator.events.follow(request.last, request.follow):
            yield codec.to_proto(record)

    async def Drain(self, request: admin_pb2.DrainRequest, context: Context) -> Any:
        if self._coordinator.term is None:
            return await self._ask_leader("Drain", request, context)
        await self._ask(DrainAsked(NodeId(request.node), request.deadline_ms, request.exit), context)
        return admin_pb2.DrainResponse(phase=self._node_phase(request.node))

    async def Undrain(self, request: admin_pb2.UndrainRequest, context: Context) -> Any:
        if self._coordinator.term is None:
            return await self._ask_leader("Undrain", request, context)
        await self._ask(UndrainAsked(NodeId(request.node)), context)
        return admin_pb2.UndrainResponse(phase=self._node_phase(request.node))

    async def Cancel(self, request: admin_pb2.CancelRequestRequest, context: Context) -> Any:
        if self._coordinator.term is None:
            return await self._ask_leader("Cancel", request, context)
        await self._ask(CancelAsked(RequestId(request.request)), context)
        return admin_pb2.CancelRequestResponse()

    async def Apply(self, request: admin_pb2.ApplyRequest, context: Context) -> Any:
        if self._coordinator.term is None:
            return await self._ask_leader("Apply", request, context)
        codec = codec_of(DeploymentRecord, admin_pb2.DeploymentSpec.DESCRIPTOR)
        try:
            record = codec.from_proto(request.deployment)
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        answer = await self._ask(ApplyAsked(record), context)
        return admin_pb2.ApplyResponse(created=answer.created)

    async def Scale(self, request: admin_pb2.ScaleRequest, context: Context) -> Any:
        if self._coordinator.term is None:
            return await self._ask_leader("Scale", request, context)
        await self._ask(ScaleAsked(DeploymentId(request.deployment), request.replicas), context)
        return admin_pb2.ScaleResponse()

    async def Delete(self, request: admin_pb2.DeleteRequest, context: Context) -> Any:
        if self._coordinator.term is None:
            return await self._ask_leader("Delete", request, context)
        await self._ask(DeleteAsked(DeploymentId(request.deployment)), context)
        return admin_pb2.DeleteResponse()

    async def Leave(self, request: admin_pb2.LeaveRequest, context: Context) -> Any:
        self._leave()
        return admin_pb2.LeaveResponse(incarnation=self._coordinator.identity.incarnation)

    async def _ask(self, body: Wish, context: Context) -> AdminAnswered:
        try:
            answer = await self._coordinator.ask(body)
        except Retryable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        if answer.error is not None:
            code = _STATUS_OF.get(answer.error.kind, grpc.StatusCode.FAILED_PRECONDITION)
            await context.abort(code, answer.error.text or answer.error.kind.name.lower())
        return answer

    async def _ask_leader(self, method: str, request: Any, context: Context) -> Any:
        address = self._leader_address
        if not address:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no control plane leads at the moment")
        try:
            return await self._call(address, method, request)
        except grpc.aio.AioRpcError as error:
            text = error.details() or ""
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                text = f"the leader at {address} does not answer: {text}"
            await context.abort(error.code(), text)

    async def _leaders_status(self, request: admin_pb2.StatusRequest) -> admin_pb2.StatusResponse:
        """The leader's, or that there is none who answers."""
        address = self._leader_address
        if not address:
            return self._leaderless_status("")
        try:
            return await self._call(address, "Status", request)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            return self._leaderless_status(f" (the last one, at {address}, does not answer: {error.details()})")

    async def _call(self, address: str, method: str, request: Any) -> Any:
        async with self._channel_to(address) as channel:
            call = getattr(admin_pb2_grpc.AdminStub(channel), method)
            return await call(request, timeout=self._timings.stage)

    @property
    def _leader_address(self) -> str:
        """Where to ask; empty if nobody is known to lead. Cut off from etcd one may still be named there oneself."""
        own = self._coordinator.identity.address
        return next((address for address in self._leader.addresses if address != own), "")

    def _channel_to(self, address: str) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address, options=channel_options(self._timings))

    def _node_phase(self, node: str) -> Any:
        view = self._coordinator.view(status_view)
        phases = [row.phase for row in view.nodes if row.id == node] if view is not None else []
        return int(phases[0]) if phases else admin_pb2.NODE_PHASE_UNSPECIFIED

    def _signed(self, status: Any) -> Any:
        """The answer names this process, whoever gave it."""
        identity = self._coordinator.identity
        status.answered_by, status.answerer = identity.name, identity.incarnation
        return status

    def _leaderless_status(self, last: str) -> admin_pb2.StatusResponse:
        spec = self._timings.to_spec()
        return admin_pb2.StatusResponse(
            cluster=self._coordinator.identity.cluster,
            timing={
                "failure_timeout_ms": spec.failure_timeout_ms,
                "heartbeat_interval_ms": spec.heartbeat_interval_ms,
            },
            limited={"kind": common_pb2.REASON_KIND_NOT_LEADER, "text": LEADERLESS + last},
        )
