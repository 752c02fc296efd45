"""The etcd client against real members: calls, endpoints that die or fall silent, users, TLS, a full disk."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from random import Random

import pytest
import trustme

from controlplane.runtime.errors import Rejected
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_server import EtcdChild, EtcdTls, free_port
from controlplane.runtime.etcd_types import (
    Delete,
    EtcdDenied,
    EtcdLeaseGone,
    EtcdOptions,
    EtcdUnavailable,
    Get,
    Put,
    Txn,
    absent,
    create_revision_is,
    mod_revision_is,
    value_is,
    version_is,
)
from controlplane.runtime.etcd_watch import PrefixWatch
from controlplane.runtime.keys import Keys
from tests.support.cluster import eventually
from tests.support.etcd import CLOCK, QUICK, TIMINGS, client_of, etcdctl, pem_files, stopped

T = 2.0


async def test_put_get_delete(client: EtcdClient, keys: Keys) -> None:
    assert await client.get(keys.term, timeout=T) is None
    revision = await client.put(keys.term, b"1", timeout=T)
    item = await client.get(keys.term, timeout=T)
    assert item is not None
    assert (item.key, item.value, item.version, item.lease) == (keys.term, b"1", 1, 0)
    assert item.create_revision == item.mod_revision == revision
    assert await client.delete(keys.term, timeout=T) is True
    assert await client.delete(keys.term, timeout=T) is False


async def test_a_prefix_is_read_at_one_revision_and_ends_where_it_ends(client: EtcdClient, keys: Keys) -> None:
    for name in ("a", "b"):
        await client.put(keys.peer(name), name.encode(), timeout=T)
    last = await client.put(keys.prefix[:-1] + "0", b"the next sibling", timeout=T)
    snapshot = await client.get_prefix(keys.prefix, timeout=T)
    assert [item.key for item in snapshot.items] == [keys.peer("a"), keys.peer("b")]
    assert snapshot.revision == last
    assert await client.delete_prefix(keys.prefix, timeout=T) == 2


async def test_a_transaction_takes_one_branch_whole(client: EtcdClient, keys: Keys) -> None:
    create = Txn(when=(absent(keys.leader),), success=(Put(keys.leader, b"x"),), failure=(Get(keys.leader),))
    first = await client.txn(create, timeout=T)
    second = await client.txn(create, timeout=T)
    assert (first.succeeded, second.succeeded) == (True, False)
    item = second.reads[0]
    assert item is not None
    assert item.value == b"x"
    held = (
        value_is(keys.leader, b"x"),
        create_revision_is(keys.leader, item.create_revision),
        mod_revision_is(keys.leader, item.mod_revision),
        version_is(keys.leader, 1),
    )
    missed = (
        value_is(keys.leader, b"y"),
        create_revision_is(keys.leader, item.create_revision + 1),
        mod_revision_is(keys.leader, item.mod_revision + 1),
        version_is(keys.leader, 2),
        # An absent key has no value, not an empty one.
        value_is(keys.term, b""),
    )
    for compare in missed:
        assert not (await client.txn(Txn(when=(compare,), success=()), timeout=T)).succeeded, compare
    result = await client.txn(
        Txn(when=held, success=(Get(keys.leader), Delete(keys.leader), Get(keys.term))), timeout=T
    )
    assert result.succeeded
    assert result.reads == (item, None)
    assert await client.get(keys.leader, timeout=T) is None


async def test_a_lease_from_grant_to_revoke(client: EtcdClient, keys: Keys) -> None:
    lease = await client.lease_grant(60, timeout=T)
    assert lease.ttl == 60
    await client.put(keys.leader, b"x", lease=lease.id, timeout=T)
    assert await client.keepalive_once(lease.id, timeout=T) == 60
    assert 0 < await client.lease_remaining(lease.id, timeout=T) <= 60
    assert await client.lease_revoke(lease.id, timeout=T) is True
    assert await client.get(keys.leader, timeout=T) is None
    assert await client.keepalive_once(lease.id, timeout=T) == 0
    assert await client.lease_remaining(lease.id, timeout=T) == -1
    assert await client.lease_revoke(lease.id, timeout=T) is False
    with pytest.raises(EtcdLeaseGone, match="lease not found"):
        await client.put(keys.leader, b"x", lease=lease.id, timeout=T)


async def test_status_members_and_alarms(client: EtcdClient, etcd: EtcdChild) -> None:
    status = await client.status(timeout=T)
    assert status.endpoint == etcd.endpoint
    assert status.leader == status.member != 0
    assert status.version.startswith("3.")
    members = await client.members(timeout=T)
    assert [(member.name, member.client_urls) for member in members] == [("perdure", (f"http://{etcd.endpoint}",))]
    assert await client.alarms(timeout=T) == ()


async def test_nobody_there_is_unavailable_with_the_address(keys: Keys) -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    async with client_of(address) as client:
        with pytest.raises(EtcdUnavailable, match=address) as caught:
            await client.get(keys.term, timeout=T)
    assert caught.value.retry_ms > 0


async def test_a_dead_endpoint_is_passed_over_within_the_call(etcd: EtcdChild, keys: Keys) -> None:
    async with client_of(f"127.0.0.1:{free_port('127.0.0.1')}", etcd.endpoint) as client:
        await client.put(keys.term, b"1", timeout=T)
        assert client.endpoint == etcd.endpoint


async def test_a_silent_endpoint_costs_one_deadline(etcd_members: list[EtcdChild], keys: Keys) -> None:
    async with client_of(*(child.endpoint for child in etcd_members)) as client:
        await client.put(keys.term, b"1", timeout=T)
        silent = next(child for child in etcd_members if child.endpoint == client.endpoint)
        with stopped(silent):
            with pytest.raises(EtcdUnavailable, match="in time"):
                await client.get(keys.term, timeout=TIMINGS.keepalive_deadline)
            assert client.endpoint != silent.endpoint

            async def answered() -> bool:
                # The stopped member may have been the leader: the other two elect first.
                try:
                    return await client.get(keys.term, timeout=T) is not None
                except EtcdUnavailable:
                    return False

            await eventually("two of three answer", answered)


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[EtcdChild]:
    """An etcd that demands user root with password secret."""
    child = EtcdChild(data_dir=tmp_path / "data", log_path=tmp_path / "log", timings=TIMINGS, arguments=QUICK)
    await child.start()
    etcdctl(child, "user", "add", "root", "--new-user-password=secret")
    etcdctl(child, "user", "grant-role", "root", "root")
    etcdctl(child, "auth", "enable")
    yield child
    await child.stop()


async def test_users_and_passwords(guarded: EtcdChild, keys: Keys) -> None:
    def as_user(user: str, password: str) -> EtcdClient:
        options = EtcdOptions(endpoints=(guarded.endpoint,), user=user, password=password)
        assert "secret" not in repr(options)
        return EtcdClient(options, TIMINGS, CLOCK)

    async with client_of(guarded.endpoint) as nobody:
        with pytest.raises(EtcdDenied, match="user name is empty"):
            await nobody.get(keys.term, timeout=T)
    wrong = as_user("root", "guess")
    with pytest.raises(EtcdDenied, match="invalid user ID or password"):
        await wrong.get(keys.term, timeout=T)
    await wrong.close()

    root = as_user("root", "secret")
    await root.put(keys.term, b"1", timeout=T)
    # A restarted member knows no token it gave before.
    await guarded.stop()
    await guarded.start()
    item = await root.get(keys.term, timeout=T)
    assert item is not None
    assert item.value == b"1"

    watch = PrefixWatch(root, keys.prefix, TIMINGS, CLOCK, Random(0))
    async with aclosing(watch.batches()) as batches:
        assert [change for change, _ in (await anext(batches)).changes] == [keys.term]
        await guarded.stop()
        await guarded.start()
        assert (await anext(batches)).content is not None

    etcdctl(guarded, "--user=root:secret", "user", "add", "guest", "--new-user-password=secret")
    guest = as_user("guest", "secret")
    with pytest.raises(EtcdDenied, match="permission denied"):
        await guest.get(keys.term, timeout=T)
    # A change of users outdates every token.
    assert await root.get(keys.term, timeout=T) == item
    await guest.close()
    await root.close()


async def test_credentials_that_nobody_asks_for_are_no_error(etcd: EtcdChild, keys: Keys) -> None:
    client = EtcdClient(EtcdOptions(endpoints=(etcd.endpoint,), user="root", password="secret"), TIMINGS, CLOCK)
    assert await client.get(keys.term, timeout=T) is None
    await client.close()


async def test_tls_with_certificates_of_both_sides(tmp_path: Path, keys: Keys) -> None:
    authority = trustme.CA()
    server = pem_files(authority.issue_cert("127.0.0.1"), tmp_path / "server")
    ours = pem_files(authority.issue_cert("perdure"), tmp_path / "ours")
    ca, other_ca = tmp_path / "ca.pem", tmp_path / "other-ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    trustme.CA().cert_pem.write_to_path(str(other_ca))
    child = EtcdChild(
        data_dir=tmp_path / "data",
        log_path=tmp_path / "log",
        timings=TIMINGS,
        tls=EtcdTls(ca, *server, clients_show_certificates=True),
    )
    await child.start()

    async def get(ca: Path, cert: Path | None, key: Path | None) -> None:
        options = EtcdOptions(endpoints=(f"https://{child.endpoint}",), ca=ca, cert=cert, key=key)
        client = EtcdClient(options, TIMINGS, CLOCK)
        try:
            await client.get(keys.term, timeout=T)
        finally:
            await client.close()

    await get(ca, *ours)
    with pytest.raises(EtcdDenied, match="CERTIFICATE_VERIFY_FAILED"):
        await get(other_ca, *ours)
    with pytest.raises(EtcdUnavailable):
        await get(ca, None, None)
    await child.stop()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (EtcdOptions(endpoints=()), "no endpoint"),
        (EtcdOptions(endpoints=("https://h:1",)), "needs the CA certificate"),
        (EtcdOptions(endpoints=("h:1",), ca=Path("ca"), cert=Path("c")), "belong together"),
        (EtcdOptions(endpoints=("h:1",), ca=Path("/nowhere/ca.pem")), "/nowhere/ca.pem: No such file"),
    ],
)
def test_unusable_options_are_refused_by_name(options: EtcdOptions, text: str) -> None:
    with pytest.raises(Rejected, match=text):
        EtcdClient(options, TIMINGS, CLOCK)


async def test_a_full_etcd_reads_and_renews_but_does_not_write(tmp_path: Path, keys: Keys) -> None:
    quota = ("--quota-backend-bytes=65536",)
    child = EtcdChild(data_dir=tmp_path / "data", log_path=tmp_path / "log", timings=TIMINGS, arguments=quota)
    await child.start()
    async with client_of(child.endpoint) as client:
        lease = await client.lease_grant(60, timeout=T)

        async def full() -> str:
            try:
                await client.put(keys.term, bytes(16384), timeout=T)
            except EtcdUnavailable as error:
                return error.reason.text
            return ""

        assert "space exceeded" in await eventually("etcd is full", full)
        assert [alarm.kind for alarm in await client.alarms(timeout=T)] == ["NOSPACE"]
        assert await client.keepalive_once(lease.id, timeout=T) == 60
        assert await client.get(keys.leader, timeout=T) is None
    await child.stop()
