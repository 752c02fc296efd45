"""What the NVIDIA driver tells of its GPUs: memory errors, lost devices and Xid events. Through its own library, NVML.

Where there is no such library, or it refuses, nothing is told. Structures and numbers are those of nvml.h.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from dataplane.core.messages import DeviceReading

LIBRARY = "libnvidia-ml.so.1"

_SUCCESS, _GPU_IS_LOST = 0, 15
_UNCORRECTED, _VOLATILE = 1, 0
_XID_EVENT = 0x8

_log = structlog.get_logger()


class _EventData(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_void_p),
        ("event_type", ctypes.c_ulonglong),
        ("event_data", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    )


def watch(identities: Mapping[str, str], interval_s: float, post: Callable[[dict[str, DeviceReading]], object]) -> None:
    """Read the devices every so often, until `post` finds that its loop is closed.

    In a thread of its own that nobody waits for: calls are slow, and hang with a driver that does.
    """

    def run() -> None:
        nvml = Nvml.open(identities)
        while nvml is not None:
            try:
                post(nvml.read())
            except RuntimeError:
                return
            time.sleep(interval_s)

    threading.Thread(target=run, name="nvml", daemon=True).start()


class Nvml:
    """The GPUs of one daemon."""

    def __init__(self, library: Any, identities: Mapping[str, str]) -> None:
        self._library = library
        self._handles = {name: _handle(library, identity) for name, identity in identities.items()}
        self._events = ctypes.c_void_p()
        self._xids: dict[str, list[int]] = {name: [] for name in identities}
        self._has_events = library.nvmlEventSetCreate(ctypes.byref(self._events)) == _SUCCESS
        for name, handle in self._handles.items():
            if handle is None or not self._has_events:
                _log.info("device_not_watched", device=name)
            elif library.nvmlDeviceRegisterEvents(handle, ctypes.c_ulonglong(_XID_EVENT), self._events) != _SUCCESS:
                _log.info("xid_events_not_given", device=name)

    @classmethod
    def open(cls, identities: Mapping[str, str]) -> Nvml | None:
        """For devices by the daemon's names, each an index or a UUID. None where the driver has no NVML."""
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError:
            return None
        return cls(library, identities) if library.nvmlInit_v2() == _SUCCESS else None

    def read(self) -> dict[str, DeviceReading]:
        """How the devices are now."""
        self._take_events()
        return {name: self._read(name, handle) for name, handle in self._handles.items() if handle is not None}

    def _read(self, name: str, handle: Any) -> DeviceReading:
        errors = ctypes.c_ulonglong()
        told = self._library.nvmlDeviceGetTotalEccErrors(handle, _UNCORRECTED, _VOLATILE, ctypes.byref(errors))
        words = [ctypes.c_uint() for _ in range(4)]
        # Corrected, uncorrected, pending, failed; older devices retire pages and have none of these.
        self._library.nvmlDeviceGetRemappedRows(handle, *map(ctypes.byref, words))
        return DeviceReading(
            uncorrected=errors.value,
            remap_failed=bool(words[3].value),
            xids=tuple(self._xids[name]),
            lost="NVML_ERROR_GPU_IS_LOST" if told == _GPU_IS_LOST else "",
        )

    def _take_events(self) -> None:
        """Those that came since the last call; of a device only new kinds are kept."""
        event = _EventData()
        while self._has_events and self._library.nvmlEventSetWait_v2(self._events, ctypes.byref(event), 0) == _SUCCESS:
            for name, handle in self._handles.items():
                if handle is not None and handle.value == event.device and event.event_data not in self._xids[name]:
                    self._xids[name].append(event.event_data)


def _handle(library: Any, identity: str) -> ctypes.c_void_p | None:
    handle = ctypes.c_void_p()
    if identity.isdigit():
        code = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(identity)), ctypes.byref(handle))
    else:
        code = library.nvmlDeviceGetHandleByUUID(identity.encode(), ctypes.byref(handle))
    return handle if code == _SUCCESS else None
