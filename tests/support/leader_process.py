"""A process that stands for leader with a gRPC port of its own, to be killed: python -m … ENDPOINT CLUSTER ADDRESS."""

from __future__ import annotations

import asyncio
import os
import sys
from random import Random

import grpc.aio

from controlplane.election import Election
from controlplane.runtime.clock import SystemClock
from controlplane.runtime.etcd import EtcdClient
from controlplane.runtime.etcd_types import EtcdOptions
from controlplane.runtime.ids import Incarnation, draw_id
from controlplane.runtime.keys import Keys
from controlplane.runtime.leader import LeaderWatch
from controlplane.runtime.records import PeerRecord
from controlplane.runtime.timing import derive_timings, server_options


async def main(endpoint: str, cluster: str, address: str) -> None:
    timings, clock, random = derive_timings(60.0, 0.25), SystemClock(), Random()
    server = grpc.aio.server(options=server_options(timings))
    server.add_insecure_port(address)
    await server.start()
    client = EtcdClient(EtcdOptions(endpoints=(endpoint,)), timings, clock)
    keys = Keys(cluster)
    peer = PeerRecord(name="process", incarnation=Incarnation(draw_id()), address=address, url="", pid=os.getpid())
    leader = LeaderWatch(client, keys, timings, clock, random)
    election = Election(client, keys, peer, leader, timings, clock, random)
    await election.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(leader.run())
        tasks.create_task(election.run())


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
