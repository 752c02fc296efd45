"""The effects of the worker daemon's core as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from controlplane.runtime.messages import serve, session
from controlplane.runtime.messages.common import Reason
from controlplane.runtime.packing import unpack_u32
from dataplane import frames
from dataplane.core.messages import (
    CloseGateway,
    Effect,
    HintLeader,
    KillRank,
    LeaveLeader,
    MarkEpochsOver,
    Recorded,
    SendGateway,
    SendLeader,
    SendRank,
    SpawnRank,
    StreamId,
)
from tests.scenario.worker.model import Worker


def show(effect: Effect, names: dict[StreamId, str], worker: Worker) -> str:
    """One effect as one line; "" for what says nothing."""
    match effect:
        case SendLeader(_, session.Heartbeat()):
            return ""
        case SendLeader(_, body):
            return f"-> leader {type(body).__name__} {_fields(body)}".rstrip()
        case SendGateway(_, serve.ServeHeartbeat()):
            return ""
        case SendGateway(stream, serve.StepTokens() as body):
            return f"-> {names.get(stream, '?')} Step {' '.join(_step(body))}"
        case SendGateway(stream, body):
            return f"-> {names.get(stream, '?')} {type(body).__name__} {_fields(body)}".rstrip()
        case SendRank(device, frame):
            return f"-> {device} {_frame(frame, worker)}"
        case MarkEpochsOver(device, epoch):
            return f"page {device} epochs up to {epoch} are over"
        case SpawnRank(device):
            return f"spawn {device}"
        case KillRank(device, pid, reason):
            return f"kill {device} pid {pid} ({reason.text})"
        case LeaveLeader(_, reason, term, address):
            return f"leave the leader for term {term} {address} ({reason.text or reason.kind.name})".replace("  ", " ")
        case HintLeader(address, term):
            return f"hint {address} term {term}"
        case CloseGateway(stream, reason):
            return f"close {names.get(stream, '?')} ({reason.text})"
        case Recorded():
            return _record(effect)
        case _:
            return type(effect).__name__


def _record(record: Recorded) -> str:
    parts = [f"* {record.name}"]
    if record.replica:
        parts.append(f"{record.replica}@{record.epoch}")
    if record.request:
        parts.append(record.request)
    parts += [value for key, value in record.details.items() if key not in ("pid", "session")]
    if record.reason is not None:
        parts.append(f"{record.reason.kind.name} ({record.reason.text})")
    return " ".join(parts)


def _frame(frame: frames.DaemonFrame, worker: Worker) -> str:
    names = {sequence: f"{request}/{index}" for (request, index), sequence in worker.sequences.items()}
    match frame:
        case frames.Submit():
            parts = (
                f"{names[item.sequence]}+{len(item.delivered) // 4}" + (" solo" if item.solo else "")
                for item in frame.sequences
            )
            return "Submit " + " ".join(parts)
        case frames.Cancel():
            return "Cancel " + " ".join(names.get(sequence, "an older attempt") for sequence in frame.sequences)
        case frames.Prepare():
            return f"Prepare {frame.replica}@{frame.epoch} rank {frame.rank}"
        case frames.Preload():
            return f"Preload rank {frame.rank} of {frame.spec.deployment}"
        case frames.Form() | frames.Load() | frames.Abort():
            return f"{type(frame).__name__} {frame.epoch}"
        case _:
            return type(frame).__name__


def _step(body: serve.StepTokens) -> Iterator[str]:
    """ "SLOT=FIRST:COUNT" for tokens, "SLOT!REASON" for a finish."""
    columns = (unpack_u32(column) for column in (body.slots, body.first_index, body.counts))
    for slot, first, count in zip(*columns, strict=True):
        yield f"{slot}={first}:{count}"
    for finish in body.finish:
        yield f"{finish.slot}!{finish.reason.name}"


_HIDDEN = {"boot_id", "cluster", "node", "host", "pid", "serve_address", "incarnation", "prompt", "render"} | {
    "sampling", "heartbeat_interval_ms", "name", "capacity", "devices", "versions", "lease_id", "weights",
}  # fmt: skip


def _fields(body: object) -> str:
    parts: list[str] = []
    for name in type(body).__slots__:  # type: ignore[attr-defined]
        value = getattr(body, name)
        if name in _HIDDEN or (value in (None, "", 0, (), False) and name not in ("ok", "suspect")):
            continue
        parts.append(f"{name}={_value(value)}")
    return " ".join(parts)


def _value(value: object) -> str:
    match value:
        case Reason():
            return f"{value.kind.name}({value.text})" if value.text else value.kind.name
        case tuple():
            return "[" + ", ".join(map(_value, value)) + "]"
        case serve.Choice():
            return f"{value.index}:{len(value.delivered) // 4}" + (" finished" if value.finished else "")
        case _ if hasattr(value, "__slots__") and not isinstance(value, int | str):
            return _fields(value)
        case _:
            return str(getattr(value, "name", value))
