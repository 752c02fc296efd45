"""The worker daemon as a real process, its ranks real processes, its peers played over real gRPC and a real etcd."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from controlplane.runtime.etcd_server import EtcdChild
from controlplane.runtime.host import process_is_dead
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.messages.serve import SlotCursor, SlotsLost, SyncReply, SyncSlots
from controlplane.runtime.messages.session import (
    GroupPhase,
    RankState,
    ReleaseReplica,
)
from dataplane.progress import ProgressPage
from tests.support.cluster import eventually
from tests.support.rank_process import HANG_COLLECTIVE, PROMPT_ABORT, PROMPT_FAIL, PROMPT_HANG
from tests.support.worker import Stage
from tests.support.worker_peers import EXPECTED, PROMPT, REPLICA, PlayedLeader, abort

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="module")]

LONG = 3000
"""Tokens of a stream that a test interrupts; some ten seconds."""


async def exit_of(leader: PlayedLeader, pid: int) -> RankState:
    return await leader.told(RankState, lambda state: state.pid == pid and state.phase.name == "EXITED")


def rank_page(folder: Path) -> ProgressPage:
    """The page of the only rank whose daemon keeps its runtime files below `folder`."""
    return ProgressPage.open(next(folder.rglob("*.page")))


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


async def test_a_worker_may_start_before_its_cluster(stage_etcd: EtcdChild, tmp_path: Path) -> None:
    played = Stage(stage_etcd, tmp_path)
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
