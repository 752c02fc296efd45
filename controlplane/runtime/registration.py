"""The key that says which process goes by a name; two processes never share one (PROTOCOL H22)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog

from controlplane.runtime import host
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import EtcdUnavailable, Get, KeyValue, Put, Txn, absent, mod_revision_is
from controlplane.runtime.lease import NameTaken
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.records import NodeRecord, PeerRecord, from_json, to_json
from controlplane.runtime.timing import Timings

log = structlog.get_logger()

ATTEMPTS_MAX = 4

Registrant = NodeRecord | PeerRecord


class Registration:
    """Puts one record under a lease; to be passed to a LeaseKeeper.

    The key is taken if it is absent, if the same incarnation holds it, if its lease is gone, or if its holder is a dead
    process of this machine (then its lease is revoked, so that everything else under it goes too).
    """

    def __init__(
        self, client: EtcdClient, key: str, record_under: Callable[[int], Registrant], timings: Timings
    ) -> None:
        """`record_under` makes the record for a lease id."""
        self._client = client
        self._key = key
        self._record_under = record_under
        self._timeout = timings.session_silence
        self._retry_ms = round(timings.reconnect_max * 1000)

    async def __call__(self, lease: int) -> bool:
        """Register under `lease`. True if something had to be written. Raises NameTaken, naming the holder."""
        record = self._record_under(lease)
        put = Put(self._key, to_json(record), lease)
        condition = absent(self._key)
        for _ in range(ATTEMPTS_MAX):
            txn = Txn(when=(condition,), success=(put,), failure=(Get(self._key),))
            result = await self._client.txn(txn, timeout=self._timeout)
            if result.succeeded:
                return True
            held = result.reads[0]
            if held is None:
                condition = absent(self._key)
                continue
            if (held.value, held.lease) == (put.value, lease):
                return False
            await self._make_way(held, record)
            condition = mod_revision_is(self._key, held.mod_revision)
        raise EtcdUnavailable(f"{self._key} changes too fast to be registered", self._retry_ms)

    async def _make_way(self, held: KeyValue, ours: Registrant) -> None:
        """Return if `held` may be replaced. Raises NameTaken."""
        try:
            holder = from_json(held.value, type(ours))
        except msgspec.DecodeError:
            holder = None
        if holder is not None and holder.incarnation == ours.incarnation:
            return
        if await self._client.lease_remaining(held.lease, timeout=self._timeout) < 0:
            return
        if holder is None:
            raise _taken(self._key, "a record that cannot be read")
        if not ours.boot_id or holder.boot_id != ours.boot_id or not host.process_is_dead(holder.pid):
            where = holder.serve_address if isinstance(holder, NodeRecord) else holder.address
            raise _taken(self._key, f"process {holder.pid} at {where}, incarnation {holder.incarnation}")
        log.info("predecessor_lease_revoked", key=self._key, pid=holder.pid, lease=held.lease)
        await self._client.lease_revoke(held.lease, timeout=self._timeout)


def _taken(key: str, holder: str) -> NameTaken:
    return NameTaken(Reason(kind=ReasonKind.INVALID, text=f"{key} is registered already by {holder}"))
