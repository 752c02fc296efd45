"""Weights that ranks hold, as a worker daemon and the leader speak of them (Attach).

Mirrors its part of protos/perdure/v1/session.proto; wire.py checks that at import.
"""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, Reason, ReplicaSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldWeights:
    """A rank's shard of a model's weights on a device."""

    deployment: DeploymentId
    degrees: ParallelDegrees
    rank: int
    # Changes when the files, the dtype or the shard change.
    fingerprint: str
    # host:port at which other ranks may copy it; empty: nowhere.
    address: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsState:
    """What a device's rank process holds has changed, or a preload failed (then with its reason)."""

    device: str
    pid: int
    held: HeldWeights | None = None
    reason: Reason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSource:
    """Weights in a living rank: of rank `rank` of a replica of `degrees`, to be had at `address` (host:port)."""

    degrees: ParallelDegrees
    rank: int
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PreloadWeights:
    """Keep a shard ready on a free device (a spare), so that a replica placed there later has nothing to load.

    Answered by WeightsState. A Prepare for the device ends it.
    """

    device: str
    # The shard: this rank of a replica of `spec`.
    rank: int
    spec: ReplicaSpec
    sources: tuple[WeightSource, ...] = ()
