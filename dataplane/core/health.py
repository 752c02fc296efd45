"""Sick devices: what a GPU's driver tells of it, and processes that do not come up on it.

Xid numbers: NVIDIA, "XID Errors" (docs.nvidia.com/deploy/xid-errors). Those that a program can cause (13, 31, 43, 45)
say nothing against the device.
"""

from __future__ import annotations

from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.session import DeviceHealth
from dataplane.core.messages import DeviceReading, DevicesRead, Recorded
from dataplane.core.state import Rank, Turn

FALSE_STARTS_SICK = 2

XIDS_SICK = {
    48: "uncorrectable memory error",
    62: "internal microcontroller halt",
    64: "memory rows could not be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    95: "uncontained memory error",
    109: "context switch timeout",
    110: "security fault",
    119: "its system processor does not answer",
    120: "its system processor failed",
    140: "unrecovered memory error",
}
"""After these a device needs a reset, or a visit."""


def on_read(turn: Turn, event: DevicesRead) -> None:
    """What the driver says of the devices, compared with what it said first."""
    for device, reading in event.readings.items():
        rank = turn.state.ranks[device]
        rank.first_reading = rank.first_reading or reading
        text = judge(rank.first_reading, reading)
        sick = rank.sick
        if text and sick is None:
            rank.sick = Reason(kind=ReasonKind.DEVICE_SICK, text=f"{device}: {text}", node=turn.state.identity.node)
            turn.emit(Recorded("device_sickened", reason=rank.sick, details={"device": device}))
        elif not text and sick is not None:
            rank.sick = None
            turn.emit(Recorded("device_recovered", details={"device": device}))
        turn.state.heartbeat_due |= rank.sick is not sick


def judge(first: DeviceReading, now: DeviceReading) -> str:
    """What is wrong with a device; "": nothing. Errors that it had when the daemon began were an operator's to see."""
    if now.lost:
        return f"the driver has lost it ({now.lost})"
    fatal = [number for number in now.xids if number in XIDS_SICK]
    if fatal:
        return f"Xid {fatal[-1]}, {XIDS_SICK[fatal[-1]]}"
    if now.remap_failed and not first.remap_failed:
        return "a broken memory row could not be remapped"
    if now.uncorrected > first.uncorrected:
        return f"{now.uncorrected - first.uncorrected} uncorrectable memory errors since the daemon began"
    return ""


def health(rank: Rank) -> DeviceHealth:
    """By what the driver tells; and a device on which process after process does not come up is sick, too. One whose
    process ended is soon replaced."""
    reason = rank.sick
    if reason is None and rank.false_starts >= FALSE_STARTS_SICK:
        reason = rank.fault
    ok = rank.sick is None and rank.false_starts < FALSE_STARTS_SICK
    return DeviceHealth(device=rank.device, ok=ok, reason=reason)
