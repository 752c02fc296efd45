"""The worker daemon as a real process, its ranks real processes, its peers played over real gRPC and a real etcd."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from controlplane.runtime.etcd_server import EtcdChild
from controlplane.runtime.host import process_is_dead
from controlplane.runtime.ids import Epoch, Term
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaPhase
from controlplane.runtime.messages.serve import SlotCursor, SlotsLost, SyncReply, SyncSlots, WorkerDraining
from controlplane.runtime.messages.session import (
    AbortGroup,
    Drained,
    Fenced,
    GroupPhase,
    Leaving,
    PrepareGroup,
    RankState,
    ReleaseReplica,
    WorkerSnapshot,
)
from controlplane.runtime.packing import pack_u32
from dataplane.progress import ProgressPage
from tests.support.cluster import eventually
from tests.support.rank_process import HANG_COLLECTIVE, PROMPT_ABORT, PROMPT_FAIL, PROMPT_HANG, expected_tokens
from tests.support.worker import REPLICA, SPEC, PlayedLeader, Stage, stage

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

PROMPT = [1, 2, 3]
EXPECTED = expected_tokens(pack_u32(PROMPT), 7, 4000)
LONG = 3000
"""Tokens of a stream that a test interrupts; some ten seconds."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def etcd(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EtcdChild]:
    folder = tmp_path_factory.mktemp("etcd")
    server = EtcdChild(data_dir=folder / "data", log_path=folder / "etcd.log")
    await server.start()
    yield server
    await server.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def played(etcd: EtcdChild, tmp_path: Path) -> AsyncIterator[Stage]:
    async with stage(etcd, tmp_path) as played:
        yield played


def abort(epoch: Epoch, kind: ReasonKind = ReasonKind.NO_PROGRESS) -> AbortGroup:
    return AbortGroup(replica=REPLICA, epoch=epoch, reason=Reason(kind=kind, text="the test says so"))


async def exit_of(leader: PlayedLeader, pid: int) -> RankState:
    return await leader.told(RankState, lambda state: state.pid == pid and state.phase.name == "EXITED")


def rank_page(folder: Path) -> ProgressPage:
    """The page of the only rank whose daemon keeps its runtime files below `folder`."""
    return ProgressPage.open(next(folder.rglob("*.page")))


def refuses(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# ---------------------------------------------------------------- serving


async def test_a_request_streams_its_tokens(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    request = await gateway.open(PROMPT, epoch)
    assert await gateway.finish_of(request.choices[0].slot) == EXPECTED[:20]


async def test_a_broken_stream_goes_on_from_the_cursor(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    first = await played.gateway(worker)
    request = await first.open(PROMPT, epoch, max_tokens=400)
    slot = request.choices[0].slot
    await eventually("tokens flow", lambda: len(first.tokens[slot]) > 10)
    await first.disconnect()
    kept = first.tokens[slot]
    second = await played.gateway(worker, incarnation=first.incarnation)
    second.tokens[slot] = kept
    cursor = SlotCursor(
        slot=slot, request=request.permit.request, choice=0, attempt=request.permit.attempt, next_index=len(kept)
    )
    await second.send(SyncSlots(slots=(cursor,)))
    assert (await second.told(SyncReply)).known == (slot,)
    assert await second.finish_of(slot) == EXPECTED[:400]


async def test_a_worker_may_start_before_its_cluster(etcd: EtcdChild, tmp_path: Path) -> None:
    played = Stage(etcd, tmp_path)
    try:
        await played.connect()
        worker = await played.worker()
        await eventually("it waits", lambda: "cluster_awaited" in worker.log_text())
        await played.open()
        await played.leader.bring_up({"cpu:0": worker.node})
    finally:
        await played.close()


# ---------------------------------------------------------------- refusals


async def test_a_taken_port_is_refused(played: Stage) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        worker = await played.worker(port=port)
        assert await worker.wait() == 2
        assert f"--port 127.0.0.1:{port} cannot be listened on" in worker.log_text()


async def test_a_second_daemon_on_a_device_is_refused(played: Stage) -> None:
    first = await played.worker()
    pid = await played.leader.idle_rank(first.node, "cpu:0")
    second = await played.worker()
    assert await second.wait() == 2
    assert f"devices in use by another worker: cpu:0 (process {pid})" in second.log_text()
    assert not process_is_dead(pid)


async def test_daemons_of_two_nodes_share_a_host(played: Stage) -> None:
    workers = [await played.worker(f"w{index}") for index in range(2)]
    for worker in workers:
        await eventually(
            f"{worker.node} attaches",
            lambda node=worker.node: any(hello.node == node for hello in played.leader.hellos),
        )


# ---------------------------------------------------------------- processes


async def test_ranks_and_zygote_die_with_their_daemon(played: Stage) -> None:
    worker = await played.worker(devices="cpu:0,cpu:1")
    for device in ("cpu:0", "cpu:1"):
        await played.leader.idle_rank(worker.node, device)
    family = worker.descendants()
    assert len(family) == 3, "a zygote and two ranks"
    worker.signal(signal.SIGKILL)
    await eventually("all are dead", lambda: all(map(process_is_dead, family)))


async def test_a_killed_rank_is_reported_and_replaced(played: Stage) -> None:
    worker = await played.worker(devices="cpu:0,cpu:1")
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    victim = await played.leader.idle_rank(worker.node, "cpu:0")
    sibling = await played.leader.idle_rank(worker.node, "cpu:1")
    gateway = await played.gateway(worker)
    request = await gateway.open(PROMPT, epoch, max_tokens=LONG)
    slot = request.choices[0].slot
    await eventually("tokens flow", lambda: len(gateway.tokens[slot]) > 10)
    os.kill(victim, signal.SIGKILL)
    gone = await exit_of(played.leader, victim)
    assert (gone.replica, gone.epoch, gone.exit_signal) == (REPLICA, epoch, signal.SIGKILL)
    assert gone.suspects == (), "a kill from outside says nothing against a request"
    lost = await gateway.told(SlotsLost)
    assert lost.slots == (slot,)
    assert not lost.suspect
    assert gateway.tokens[slot] == EXPECTED[: len(gateway.tokens[slot])]
    await played.leader.told(RankState, lambda state: state.device == "cpu:0" and state.pid not in (0, victim))
    assert not process_is_dead(sibling)


async def test_a_rank_holds_no_socket_but_its_own(played: Stage) -> None:
    worker = await played.worker(devices="cpu:0,cpu:1")
    pids = [await played.leader.idle_rank(worker.node, device) for device in ("cpu:0", "cpu:1")]
    for pid in pids:
        targets = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
        assert sum(target.startswith("socket:") for target in targets) == 1, targets


async def test_a_request_that_kills_its_rank_is_suspected(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    victim = await played.leader.idle_rank(worker.node, "cpu:0")
    request = await gateway.open([PROMPT_ABORT], epoch)
    gone = await exit_of(played.leader, victim)
    assert gone.exit_signal == signal.SIGABRT
    assert gone.suspects == (request.permit.request,)
    assert (await gateway.told(SlotsLost)).suspect


async def test_a_failed_step_ends_the_epoch_and_keeps_the_process(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    pid = await played.leader.idle_rank(worker.node, "cpu:0")
    gateway = await played.gateway(worker)
    request = await gateway.open([PROMPT_FAIL], epoch)
    failed = await played.leader.told(RankState, lambda state: bool(state.suspects))
    assert failed.phase.name == "IDLE"
    assert failed.reason is not None
    assert failed.reason.kind is ReasonKind.OUT_OF_MEMORY
    assert failed.suspects == (request.permit.request,)
    assert await played.leader.bring_up({"cpu:0": worker.node}) == epoch + 1
    assert await played.leader.idle_rank(worker.node, "cpu:0") == pid


async def test_a_killed_zygote_takes_its_ranks_and_comes_back(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    rank = await played.leader.idle_rank(worker.node, "cpu:0")
    zygote = next(pid for pid in worker.descendants() if pid != rank)
    os.kill(zygote, signal.SIGKILL)
    gone = await exit_of(played.leader, rank)
    assert gone.suspects == ()
    await played.leader.told(RankState, lambda state: state.phase.name == "IDLE" and state.pid != rank)
    assert await played.leader.bring_up({"cpu:0": worker.node}) == epoch + 1


@pytest.mark.parametrize("how", ["stopped", "hung"])
async def test_a_rank_that_does_not_let_go_is_killed_and_named(played: Stage, tmp_path: Path, how: str) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    victim = await played.leader.idle_rank(worker.node, "cpu:0")
    if how == "stopped":
        os.kill(victim, signal.SIGSTOP)
    else:
        gateway = await played.gateway(worker)
        await gateway.open([PROMPT_HANG], epoch)
        page = rank_page(tmp_path)
        await eventually("it hangs", lambda: page.collective == HANG_COLLECTIVE)
    await played.leader.send(abort(epoch))
    gone = await exit_of(played.leader, victim)
    assert gone.reason is not None
    assert gone.reason.kind is ReasonKind.NO_PROGRESS
    assert gone.reason.rank == 0
    assert gone.reason.collective == (HANG_COLLECTIVE if how == "hung" else 0)
    assert "cpu:0" in gone.reason.text
    await played.leader.group_state(REPLICA, epoch, GroupPhase.ABORTED)


async def test_abort_keeps_processes_and_release_ends_them(played: Stage) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    pid = await played.leader.idle_rank(worker.node, "cpu:0")
    await played.leader.send(abort(epoch, ReasonKind.REPLACED))
    await played.leader.group_state(REPLICA, epoch, GroupPhase.ABORTED)
    assert not process_is_dead(pid)
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    await played.leader.send(
        ReleaseReplica(replica=REPLICA, epoch=epoch, reason=Reason(kind=ReasonKind.REPLACED, text="over"))
    )
    await played.leader.group_state(REPLICA, epoch, GroupPhase.RELEASED)
    assert process_is_dead(pid)
    await played.leader.told(RankState, lambda state: state.phase.name == "IDLE" and state.pid != pid)


# ---------------------------------------------------------------- leaders, leases


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


async def test_a_daemon_outlives_etcd(played: Stage, etcd: EtcdChild) -> None:
    worker = await played.worker()
    epoch = await played.leader.bring_up({"cpu:0": worker.node})
    gateway = await played.gateway(worker)
    await etcd.stop()
    try:
        request = await gateway.open(PROMPT, epoch, max_tokens=2000)
        assert await gateway.finish_of(request.choices[0].slot) == EXPECTED[:2000]
    finally:
        await etcd.start()
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
