"""Leases and names on a real etcd: renewal, silence, expiry, and two processes that want one name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from controlplane.runtime import host
from controlplane.runtime.errors import Rejected
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_server import EtcdChild
from controlplane.runtime.ids import Incarnation, NodeId, draw_id
from controlplane.runtime.keys import Keys
from controlplane.runtime.lease import LeaseEvent, LeaseEventKind, LeaseKeeper, NameTaken
from controlplane.runtime.records import NodeRecord, from_json, to_json
from controlplane.runtime.registration import Registration
from controlplane.runtime.timing import derive_timings
from tests.support.cluster import eventually
from tests.support.etcd import CLOCK, TIMINGS, client_of, restore_snapshot, running, save_snapshot, stopped

T = 2.0
NODE = NodeId("n1")
GONE, HEARD, MUTE = LeaseEventKind.GONE, LeaseEventKind.HEARD, LeaseEventKind.MUTE
REFUSED, RELET, RENEWED = LeaseEventKind.REFUSED, LeaseEventKind.RELET, LeaseEventKind.RENEWED


def node_record(*, pid: int = 0, boot_id: str = "", serve_address: str = "h:1") -> Callable[[int], NodeRecord]:
    incarnation = Incarnation(draw_id())
    return lambda lease: NodeRecord(
        node=NODE,
        incarnation=incarnation,
        serve_address=serve_address,
        host="h",
        pid=pid or os.getpid(),
        boot_id=boot_id or host.boot_id(),
        lease_id=lease,
    )


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class Worker:
    """A keeper with its node key, and what it reported."""

    def __init__(self, client: EtcdClient, keys: Keys, record: Callable[[int], NodeRecord] | None = None) -> None:
        self.record = record or node_record()
        self.events: list[LeaseEvent] = []
        registration = Registration(client, keys.node(NODE), self.record, TIMINGS)
        self.keeper = LeaseKeeper(client, registration, TIMINGS, CLOCK, Random(0), self.events.append)

    async def saw(self, kind: LeaseEventKind) -> None:
        await eventually(f"the lease is {kind.value}", lambda: kind in self.kinds())

    def kinds(self) -> list[LeaseEventKind]:
        """Without the renewals."""
        return [event.kind for event in self.events if event.kind is not RENEWED]


async def stored(client: EtcdClient, keys: Keys) -> NodeRecord | None:
    item = await client.get(keys.node(NODE), timeout=T)
    return from_json(item.value, NodeRecord) if item is not None else None


async def test_granted_registered_renewed_and_given_back(client: EtcdClient, keys: Keys) -> None:
    worker = Worker(client, keys)
    assert not worker.keeper.trusted
    await worker.keeper.start()
    assert worker.keeper.trusted
    assert await stored(client, keys) == worker.record(worker.keeper.lease)
    async with running(worker.keeper.run()):
        first = worker.keeper.trusted_until
        # Past its own TTL it lives on renewals alone.
        await eventually("renewed", lambda: worker.keeper.trusted_until > first + TIMINGS.lease_ttl)
    assert worker.kinds() == []
    lease = worker.keeper.lease
    await worker.keeper.close()
    assert not worker.keeper.trusted
    assert await client.lease_remaining(lease, timeout=T) == -1
    assert await stored(client, keys) is None


async def test_trust_counts_from_the_send_of_the_last_answered_renewal(client: EtcdClient, keys: Keys) -> None:
    worker = Worker(client, keys)
    before = CLOCK.now()
    await worker.keeper.start()
    assert before + TIMINGS.lease_trust <= worker.keeper.trusted_until < CLOCK.now() + TIMINGS.lease_trust
    assert TIMINGS.lease_trust < TIMINGS.lease_ttl
    await worker.keeper.close()


async def test_a_lease_longer_than_the_failure_timeout_is_refused(tmp_path: Path, keys: Keys) -> None:
    slow = ("--heartbeat-interval=400", "--election-timeout=4000")
    child = EtcdChild(data_dir=tmp_path / "data", log_path=tmp_path / "log", timings=TIMINGS, arguments=slow)
    await child.start()
    async with client_of(child.endpoint) as client:
        with pytest.raises(Rejected, match=r"no lease below 6 s .* failure_timeout is 2 s"):
            await Worker(client, keys).keeper.start()
    await child.stop()


async def test_a_revoked_lease_is_relet_to_the_same_incarnation(client: EtcdClient, keys: Keys) -> None:
    worker = Worker(client, keys)
    await worker.keeper.start()
    old = worker.keeper.lease
    async with running(worker.keeper.run()):
        await client.lease_revoke(old, timeout=T)
        await worker.saw(RELET)
        assert worker.kinds() == [GONE, RELET]
        assert worker.keeper.lease not in (0, old)
        assert worker.keeper.trusted
        assert await stored(client, keys) == worker.record(worker.keeper.lease)
    await worker.keeper.close()


async def test_mute_at_the_moment_when_trust_ends(own_etcd: EtcdChild, keys: Keys) -> None:
    async with client_of(own_etcd.endpoint) as client:
        worker = Worker(client, keys)
        await worker.keeper.start()
        async with running(worker.keeper.run()):
            with stopped(own_etcd):
                trusted_until = worker.keeper.trusted_until
                await worker.saw(MUTE)
                assert CLOCK.now() >= trusted_until
                assert not worker.keeper.trusted
                assert worker.kinds() == [MUTE]
            # Renewed or granted anew, as etcd finds the lease when it goes on. A new lease is trusted from its grant
            # on, a moment before the key stands under it.
            ends = ([MUTE, HEARD], [MUTE, GONE, RELET])
            await eventually("the lease is renewed, or granted anew and its key put", lambda: worker.kinds() in ends)
            assert worker.keeper.trusted


async def test_etcd_killed_for_longer_than_the_lease(own_etcd: EtcdChild, keys: Keys) -> None:
    async with client_of(own_etcd.endpoint) as client:
        worker = Worker(client, keys)
        await worker.keeper.start()
        lease = worker.keeper.lease
        async with running(worker.keeper.run()):
            await own_etcd.kill()
            gone_at = CLOCK.now() + TIMINGS.lease_ttl
            await eventually("the TTL passed", lambda: CLOCK.now() > gone_at)
            await own_etcd.start()
            # Leases restart in full with etcd, so that nobody is dead because etcd was.
            await worker.saw(HEARD)
            assert worker.kinds() == [MUTE, HEARD]
            assert worker.keeper.lease == lease
            assert await stored(client, keys) == worker.record(lease)


async def test_a_key_lost_to_a_restore_is_put_again(own_etcd: EtcdChild, keys: Keys, tmp_path: Path) -> None:
    async with client_of(own_etcd.endpoint) as client:
        worker = Worker(client, keys)
        save_snapshot(own_etcd, tmp_path / "empty")
        await worker.keeper.start()
        async with running(worker.keeper.run()):
            await restore_snapshot(own_etcd, tmp_path / "empty")
            await worker.saw(RELET)
            assert await stored(client, keys) == worker.record(worker.keeper.lease)


async def test_relet_puts_a_missing_key_under_the_living_lease(client: EtcdClient, keys: Keys) -> None:
    worker = Worker(client, keys)
    await worker.keeper.start()
    lease = worker.keeper.lease
    async with running(worker.keeper.run()):
        await client.delete(keys.node(NODE), timeout=T)
        worker.keeper.relet()
        await worker.saw(RELET)
        assert worker.keeper.lease == lease
        assert await stored(client, keys) == worker.record(lease)
    await worker.keeper.close()


async def test_the_second_worker_of_a_name_is_refused_and_told_who_holds_it(client: EtcdClient, keys: Keys) -> None:
    first = Worker(client, keys, node_record(pid=os.getppid(), serve_address="first:7001"))
    await first.keeper.start()
    async with running(first.keeper.run()):
        second = Worker(client, keys)
        with pytest.raises(NameTaken, match=rf"nodes/n1 .* process {os.getppid()} at first:7001"):
            await second.keeper.start()
        assert second.keeper.lease == 0
        assert await stored(client, keys) == first.record(first.keeper.lease)
        assert first.kinds() == []
    await first.keeper.close()


async def test_the_name_of_a_process_that_died_elsewhere_is_waited_for(client: EtcdClient, keys: Keys) -> None:
    dead = Worker(client, keys, node_record(boot_id="another machine"))
    await dead.keeper.start()
    heir = Worker(client, keys)
    await heir.keeper.start()
    assert await stored(client, keys) == heir.record(heir.keeper.lease)
    await heir.keeper.close()


async def test_a_dead_predecessor_on_this_machine_makes_way_at_once(client: EtcdClient, keys: Keys) -> None:
    record = node_record(pid=dead_pid())
    lease = await client.lease_grant(60, timeout=T)
    await client.put(keys.node(NODE), to_json(record(lease.id)), lease=lease.id, timeout=T)
    await client.put(keys.leader, b"also its", lease=lease.id, timeout=T)
    heir = Worker(client, keys)
    await heir.keeper.start()
    assert await stored(client, keys) == heir.record(heir.keeper.lease)
    assert await client.lease_remaining(lease.id, timeout=T) == -1
    assert await client.get(keys.leader, timeout=T) is None
    await heir.keeper.close()


async def test_a_living_process_elsewhere_is_not_judged_by_its_pid(client: EtcdClient, keys: Keys) -> None:
    pid = dead_pid()
    record = node_record(pid=pid, boot_id="another machine")
    lease = await client.lease_grant(60, timeout=T)
    await client.put(keys.node(NODE), to_json(record(lease.id)), lease=lease.id, timeout=T)
    registration = Registration(client, keys.node(NODE), node_record(), TIMINGS)
    with pytest.raises(NameTaken, match=f"process {pid} at"):
        await registration((await client.lease_grant(60, timeout=T)).id)


async def test_a_key_whose_lease_is_gone_is_a_ghost(client: EtcdClient, keys: Keys) -> None:
    ghost = node_record(boot_id="another machine")
    await client.put(keys.node(NODE), to_json(ghost(12345)), timeout=T)
    heir = Worker(client, keys)
    await heir.keeper.start()
    assert await stored(client, keys) == heir.record(heir.keeper.lease)
    await heir.keeper.close()


async def test_a_name_lost_while_running_is_asked_for_until_it_is_free(client: EtcdClient, keys: Keys) -> None:
    first = Worker(client, keys)
    await first.keeper.start()
    async with running(first.keeper.run()):
        usurper = await client.lease_grant(60, timeout=T)
        await client.lease_revoke(first.keeper.lease, timeout=T)
        other = to_json(node_record(boot_id="another machine", serve_address="other:1")(usurper.id))
        await client.put(keys.node(NODE), other, lease=usurper.id, timeout=T)
        await first.saw(REFUSED)
        reason = next(event.reason for event in first.events if event.kind is REFUSED)
        assert reason is not None
        assert "at other:1" in reason.text
        await client.lease_revoke(usurper.id, timeout=T)
        await first.saw(RELET)
        assert await stored(client, keys) == first.record(first.keeper.lease)
    await first.keeper.close()


async def test_a_name_taken_under_a_living_lease_is_asked_for_too(client: EtcdClient, keys: Keys) -> None:
    """As a restore may leave it: our lease in the snapshot, another's key under our name."""
    first = Worker(client, keys)
    await first.keeper.start()
    async with running(first.keeper.run()):
        usurper = await client.lease_grant(60, timeout=T)
        other = to_json(node_record(boot_id="another machine", serve_address="other:1")(usurper.id))
        await client.put(keys.node(NODE), other, lease=usurper.id, timeout=T)
        first.keeper.relet()
        await first.saw(REFUSED)
        assert first.kinds() == [GONE, REFUSED]
        assert not first.keeper.trusted
        await client.lease_revoke(usurper.id, timeout=T)
        await first.saw(RELET)
        assert await stored(client, keys) == first.record(first.keeper.lease)
    await first.keeper.close()


def test_the_timings_of_these_tests_are_those_of_a_sound_order() -> None:
    assert derive_timings(2.0, 0.25) == TIMINGS
