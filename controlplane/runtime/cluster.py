"""The record that makes an etcd prefix one cluster: its id and the times that all its processes live by."""

from __future__ import annotations

import msgspec
import structlog

from controlplane.runtime.errors import Rejected
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import Get, KeyValue, Put, Txn, absent
from controlplane.runtime.ids import ClusterId, draw_id
from controlplane.runtime.keys import Keys
from controlplane.runtime.messages.common import Reason, ReasonKind, TimingSpec
from controlplane.runtime.records import ClusterRecord, from_json, to_json

log = structlog.get_logger()


async def ensure_cluster(client: EtcdClient, keys: Keys, timing: TimingSpec, *, timeout: float) -> ClusterRecord:
    """The cluster's record, written now if there is none. What stands there wins; a timing that differs is reported.

    Raises EtcdUnavailable, EtcdDenied, or Rejected if what stands there cannot be read.
    """
    ours = ClusterRecord(cluster=ClusterId(draw_id()), timing=timing)
    txn = Txn(when=(absent(keys.cluster),), success=(Put(keys.cluster, to_json(ours)),), failure=(Get(keys.cluster),))
    result = await client.txn(txn, timeout=timeout)
    if result.succeeded:
        return ours
    stored = result.reads[0]
    assert stored is not None, "a key that is not absent was read"
    theirs = _record(stored)
    if theirs.timing != timing:
        log.warning("cluster_timing_differs", configured=timing, used=theirs.timing)
    return theirs


async def read_cluster(client: EtcdClient, keys: Keys, *, timeout: float) -> ClusterRecord | None:
    """None: no control plane has started yet. Raises as `ensure_cluster`."""
    stored = await client.get(keys.cluster, timeout=timeout)
    return _record(stored) if stored is not None else None


def _record(stored: KeyValue) -> ClusterRecord:
    try:
        return from_json(stored.value, ClusterRecord)
    except msgspec.DecodeError as error:
        text = f"{stored.key} in etcd is not a cluster's record: {error}"
        raise Rejected(Reason(kind=ReasonKind.INVALID, text=text)) from error
