"""Sixteen greedy streams over two replicas, and something is killed: every stream ends as if nothing had."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from controlplane.runtime.ids import (
    Attempt,
    ClusterId,
    Epoch,
    Incarnation,
    ReplicaId,
    RequestId,
    Slot,
    Term,
    draw_id,
)
from controlplane.runtime.messages.common import Permit, Sampling
from controlplane.runtime.messages.serve import Choice, OpenCode, OpenRefused, OpenRequest, ServeHello
from controlplane.runtime.packing import pack_u32
from controlplane.runtime.wire import SERVE_DOWN, SERVE_UP
from protos.perdure.v1 import serve_pb2_grpc
from tests.support.cluster import ROOT, Cluster, Daemon, eventually
from tests.support.streams import Stream, Wave, assert_beginnings, assert_identical, start_wave

pytestmark = [pytest.mark.cluster, pytest.mark.asyncio(loop_scope="session")]

STREAMS = 16
TOKENS = 200
SOME_STREAMS = 4
SOME_TOKENS = 20
REFERENCES_MAX = 3


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def undisturbed(running_cluster: Cluster) -> list[Stream]:
    """Complete by itself: on a starved machine a client of the test's own may lose its connection."""
    streams: list[Stream] = []
    for _ in range(REFERENCES_MAX):
        streams = await wave(running_cluster).finish()
        if all(stream.finish and not stream.error for stream in streams):
            return streams
    raise AssertionError(f"no undisturbed run was complete: {[stream.error for stream in streams]}")


def wave(cluster: Cluster, through: str | None = None) -> Wave:
    """The sixteen streams, through one gateway."""
    return start_wave(cluster.address(through), cluster.url(through), STREAMS, TOKENS)


async def assert_serves(cluster: Cluster, undisturbed: list[Stream], through: str | None = None) -> None:
    """Some of the streams again, in short."""
    again = await start_wave(cluster.address(through), cluster.url(through), SOME_STREAMS, SOME_TOKENS).finish()
    assert_beginnings(again, undisturbed, SOME_TOKENS)


def report(row: str, streams: list[Stream]) -> None:
    gap = max(stream.longest_gap_s for stream in streams)
    print(f"\n{row}: {len(streams)} streams complete, longest gap {gap * 1000:.0f} ms")


async def heal(cluster: Cluster, *restart: Daemon) -> dict[str, Any]:
    for daemon in restart:
        daemon.kill()
        daemon.start()
    return await cluster.wait_ready()


async def one_request(cluster: Cluster, through: str | None = None) -> Stream:
    """A new short request, complete."""
    (stream,) = await start_wave(cluster.address(through), cluster.url(through), 1, 8).finish()
    assert not stream.error, stream.error
    return stream


async def test_streams_over_two_replicas_equal_the_undisturbed_run(cluster: Cluster, undisturbed: list[Stream]) -> None:
    running = wave(cluster)
    await running.reach(20)
    status = await cluster.status()
    assert all(row["running"] > 0 for row in status["replicas"]), "both replicas carry streams"
    assert_identical(await running.finish(), undisturbed, TOKENS)


async def test_a_rank_is_killed(cluster: Cluster, undisturbed: list[Stream]) -> None:
    running = wave(cluster)
    await running.reach(30)
    victim = (await cluster.ranks())[0]
    os.kill(victim["pid"], signal.SIGKILL)
    streams = await running.finish()
    report("rank SIGKILL", streams)
    assert_identical(streams, undisturbed, TOKENS)
    status = await heal(cluster)
    epochs = {row["id"]: int(row["epoch"]) for row in status["replicas"]}
    assert epochs[victim["replica"]] > int(victim["epoch"]), "the replica came back under a higher epoch"

    async def recovered() -> dict[str, Any] | None:
        ended = [row for row in await cluster.failures() if row["replica"] == victim["replica"] and row["over"]]
        return ended[-1] if ended else None

    failure = await eventually("the failure's record is complete", recovered)
    steps = {step["phase"].removeprefix("FAILURE_PHASE_").lower(): step["after_ms"] for step in failure["steps"]}
    print(f"rank SIGKILL: {steps}, longest gap {failure['gap_ms_max']} ms: {failure['reason']['text']}")
    assert steps.keys() == {"closed", "fenced", "regrouped", "replayed", "first_token"}
    assert failure["requests"] > 0


@pytest.mark.chaos
async def test_a_worker_daemon_stands_still_for_a_moment(cluster: Cluster, undisturbed: list[Stream]) -> None:
    """Long enough that gateways give up its connections: streams go on by their cursors, or elsewhere."""
    running = wave(cluster)
    for events in (5, 40, 80):
        await running.reach(events)
        for daemon in cluster.workers.values():
            daemon.signal(signal.SIGSTOP)
        await asyncio.sleep(1.2)
        for daemon in cluster.workers.values():
            daemon.signal(signal.SIGCONT)
    assert_identical(await running.finish(), undisturbed, TOKENS)


async def test_a_worker_daemon_is_killed(cluster: Cluster, undisturbed: list[Stream]) -> None:
    running = wave(cluster)
    await running.reach(30)
    victim = cluster.workers["w0"]
    ranks = [rank["pid"] for rank in await cluster.ranks() if rank["node"] == "w0"]
    victim.kill()
    await eventually("its ranks died with it", lambda: not any(Path(f"/proc/{pid}/stat").exists() for pid in ranks))
    streams = await running.finish()
    report("worker SIGKILL", streams)
    assert_identical(streams, undisturbed, TOKENS)
    await heal(cluster, victim)


async def test_the_leader_is_killed_while_clients_sit_on_another_gateway(
    cluster: Cluster, undisturbed: list[Stream]
) -> None:
    leader = await cluster.leader()
    (other,) = [name for name in cluster.controlplanes if name != leader.name]
    running = wave(cluster, other)
    await running.reach(30)
    leader.kill()
    killed = time.monotonic()
    await one_request(cluster, other)
    accepted_after = time.monotonic() - killed
    streams = await running.finish()
    report(f"leader SIGKILL (a new request was served after {accepted_after * 1000:.0f} ms)", streams)
    assert_identical(streams, undisturbed, TOKENS)
    await heal(cluster, leader)


async def test_etcd_is_killed_and_restarted(cluster: Cluster, undisturbed: list[Stream]) -> None:
    running = wave(cluster)
    await running.reach(30)
    before = {name: daemon.pid for name, daemon in zip(cluster.controlplanes, cluster.daemons(), strict=False)}
    await cluster.etcd.kill()
    away_until = time.monotonic() + 30
    streams = await running.finish()
    report("etcd SIGKILL", streams)
    assert_identical(streams, undisturbed, TOKENS)

    async def tells() -> bool:
        status, why = await cluster.readiness()
        limited = (await cluster.status()).get("limited", {}).get("text", "")
        return status == 200 and "cannot use etcd" in why and "the leader cannot use etcd" in limited

    # It leads as ever while it may trust its lease.
    await eventually("the leader and a gateway tell that etcd is away", tells)
    while time.monotonic() < away_until:
        await one_request(cluster)
        assert await tells()
        await asyncio.sleep(1)
    await cluster.etcd.start()
    assert all(daemon.running for daemon in cluster.daemons()), "no process exits"
    status = await heal(cluster)
    assert {node["id"]: node["phase"] for node in status["nodes"]} == {
        "w0": "NODE_PHASE_LIVE",
        "w1": "NODE_PHASE_LIVE",
    }
    assert {name: daemon.pid for name, daemon in zip(cluster.controlplanes, cluster.daemons(), strict=False)} == before
    await one_request(cluster)


@pytest.mark.chaos
async def test_leader_and_etcd_are_both_away(cluster: Cluster, undisturbed: list[Stream]) -> None:
    leader = await cluster.leader()
    (other,) = [name for name in cluster.controlplanes if name != leader.name]
    victim = (await cluster.ranks())[0]
    running = wave(cluster, other)
    await running.reach(30)
    await cluster.etcd.kill()
    leader.kill()
    killed = time.monotonic()
    await one_request(cluster, other)
    accepted_after = time.monotonic() - killed
    os.kill(victim["pid"], signal.SIGKILL)
    await one_request(cluster, other)
    assert "no control plane leads" in (await cluster.status(other))["limited"]["text"]

    async def tells() -> bool:
        status, why = await cluster.readiness(other)
        return status == 200 and "no leading coordinator" in why

    await eventually("a gateway is ready, and tells that nobody leads", tells)
    streams = await running.finish()
    report(f"leader and etcd SIGKILL (a new request was served after {accepted_after * 1000:.0f} ms)", streams)
    assert_identical(streams, undisturbed, TOKENS)
    await cluster.etcd.start()
    await heal(cluster, leader)


async def test_a_worker_is_drained_by_sigterm(cluster: Cluster, undisturbed: list[Stream]) -> None:
    running = wave(cluster)
    await running.reach(30)
    victim = cluster.workers["w1"]
    victim.signal(signal.SIGTERM)
    streams = await running.finish()
    report("worker SIGTERM", streams)
    assert_identical(streams, undisturbed, TOKENS)
    assert victim.process is not None
    await eventually("the drained worker exits", lambda: victim.process.poll() is not None)  # type: ignore[union-attr]
    assert victim.process.returncode == 0
    await heal(cluster, victim)


@pytest.mark.chaos
async def test_everything_is_restarted_one_after_the_other(cluster: Cluster, undisturbed: list[Stream]) -> None:
    """Workers and control planes; a gateway lets the streams end that it has."""

    async def keep_running() -> None:
        while True:
            for daemon in cluster.daemons():
                if not daemon.running:
                    daemon.start()
            await asyncio.sleep(0.05)

    before = {daemon.pid for daemon in cluster.daemons()}
    supervisor = asyncio.create_task(keep_running())
    running = wave(cluster)
    await running.reach(10)
    restart = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tools.cli", "ctl", "rollout", "restart", "--deadline", "2"),
        *("--timeout", "90", "--address", ",".join(map(cluster.address, cluster.controlplanes))),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        output, _ = await restart.communicate()
    finally:
        supervisor.cancel()
    assert restart.returncode == 0, output.decode()
    streams = await running.finish()
    report("rolling restart", streams)
    assert_identical(streams, undisturbed, TOKENS)
    assert not before & {daemon.pid for daemon in cluster.daemons()}


async def test_a_worker_is_stopped_and_continues_as_a_zombie(cluster: Cluster, undisturbed: list[Stream]) -> None:
    running = wave(cluster)
    await running.reach(30)
    victim = cluster.workers["w0"]
    ranks = {rank["pid"] for rank in await cluster.ranks() if rank["node"] == "w0"}
    victim.signal(signal.SIGSTOP)
    stopped = time.monotonic()

    async def noticed() -> bool:
        nodes = {node["id"]: node["phase"] for node in (await cluster.status())["nodes"]}
        return nodes["w0"] in ("NODE_PHASE_UNREACHABLE", "NODE_PHASE_LOST")

    await eventually("the stopped worker is noticed", noticed)
    noticed_after = time.monotonic() - stopped
    streams = await running.finish()
    report(f"worker SIGSTOP (noticed after {noticed_after:.1f} s)", streams)
    assert_identical(streams, undisturbed, TOKENS)
    await asyncio.sleep(max(0.0, 15 - (time.monotonic() - stopped)))
    victim.signal(signal.SIGCONT)
    await heal(cluster)
    back = {rank["pid"] for rank in await cluster.ranks() if rank["node"] == "w0"}
    assert back == ranks, "it comes back with its processes and weights"
    await assert_serves(cluster, undisturbed)


async def test_a_zombie_leader_gets_nothing_accepted(cluster: Cluster, undisturbed: list[Stream]) -> None:
    leader = await cluster.leader()
    (other,) = [name for name in cluster.controlplanes if name != leader.name]
    term = int((await cluster.status(other))["leader"]["term"])
    running = wave(cluster, other)
    await running.reach(30)
    leader.signal(signal.SIGSTOP)

    async def deposed() -> bool:
        status = await cluster.status(other)
        return "leader" in status and int(status["leader"]["term"]) > term

    await eventually("a new leader is elected", deposed)
    streams = await running.finish()
    report("leader SIGSTOP", streams)
    assert_identical(streams, undisturbed, TOKENS)
    leader.signal(signal.SIGCONT)
    node = next(row for row in (await cluster.status(other))["nodes"] if row["phase"] == "NODE_PHASE_LIVE")
    replica = next(row for row in (await cluster.status(other))["replicas"] if row["members"][0]["node"] == node["id"])
    refusal = await open_with_permit(node["serve_address"], (await cluster.status(other))["cluster"], replica, term)
    assert refusal.code is OpenCode.STALE_TERM

    async def refused() -> int:
        return sum(int(row["count"]) for row in (await cluster.status(other))["fenced"])

    count = await eventually("frames of the old term are refused and counted", refused)
    last_words = [event["name"] for event in await cluster.events(leader.name, own=True)]
    assert "leader_stepped_down" in last_words
    status = await cluster.status(other)
    print(f"\nzombie leader: {count} frames refused: {status['fenced']}")
    assert status["leader"]["id"] == other
    await assert_serves(cluster, undisturbed, other)


async def open_with_permit(address: str, cluster: str, replica: dict[str, Any], term: int) -> OpenRefused:
    """Send a worker what a leader of `term` would have let a gateway send; its refusal."""
    hello = ServeHello(
        cluster=ClusterId(cluster),
        name="zombie",
        incarnation=Incarnation(draw_id()),
        highest_term_seen=Term(term),
        leader_address="",
        heartbeat_interval_ms=500,
    )
    permit = Permit(
        request=RequestId(draw_id()),
        attempt=Attempt(1),
        replica=ReplicaId(replica["id"]),
        epoch=Epoch(int(replica["epoch"])),
        term=Term(term),
    )
    body = OpenRequest(
        permit=permit, choices=(Choice(index=0, slot=Slot(1), seed=1),), prompt=pack_u32([1, 2, 3]), sampling=Sampling()
    )
    async with grpc.aio.insecure_channel(address) as channel:
        stream = serve_pb2_grpc.ServingStub(channel).Serve(timeout=30)
        await stream.write(SERVE_UP.encode(hello))
        await stream.write(SERVE_UP.encode(body))
        async for frame in stream:
            answer = SERVE_DOWN.decode(frame)
            if isinstance(answer, OpenRefused):
                return answer
    raise AssertionError("the worker did not refuse")
