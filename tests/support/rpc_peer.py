"""A gRPC server with our server options in a process of its own: `python -m tests.support.rpc_peer PORT`.

Serves grpc.health.v1 and prints "ready PORT". SIGTERM stops it gracefully: open streams keep answering for a while.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from controlplane.runtime.timing import derive_timings, server_options

GRACE_S = 5.0


async def main(port: int) -> None:
    server = grpc.aio.server(options=server_options(derive_timings()))
    health = health_aio.HealthServicer()
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        bound = server.add_insecure_port(f"127.0.0.1:{port}")
    except RuntimeError as error:
        print(f"refused: {error}", file=sys.stderr)
        raise SystemExit(3) from error
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"ready {bound}", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    stopping = asyncio.create_task(server.stop(GRACE_S))
    await asyncio.sleep(GRACE_S / 10)
    await health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    await stopping


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
