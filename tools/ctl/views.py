"""Answers of Admin as plain data: what `--json` prints and what the tables are made of.

States are the protocol's enum names, lower case, without their prefix ("live", "ready").
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from google.protobuf.message import Message

from protos.perdure.v1 import admin_pb2, common_pb2, session_pb2

Row = dict[str, Any]


def status_view(status: admin_pb2.StatusResponse) -> Row:
    """The whole cluster."""
    return {
        "cluster": status.cluster,
        "answered_by": status.answered_by,
        "limited": status.limited.text,
        "leader": leader_view(status),
        "nodes": nodes_view(status),
        "replicas": replicas_view(status),
        "gateways": [
            {"id": gateway.id, "pid": gateway.pid, "url": gateway.url, "open_requests": gateway.open_requests}
            for gateway in status.gateways
        ],
        "deployments": deployments_view(status),
        "fenced": {count.frame: count.count for count in status.fenced},
        "timing": {
            "failure_timeout_ms": status.timing.failure_timeout_ms,
            "heartbeat_interval_ms": status.timing.heartbeat_interval_ms,
        },
    }


def leader_view(status: admin_pb2.StatusResponse) -> Row | None:
    """The leader, or None while there is none."""
    if not status.HasField("leader"):
        return None
    leader = status.leader
    return {
        "id": leader.id,
        "pid": leader.pid,
        "address": leader.address,
        "term": leader.term,
        "state": enum_word(leader, "phase"),
    }


def nodes_view(status: admin_pb2.StatusResponse) -> list[Row]:
    return [
        {
            "id": node.id,
            "host": node.host,
            "pid": node.pid,
            "state": enum_word(node, "phase"),
            "address": node.serve_address,
            "silent_ms": node.silent_ms,
            "reason": reason_text(node),
            "ranks": [
                {
                    "rank": rank.rank,
                    "pid": rank.pid,
                    "device": rank.device,
                    "state": enum_word(rank, "phase"),
                    "replica": rank.replica,
                    "epoch": rank.epoch,
                    "holds": _holds(rank),
                }
                for rank in node.ranks
            ],
        }
        for node in status.nodes
    ]


def _holds(rank: session_pb2.RankInfo) -> str:
    """The shard of a model that the rank's process holds: "rank 1 of main"; empty: none."""
    return f"rank {rank.held.rank} of {rank.held.deployment}" if rank.HasField("held") else ""


def replicas_view(status: admin_pb2.StatusResponse) -> list[Row]:
    return [
        {
            "id": replica.id,
            "state": enum_word(replica, "phase"),
            "epoch": replica.epoch,
            "running": replica.running,
            "waiting": replica.waiting,
            "free_blocks": replica.free_blocks,
            "total_blocks": replica.total_blocks,
            "deployment": replica.deployment,
            "nodes": sorted({member.node for member in replica.members}),
            "tensor": replica.degrees.tensor,
            "pipeline": replica.degrees.pipeline,
            "expert": replica.degrees.expert,
            "step_ms": round(replica.step_ms, 1),
            "load_fraction": round(replica.load_fraction, 3),
            "load_stage": replica.load_stage,
            "numerics": replica.numerics,
            "attention": replica.attention,
            "reason": reason_text(replica),
        }
        for replica in status.replicas
    ]


def deployments_view(status: admin_pb2.StatusResponse) -> list[Row]:
    return [
        {
            "id": deployment.id,
            "model": deployment.model,
            "path": deployment.model_path,
            "replicas": deployment.replicas,
            "ready": deployment.ready,
            "tensor": deployment.degrees.tensor,
            "pipeline": deployment.degrees.pipeline,
            "expert": deployment.degrees.expert,
            "spares": deployment.spares,
            "spares_ready": deployment.spares_ready,
            "numerics": deployment.numerics,
            "reason": deployment.reason,
        }
        for deployment in status.deployments
    ]


def requests_view(response: admin_pb2.ListRequestsResponse) -> list[Row]:
    return [
        {
            "id": request.id,
            "state": request.phase,
            "gateway": request.gateway,
            "replica": request.replica,
            "epoch": request.epoch,
            "attempt": request.attempt,
            "priority": request.priority,
            "tenant": request.tenant,
            "prompt_tokens": request.prompt_tokens,
            "max_tokens": request.max_tokens,
            "age_ms": request.age_ms,
        }
        for request in response.requests
    ]


FAILURE_STEPS = ("closed", "fenced", "regrouped", "replayed", "first_token")


def failures_view(response: admin_pb2.ListFailuresResponse) -> list[Row]:
    """Failures, oldest first; a step's time is in milliseconds since the failure was noticed, None while not done."""
    return [_failure_view(failure, datetime.now().astimezone()) for failure in response.failures]


def _failure_view(failure: admin_pb2.FailureStatus, now: datetime) -> Row:
    done = {enum_word(step, "phase"): step.after_ms for step in failure.steps}
    return {
        "time": (now - timedelta(milliseconds=failure.age_ms)).isoformat(timespec="milliseconds"),
        "replica": failure.replica,
        "epoch": failure.epoch,
        "next_epoch": failure.next_epoch,
        "node": failure.node,
        "over": failure.over,
        "steps_ms": {step: done.get(step) for step in FAILURE_STEPS},
        "requests": failure.requests,
        "homeless": failure.homeless,
        "silent": failure.silent,
        "suspects": list(failure.suspects),
        "gap_ms_max": failure.gap_ms_max,
        "reason": reason_text(failure),
    }


def event_view(event: admin_pb2.EventsResponse) -> Row:
    return {
        "seq": event.seq,
        "time": datetime.fromtimestamp(event.wall_ms / 1000).astimezone().isoformat(timespec="milliseconds"),
        "name": event.name,
        "node": event.node,
        "replica": event.replica,
        "epoch": event.epoch,
        "request": event.request,
        "term": event.term,
        "reason": reason_text(event),
        "details": dict(event.details),
    }


def enum_word(message: Message, field: str) -> str:
    """`message`'s enum field as a word: NODE_PHASE_LIVE is "live"."""
    descriptor = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert descriptor is not None
    number = getattr(message, field)
    value = descriptor.values_by_number.get(number)
    if value is None:
        # A newer cluster than this program.
        return str(number)
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return value.name.removeprefix(prefix).lower()


def reason_text(message: Message) -> str:
    """Why, in words; "" where no reason is given."""
    if not message.HasField("reason"):
        return ""
    reason: common_pb2.Reason = message.reason  # pyright: ignore[reportAttributeAccessIssue]
    return reason.text or enum_word(reason, "kind").replace("_", " ")


def words(values: Iterable[object]) -> str:
    """Values for a table's cell."""
    return ", ".join(map(str, values))
