"""A watched prefix through restarts, compaction, restores and silence: what the watcher knows is what etcd holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from random import Random

from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_server import EtcdChild
from controlplane.runtime.etcd_types import Delete, EtcdUnavailable, Put, Txn
from controlplane.runtime.etcd_watch import PrefixWatch, WatchBatch
from controlplane.runtime.keys import Keys
from tests.support.cluster import eventually
from tests.support.etcd import (
    CLOCK,
    TIMINGS,
    client_of,
    reached,
    restore_snapshot,
    running,
    save_snapshot,
    stopped,
)

T = 2.0


class Watcher:
    """Applies every batch to a copy and keeps the batches."""

    def __init__(self, client: EtcdClient, keys: Keys) -> None:
        self.watch = PrefixWatch(client, keys.prefix, TIMINGS, CLOCK, Random(0))
        self.batches: list[WatchBatch] = []
        self.copy: dict[str, bytes] = {}

    async def run(self) -> None:
        async with aclosing(self.watch.batches()) as batches:
            async for batch in batches:
                for key, item in batch.changes:
                    if item is None:
                        del self.copy[key]
                    else:
                        self.copy[key] = item.value
                if batch.content is not None:
                    assert self.copy == {key: item.value for key, item in batch.content.items()}
                self.batches.append(batch)

    async def holds(self, **expected: bytes) -> None:
        """Wait until the copy is exactly `expected` (by the last part of the key)."""
        await eventually(
            f"the watcher holds {expected}",
            lambda: {key.rpartition("/")[2]: value for key, value in self.copy.items()} == expected or None,
        )


@asynccontextmanager
async def watching(client: EtcdClient, keys: Keys) -> AsyncIterator[Watcher]:
    watcher = Watcher(client, keys)
    async with running(watcher.run()):
        await eventually("the watch is connected", lambda: watcher.watch.connected)
        yield watcher


async def test_everything_first_then_each_change_in_order(client: EtcdClient, keys: Keys) -> None:
    await client.put(keys.peer("a"), b"1", timeout=T)
    async with watching(client, keys) as watcher:
        await client.put(keys.peer("b"), b"2", timeout=T)
        await client.put(keys.peer("b"), b"3", timeout=T)
        await client.delete(keys.peer("a"), timeout=T)
        await watcher.holds(b=b"3")
        first, *later = watcher.batches
        assert first.content is not None
        assert list(first.content) == [keys.peer("a")]
        assert all(batch.content is None for batch in later)
        changes = [(key, item and item.value) for batch in later for key, item in batch.changes]
        assert changes == [(keys.peer("b"), b"2"), (keys.peer("b"), b"3"), (keys.peer("a"), None)]
        revisions = [batch.revision for batch in watcher.batches]
        assert revisions == sorted(revisions)


async def test_a_transaction_arrives_whole(client: EtcdClient, keys: Keys) -> None:
    await client.put(keys.peer("a"), b"1", timeout=T)
    async with watching(client, keys) as watcher:
        await client.txn(Txn(when=(), success=(Delete(keys.peer("a")), Put(keys.peer("b"), b"2"))), timeout=T)
        await watcher.holds(b=b"2")
        assert len(watcher.batches) == 2


async def test_a_lease_that_expires_is_a_deletion(client: EtcdClient, keys: Keys) -> None:
    lease = await client.lease_grant(2, timeout=T)
    await client.put(keys.peer("a"), b"1", lease=lease.id, timeout=T)
    async with watching(client, keys) as watcher:
        await watcher.holds(a=b"1")
        await watcher.holds()


async def test_over_a_restart_of_etcd(own_etcd: EtcdChild, keys: Keys) -> None:
    async with client_of(own_etcd.endpoint) as client:
        await client.put(keys.peer("a"), b"1", timeout=T)
        async with watching(client, keys) as watcher:
            await own_etcd.kill()
            await eventually("the watch is interrupted", lambda: not watcher.watch.connected)
            assert watcher.copy == {keys.peer("a"): b"1"}
            await own_etcd.start()
            await reached(client)
            await client.put(keys.peer("b"), b"2", timeout=T)
            await watcher.holds(a=b"1", b=b"2")
            assert not any(batch.restored for batch in watcher.batches)


async def test_deletions_of_an_outage_are_delivered_across_a_compaction(own_etcd: EtcdChild, keys: Keys) -> None:
    async with client_of(own_etcd.endpoint) as client, client_of(own_etcd.endpoint) as other:
        for name in ("a", "b", "c"):
            await client.put(keys.peer(name), b"1", timeout=T)
        async with watching(client, keys) as watcher:
            with stopped(own_etcd):
                await eventually("the silence is noticed", lambda: not watcher.watch.connected)
                blocked = asyncio.create_task(_change_and_compact(other, keys))
            await blocked
            await watcher.holds(b=b"2", c=b"1", d=b"1")


async def test_a_deletion_between_read_and_watch_survives_its_compaction(client: EtcdClient, keys: Keys) -> None:
    for name in ("a", "b"):
        await client.put(keys.peer(name), b"1", timeout=T)
    watch = PrefixWatch(client, keys.prefix, TIMINGS, CLOCK, Random(0))
    async with aclosing(watch.batches()) as batches:
        first = await anext(batches)
        assert first.content is not None
        await _change_and_compact(client, keys)
        copy = {key for key, _ in first.changes}
        while copy != {keys.peer("b"), keys.peer("d")}:
            for key, item in (await asyncio.wait_for(anext(batches), 10)).changes:
                copy.add(key) if item is not None else copy.discard(key)


async def _change_and_compact(client: EtcdClient, keys: Keys) -> None:
    change = Txn(when=(), success=(Delete(keys.peer("a")), Put(keys.peer("b"), b"2"), Put(keys.peer("d"), b"1")))
    revision = (await client.txn(change, timeout=20 * T)).revision
    await client.compact(revision, timeout=T)


async def test_a_restored_snapshot_is_told_and_not_slept_through(
    own_etcd: EtcdChild, keys: Keys, tmp_path: Path
) -> None:
    async with client_of(own_etcd.endpoint) as client:
        await client.put(keys.peer("a"), b"old", timeout=T)
        await client.put(keys.peer("ghost"), b"1", timeout=T)
        save_snapshot(own_etcd, tmp_path / "snapshot")
        await client.put(keys.peer("a"), b"new", timeout=T)
        await client.delete(keys.peer("ghost"), timeout=T)
        for index in range(20):
            await client.put(keys.peer("later"), str(index).encode(), timeout=T)
        async with watching(client, keys) as watcher:
            await watcher.holds(a=b"new", later=b"19")
            before = watcher.batches[-1].revision
            await restore_snapshot(own_etcd, tmp_path / "snapshot")
            await watcher.holds(a=b"old", ghost=b"1")
            assert [batch.restored for batch in watcher.batches if batch.content is not None][-1] is True
            assert watcher.batches[-1].revision < before
            # A watch from the old revision would sleep until that revision comes again.
            await client.put(keys.peer("a"), b"after", timeout=T)
            await watcher.holds(a=b"after", ghost=b"1")


async def test_a_silent_member_is_left_for_another(etcd_members: list[EtcdChild], keys: Keys) -> None:
    async with client_of(*(child.endpoint for child in etcd_members)) as client:
        async with watching(client, keys) as watcher:
            silent = next(child for child in etcd_members if child.endpoint == client.endpoint)
            with stopped(silent):
                await eventually("the silence is noticed", lambda: not watcher.watch.connected)
                others = [child.endpoint for child in etcd_members if child is not silent]
                async with client_of(*others) as writer:
                    await eventually("a change is written", lambda: _put(writer, keys))
                await watcher.holds(a=b"1")
                assert client.endpoint != silent.endpoint


async def test_a_member_cut_off_from_the_others_is_no_good_watch(etcd_members: list[EtcdChild], keys: Keys) -> None:
    lonely, *others = etcd_members
    async with client_of(lonely.endpoint) as client, watching(client, keys) as watcher:
        with stopped(others[0]), stopped(others[1]):
            await eventually("the watch is given up", lambda: not watcher.watch.connected)
        await eventually("a change is written", lambda: _put(client, keys))
        await watcher.holds(a=b"1")


async def _put(client: EtcdClient, keys: Keys) -> bool:
    """False while the other two elect."""
    try:
        await client.put(keys.peer("a"), b"1", timeout=T)
    except EtcdUnavailable:
        return False
    return True


async def test_a_quiet_prefix_is_no_silence(client: EtcdClient, keys: Keys) -> None:
    async with watching(client, keys) as watcher:
        ended = CLOCK.now() + 2 * TIMINGS.session_silence
        await eventually("two silences passed", lambda: CLOCK.now() > ended)
        assert watcher.watch.connected
        assert len(watcher.batches) == 1


async def test_etcd_away_from_the_start(own_etcd: EtcdChild, keys: Keys) -> None:
    await own_etcd.stop()
    async with client_of(own_etcd.endpoint) as client:
        watcher = Watcher(client, keys)
        async with running(watcher.run()):
            await own_etcd.start()
            await reached(client)
            await client.put(keys.peer("a"), b"1", timeout=T)
            await watcher.holds(a=b"1")
