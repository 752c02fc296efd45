"""Who leads: one at a time, in terms that only rise, whatever happens to leaders and to etcd."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import grpc.aio
from structlog.testing import capture_logs
from structlog.typing import EventDict

from controlplane.election import Election, Heard, Lost, Muted, Won
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_server import EtcdChild, free_port
from controlplane.runtime.ids import Incarnation, Term, draw_id
from controlplane.runtime.keys import Keys
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.messages.common import Reason, ReasonKind
from controlplane.runtime.records import LeaderRecord, PeerRecord, from_json, to_json
from controlplane.runtime.timing import Timings, derive_timings, server_options
from tests.support.cluster import ROOT, eventually
from tests.support.etcd import CLOCK, TIMINGS, client_of, restore_snapshot, running, save_snapshot, stopped

T = 2.0
PATIENT = derive_timings(failure_timeout=60.0, heartbeat_interval=0.25)
"""A lease that does not expire during a test: what happens then is no work of its TTL."""

ASKED = Reason(kind=ReasonKind.ADMIN, text="asked to")


class Candidate:
    """A control plane as far as elections go, with all that it said."""

    def __init__(
        self, client: EtcdClient, keys: Keys, name: str, *, address: str = "127.0.0.1:1", timings: Timings = TIMINGS
    ) -> None:
        self.record = PeerRecord(
            name=name, incarnation=Incarnation(draw_id()), address=address, url="", pid=os.getpid()
        )
        self.leader = LeaderWatch(client, keys, timings, CLOCK, Random(0))
        self.election = Election(client, keys, self.record, self.leader, timings, CLOCK, Random(0))
        self.said: list[Won | Muted | Heard | Lost] = []

    async def run(self) -> None:
        await self.election.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.leader.run())
            tasks.create_task(self.election.run())
            tasks.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self.election.events():
            self.said.append(event)

    async def leads(self, term: int | None = None) -> None:
        await eventually(
            f"{self.record.name} leads in term {term}",
            lambda: self.election.term is not None and term in (None, self.election.term),
        )

    async def lost(self) -> Lost:
        return await eventually(
            f"{self.record.name} lost", lambda: next((event for event in self.said if isinstance(event, Lost)), None)
        )


@asynccontextmanager
async def standing(*candidates: Candidate) -> AsyncIterator[None]:
    async with running(*(candidate.run() for candidate in candidates)):
        yield


async def stored(client: EtcdClient, keys: Keys) -> LeaderRecord | None:
    item = await client.get(keys.leader, timeout=T)
    return from_json(item.value, LeaderRecord) if item is not None else None


async def test_one_of_several_leads_and_all_see_it(client: EtcdClient, keys: Keys) -> None:
    candidates = [Candidate(client, keys, name) for name in ("a", "b", "c")]
    async with standing(*candidates):
        await eventually("all see a leader", lambda: all(candidate.leader.current for candidate in candidates))
        leaders = [candidate for candidate in candidates if candidate.election.term is not None]
        assert [candidate.said for candidate in leaders] == [[Won(Term(1))]]
        record = await stored(client, keys)
        assert record is not None
        assert (record.name, record.term, record.pid) == (leaders[0].record.name, 1, os.getpid())
        assert {candidate.leader.current for candidate in candidates} == {record}
        assert leaders[0].election.leader_value == to_json(record)
        assert leaders[0].election.trusted
        assert not any(other.election.trusted for other in candidates if other not in leaders)
    for candidate in candidates:
        await candidate.election.close()


async def test_a_leader_that_closes_is_followed_at_once(client: EtcdClient, keys: Keys) -> None:
    first = Candidate(client, keys, "a", timings=PATIENT)
    second = Candidate(client, keys, "b", timings=PATIENT)
    async with standing(second):
        async with standing(first):
            pass
        await first.election.close()
        await second.leads()
    await second.election.close()


async def test_a_leader_that_falls_silent_is_followed_when_its_lease_ends(client: EtcdClient, keys: Keys) -> None:
    first, second = Candidate(client, keys, "a"), Candidate(client, keys, "b")
    async with AsyncExitStack() as stack:
        async with standing(first):
            await first.leads(1)
            await stack.enter_async_context(standing(second))
            await eventually("b sees a", lambda: second.leader.current)
        # Its tasks are over, as those of a stopped process; what it believes is still there.
        await second.leads(2)
        assert first.election.term == 1
        assert not first.election.trusted
    await second.election.close()


async def test_a_zombie_leader_learns_that_it_lost(client: EtcdClient, keys: Keys) -> None:
    zombie, second = Candidate(client, keys, "a"), Candidate(client, keys, "b")
    async with standing(zombie):
        await zombie.leads(1)
        async with standing(second):
            item = await client.get(keys.leader, timeout=T)
            assert item is not None
            await client.lease_revoke(item.lease, timeout=T)
            lost = await zombie.lost()
            # Whichever news came first: of its lease, of its key, or of the next term.
            assert lost.reason.kind in (ReasonKind.LEASE_EXPIRED, ReasonKind.NOT_LEADER, ReasonKind.STALE_TERM)
            await eventually("one leads again", lambda: zombie.election.term or second.election.term)
            assert (zombie.election.term or second.election.term) == 2
    await second.election.close()
    await zombie.election.close()


async def test_a_deleted_key_is_noticed_and_won_again_in_a_higher_term(client: EtcdClient, keys: Keys) -> None:
    alone = Candidate(client, keys, "a")
    async with standing(alone):
        await alone.leads(1)
        await client.delete(keys.leader, timeout=T)
        await alone.leads(2)
        assert alone.said[0] == Won(Term(1))
        assert isinstance(alone.said[1], Lost)
        assert alone.said[2] == Won(Term(2))
    await alone.election.close()


async def test_a_failed_guard_makes_the_leader_look(client: EtcdClient, keys: Keys) -> None:
    alone = Candidate(client, keys, "a")
    async with standing(alone):
        await alone.leads(1)
        alone.election.doubt()
        await client.put(keys.leader, b"{}", timeout=T)
        alone.election.doubt()
        lost = await alone.lost()
        assert lost.reason.kind is ReasonKind.NOT_LEADER
        assert alone.said == [Won(Term(1)), lost]
    await alone.election.close()


async def test_stepping_down_leaves_the_key_to_others_and_pauses(client: EtcdClient, keys: Keys) -> None:
    first, second = Candidate(client, keys, "a"), Candidate(client, keys, "b")
    async with standing(first):
        await first.leads(1)
        async with standing(second):
            await eventually("b sees a", lambda: second.leader.current)
            await first.election.step_down(ASKED, 600.0, Term(0))
            assert first.election.leader_value is None
            await second.leads(2)
            assert first.said == [Won(Term(1)), Lost(ASKED)]
            await second.election.step_down(ASKED, 0.0, Term(0))
            # The first one still pauses.
            await second.leads(3)
    await first.election.close()
    await second.election.close()


async def test_a_higher_term_met_is_topped(client: EtcdClient, keys: Keys) -> None:
    alone = Candidate(client, keys, "a")
    async with standing(alone):
        await alone.leads(1)
        await alone.election.step_down(ASKED, 0.0, Term(41))
        await alone.leads(42)
        alone.leader.hint("", Term(70))
        await alone.leads(71)
        stored_term = await client.get(keys.term, timeout=T)
        assert stored_term is not None
        assert stored_term.value == b"71"
    await alone.election.close()


async def test_a_key_of_ours_that_no_answer_confirmed_is_cleared_away(client: EtcdClient, keys: Keys) -> None:
    alone = Candidate(client, keys, "a")
    lease = await client.lease_grant(60, timeout=T)
    unconfirmed = LeaderRecord(
        name="a", incarnation=alone.record.incarnation, term=Term(9), address=alone.record.address, pid=1
    )
    await client.put(keys.leader, to_json(unconfirmed), lease=lease.id, timeout=T)
    async with standing(alone):
        await alone.leads()
        assert (alone.election.term or 0) > 9
    await alone.election.close()


async def test_muted_and_heard_over_an_absence_of_etcd(own_etcd: EtcdChild, keys: Keys) -> None:
    async with client_of(own_etcd.endpoint) as client:
        alone = Candidate(client, keys, "a")
        async with standing(alone):
            await alone.leads(1)
            await own_etcd.kill()
            await eventually("muted", lambda: Muted() in alone.said)
            assert not alone.election.trusted
            # Frozen, not deposed: it leads on with what needs no etcd.
            assert alone.election.term == 1
            await own_etcd.start()
            await eventually("heard", lambda: Heard() in alone.said)
            assert alone.said == [Won(Term(1)), Muted(), Heard()]
            assert alone.election.trusted


async def test_a_leader_stopped_past_its_lease_is_not_trusted_for_a_moment(own_etcd: EtcdChild, keys: Keys) -> None:
    async with client_of(own_etcd.endpoint) as client:
        alone = Candidate(client, keys, "a")
        async with standing(alone):
            await alone.leads(1)
            with stopped(own_etcd):
                await eventually("trust ends", lambda: not alone.election.trusted)
                await eventually("muted", lambda: Muted() in alone.said)
            await eventually("trusted again", lambda: alone.election.trusted)


async def test_terms_rise_across_a_restored_snapshot(own_etcd: EtcdChild, keys: Keys, tmp_path: Path) -> None:
    async with client_of(own_etcd.endpoint) as client:
        first, second = Candidate(client, keys, "a"), Candidate(client, keys, "b")
        async with standing(first):
            await first.leads(1)
            async with standing(second):
                save_snapshot(own_etcd, tmp_path / "snapshot")
                for term in (2, 3, 4):
                    leader = first if first.election.term is not None else second
                    await leader.election.step_down(ASKED, 0.0, Term(0))
                    await eventually(
                        f"term {term}", lambda term=term: term in (first.election.term, second.election.term)
                    )
                    await eventually("both see it", lambda term=term: _highest(first, second) == (term, term))
                await restore_snapshot(own_etcd, tmp_path / "snapshot")

                async def settled() -> bool:
                    record = await stored(client, keys)
                    terms = {first.election.term, second.election.term} - {None}
                    return record is not None and record.term > 4 and terms == {record.term}

                await eventually("a leader above every term seen", settled)
                terms = [event.term for who in (first, second) for event in who.said if isinstance(event, Won)]
                assert len(terms) == len(set(terms)), "a term was held twice"


def _highest(*candidates: Candidate) -> tuple[Term, ...]:
    return tuple(candidate.leader.highest_term for candidate in candidates)


@asynccontextmanager
async def leader_process(endpoint: str, keys: Keys, address: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A leader of its own process with a real gRPC port, that can be killed."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.leader_process", endpoint, keys.cluster_name, address),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_killed_leader_is_proven_dead_long_before_its_lease_ends(
    etcd: EtcdChild, client: EtcdClient, keys: Keys
) -> None:
    address = f"127.0.0.1:{free_port('127.0.0.1')}"
    standby = Candidate(client, keys, "standby", timings=PATIENT)
    async with leader_process(etcd.endpoint, keys, address) as process:
        await eventually("the process leads", lambda: stored(client, keys))
        async with standing(standby):
            with capture_logs() as logs:
                await eventually("the standby is connected", lambda: _guarded(logs))
            process.kill()
            await standby.leads(2)
    await standby.election.close()


async def test_a_leader_that_never_answered_the_standby_is_left_to_its_lease(client: EtcdClient, keys: Keys) -> None:
    """Its address may be wrong: refusing proves nothing then."""
    first = Candidate(client, keys, "a", address=f"127.0.0.1:{free_port('127.0.0.1')}")
    second = Candidate(client, keys, "b")
    async with standing(first):
        await first.leads(1)
        async with standing(second):
            await eventually("b sees a", lambda: second.leader.current)
            long_enough = CLOCK.now() + TIMINGS.lease_ttl
            await eventually("time to prove it dead", lambda: CLOCK.now() > long_enough)
            assert first.said == [Won(Term(1))]
            assert second.said == []
    await first.election.close()
    await second.election.close()


async def test_a_leader_whose_port_lies_is_revoked_once(client: EtcdClient, keys: Keys) -> None:
    port = free_port("127.0.0.1")
    server = grpc.aio.server(options=server_options(TIMINGS))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    first = Candidate(client, keys, "a", address=f"127.0.0.1:{port}")
    second = Candidate(client, keys, "b")
    async with standing(first):
        await first.leads(1)
        async with standing(second):
            with capture_logs() as logs:
                await eventually("b is connected", lambda: _guarded(logs))
            await server.stop(None)
            await first.lost()
            await eventually("one leads", lambda: first.election.term or second.election.term)
            # Alive after all: give it the lead again, with its port as closed as before.
            if second.election.term is not None:
                await second.election.step_down(ASKED, 600.0, Term(0))
            await first.leads()
            term = first.election.term
            long_enough = CLOCK.now() + TIMINGS.lease_ttl
            await eventually("time to prove it dead again", lambda: CLOCK.now() > long_enough)
            assert first.election.term == term
    await first.election.close()
    await second.election.close()


def _guarded(logs: list[EventDict]) -> bool:
    """True once a standby's connection to the leader worked."""
    return any(entry["event"] == "leader_guarded" for entry in logs)
