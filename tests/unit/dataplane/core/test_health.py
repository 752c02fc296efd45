"""What is made of a driver's word on its devices, and of errors that spoil a process."""

from __future__ import annotations

import pytest

from controlplane.runtime.ids import Epoch
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.session import DeviceHealth, Heartbeat
from dataplane import frames
from dataplane.core.health import judge
from dataplane.core.messages import DeviceReading, DevicesRead, Effect, KillRank, SendLeader, SendRank
from tests.scenario.worker.model import Worker, serving


def health(effects: list[Effect]) -> DeviceHealth:
    """What the last heartbeat tells of the first device."""
    beats = [effect.body for effect in effects if isinstance(effect, SendLeader) and isinstance(effect.body, Heartbeat)]
    return beats[-1].health[0]


def reads(worker: Worker, reading: DeviceReading) -> DeviceHealth:
    return health(worker.feed(DevicesRead({"cpu:0": reading})) + worker.wait(1))


@pytest.mark.parametrize(
    ("first", "now", "wrong"),
    [
        (DeviceReading(), DeviceReading(), ""),
        (DeviceReading(uncorrected=3), DeviceReading(uncorrected=3), ""),
        (DeviceReading(uncorrected=3), DeviceReading(uncorrected=5), "2 uncorrectable memory errors"),
        (DeviceReading(uncorrected=3), DeviceReading(uncorrected=0), ""),
        (DeviceReading(remap_failed=True), DeviceReading(remap_failed=True), ""),
        (DeviceReading(), DeviceReading(remap_failed=True), "could not be remapped"),
        (DeviceReading(), DeviceReading(xids=(13, 31, 43)), ""),
        (DeviceReading(), DeviceReading(xids=(31, 79)), "Xid 79, fallen off the bus"),
        (DeviceReading(), DeviceReading(lost="NVML_ERROR_GPU_IS_LOST"), "the driver has lost it"),
    ],
)
def test_what_speaks_against_a_device(first: DeviceReading, now: DeviceReading, wrong: str) -> None:
    found = judge(first, now)
    assert wrong in found
    assert bool(found) == bool(wrong)


def test_a_sick_device_is_told_of_until_it_was_reset() -> None:
    worker = serving()
    assert reads(worker, DeviceReading(uncorrected=1)).ok
    told = reads(worker, DeviceReading(uncorrected=2))
    assert not told.ok
    assert told.reason is not None
    assert told.reason.kind is ReasonKind.DEVICE_SICK
    assert "cpu:0: 1 uncorrectable memory errors" in told.reason.text
    assert reads(worker, DeviceReading()).ok


def test_a_process_whose_device_failed_is_replaced_before_it_is_bound_again() -> None:
    """An error of CUDA stays with the process: it would fail every load to come."""
    worker = serving()
    pid = worker.state.ranks["cpu:0"].pid
    reason = Reason(kind=ReasonKind.DEVICE_SICK, text="CUDA error: an illegal memory access was encountered")
    effects = worker.says("cpu:0", frames.Failed(Epoch(1), "step", reason))
    assert [effect.pid for effect in effects if isinstance(effect, KillRank)] == [pid]
    effects = worker.prepare("r", 2, ["cpu:0"])
    assert not [effect for effect in effects if isinstance(effect, SendRank)]
    effects = worker.spawn(worker.exits("cpu:0", signal=9))
    assert [type(effect.frame) for effect in effects if isinstance(effect, SendRank)] == [frames.Prepare]
