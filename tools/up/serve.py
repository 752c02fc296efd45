"""`perdure serve`: one command on every host. Rank 0 also runs etcd and a control plane; every rank runs a worker.

Under Slurm the rank is SLURM_PROCID and the number of hosts SLURM_NTASKS.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

import typer

from tools.up import options
from tools.up.plan import GRPC_PORT_DEFAULT, HTTP_PORT_DEFAULT

MASTER_PORT_DEFAULT = 2379


def serve_command(
    context: typer.Context,
    config: options.Config = None,
    model: options.Model = None,
    world_size: Annotated[int, typer.Option(min=1, envvar="SLURM_NTASKS", help="Number of hosts.")] = 1,
    rank: Annotated[int, typer.Option(min=0, envvar="SLURM_PROCID", help="This host's number, from 0.")] = 0,
    master_addr: Annotated[
        str, typer.Option(envvar="MASTER_ADDR", help="Host of rank 0, as the others reach it.")
    ] = "127.0.0.1",
    master_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of etcd at rank 0.")] = MASTER_PORT_DEFAULT,
    port: Annotated[int, typer.Option(min=1, max=65535, help="HTTP port at rank 0.")] = HTTP_PORT_DEFAULT,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="gRPC port at rank 0.")] = GRPC_PORT_DEFAULT,
    device: options.Device = "auto",
    served_model_name: options.ServedModelName = None,
    dtype: options.Dtype = None,
    numerics: options.Numerics = None,
    kv_cache_dtype: options.KvCacheDtype = None,
    tensor_parallel_size: options.TensorSize = None,
    pipeline_parallel_size: options.PipelineSize = None,
    data_parallel_size: options.DataSize = None,
    expert_parallel_size: options.ExpertSize = None,
    mem_fraction_static: options.MemFraction = None,
    disable_cuda_graph: options.DisableCudaGraph = False,
    trust_remote_code: options.TrustRemoteCode = False,
    failure_timeout: options.FailureTimeout = None,
    heartbeat_interval: options.HeartbeatInterval = None,
    name: options.Name = None,
    state_dir: options.StateFolder = None,
    ready_file: options.ReadyFile = None,
) -> None:
    """Start this host's part of a cluster. Run it once on every host, with the same flags but --rank.

    Rank 0 runs etcd, a control plane and a worker, every other rank a worker. The model lies at one path everywhere.
    """
    # Only here: asking for help needs none of it.
    from tools.up.host_part import HostPart, plan_host
    from tools.up.run import run_cluster
    from tools.up.state import default_state_dir

    with options.refusals("perdure serve"):
        if rank >= world_size:
            raise options.UpRefused(f"--rank {rank} must be below --world-size {world_size}")
        settings = options.settings(config, context.params)
        part = HostPart(
            rank=rank,
            world_size=world_size,
            master_host=master_addr,
            master_port=master_port,
            grpc_port=grpc_port,
            http_port=port,
            device=device,
        )
        # Hosts that share a home folder must not share a state folder.
        cluster = settings.cluster.name
        folder = state_dir or default_state_dir(cluster if rank == 0 else f"{cluster}-{rank}")
        asyncio.run(run_cluster(partial(plan_host, settings, part), folder, ready_file))
