"""A real worker daemon whose leader, lease or etcd goes, and how it goes itself; its peers are played."""

from __future__ import annotations

import signal
import socket

import pytest

from controlplane.runtime.etcd_server import EtcdChild
from controlplane.runtime.host import process_is_dead
from controlplane.runtime.ids import Term
from controlplane.runtime.messages.common import ReplicaPhase
from controlplane.runtime.messages.serve import WorkerDraining
from controlplane.runtime.messages.session import (
    Drained,
    Fenced,
    Leaving,
    PrepareGroup,
    WorkerSnapshot,
)
from tests.support.cluster import eventually
from tests.support.worker import Stage
from tests.support.worker_peers import EXPECTED, PROMPT, REPLICA, SPEC, PlayedLeader, abort

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_a_higher_term_takes_the_session_over(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    successor = PlayedLeader(term=2)
    await successor.start()
    try:
        await played.put_leader(successor)
        snapshot = await successor.told(WorkerSnapshot)
        assert [(info.replica, info.epoch, info.phase) for info in snapshot.replicas] == [
            (REPLICA, epoch, ReplicaPhase.READY)
        ]
        await eventually("the old session ends", lambda: played.leader.ended == 1)
    finally:
        await successor.stop()


async def test_a_silent_leader_is_left_as_soon_as_another_leads(played: Stage) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        silent = PlayedLeader(term=2)
        silent.port = deaf.getsockname()[1]
        await played.put_leader(silent)
        worker = await played.worker()
        await eventually("it knocks at the deaf one", lambda: '"term": 2' in worker.log_text())
        played.leader.term = Term(3)
        await played.put_leader(played.leader)
        await played.leader.told(WorkerSnapshot)
        assert "the leader is elsewhere" in worker.log_text()


async def test_frames_of_an_old_term_are_refused_and_counted(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    await played.leader.send(abort(epoch), term=0)
    fenced = await played.leader.told(Fenced)
    assert (fenced.frame, fenced.seen_term, fenced.highest_term) == ("AbortGroup", 0, 1)
    await played.leader.send(
        PrepareGroup(replica=REPLICA, epoch=epoch, members=(), nonce="another", spec=SPEC, deadline_ms=0)
    )
    stale = await played.leader.told(Fenced, lambda body: body.frame == "PrepareGroup")
    assert stale.seen_epoch == epoch


async def test_a_daemon_outlives_its_leader(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    request = await gateway.open(PROMPT, epoch, max_tokens=500)
    await played.leader.stop()
    assert await gateway.finish_of(request.choices[0].slot) == EXPECTED[:500]
    again = PlayedLeader(term=2)
    await again.start()
    try:
        await played.put_leader(again)
        await again.told(WorkerSnapshot)
    finally:
        await again.stop()


async def test_a_revoked_lease_is_renewed_and_nothing_closed(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    request = await gateway.open(PROMPT, epoch, max_tokens=1000)
    before = await played.node_record(worker.node)
    assert before is not None
    await played.client.lease_revoke(before.lease_id, timeout=5)

    async def registered_anew() -> bool:
        now = await played.node_record(worker.node)
        return now is not None and now.lease_id != before.lease_id and now.incarnation == before.incarnation

    await eventually("it is registered anew", registered_anew)
    assert await gateway.finish_of(request.choices[0].slot) == EXPECTED[:1000]


async def test_a_daemon_that_stood_still_past_its_lease_goes_on_unless_its_leader_ends_it(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    rank = await played.leader.idle_rank(worker.node, "cpu:0")
    before = await played.node_record(worker.node)
    assert before is not None
    worker.signal(signal.SIGSTOP)

    async def gone() -> bool:
        return await played.node_record(worker.node) is None

    await eventually("its lease expires", gone)
    worker.signal(signal.SIGCONT)
    await eventually("it notices", lambda: '"lease_gone"' in worker.log_text())

    async def registered_anew() -> bool:
        now = await played.node_record(worker.node)
        return now is not None and now.incarnation == before.incarnation

    await eventually("it is registered anew", registered_anew)
    await eventually("it attaches again", lambda: len(played.leader.hellos) == 2)
    assert '"replica_closed"' not in worker.log_text()
    assert not process_is_dead(rank)
    assert await played.leader.bring_up({"cpu:0": worker.node}) == epoch + 1


async def test_a_daemon_outlives_etcd(played: Stage, stage_etcd: EtcdChild) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    await stage_etcd.stop()
    try:
        request = await gateway.open(PROMPT, epoch, max_tokens=2000)
        assert await gateway.finish_of(request.choices[0].slot) == EXPECTED[:2000]
    finally:
        await stage_etcd.start()
    assert worker.log_text().count("session_begun") == 1

    async def registered() -> bool:
        return await played.node_record(worker.node) is not None

    await eventually("its key stands", registered)


# ---------------------------------------------------------------- leaving


async def test_sigterm_lets_streams_finish_and_closes_the_listener_last(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    request = await gateway.open(PROMPT, epoch, max_tokens=300)
    slot = request.choices[0].slot
    await eventually("tokens flow", lambda: len(gateway.tokens[slot]) > 0)
    worker.signal(signal.SIGTERM)
    await played.leader.told(Leaving)
    await gateway.told(WorkerDraining)

    async def closed() -> bool:
        # The port is looked at first: what must have come before it is looked at after it.
        refused = refuses(worker.port)
        assert not refused or await played.node_record(worker.node) is None, "the listener closed under a lease"
        return refused

    await eventually("the port refuses", closed)
    # A stream under a listener that closes is cut off. On a busy machine its end may be read after the refusal.
    assert await eventually("the stream ends", lambda: gateway.ended) == "FAILED_PRECONDITION: the worker leaves"
    assert await worker.wait() == 0
    assert gateway.tokens[slot] == EXPECTED[:300]
    await played.leader.told(Drained)


async def test_a_second_sigterm_ends_the_drain(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    request = await gateway.open(PROMPT, epoch, max_tokens=4000)
    slot = request.choices[0].slot
    await eventually("tokens flow", lambda: len(gateway.tokens[slot]) > 0)
    worker.signal(signal.SIGTERM)
    await gateway.told(WorkerDraining)
    worker.signal(signal.SIGTERM)
    assert await worker.wait() == 0
    assert slot not in gateway.finished
    assert await played.node_record(worker.node) is None
