"""`perdure up`: flags in, a served model out."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated

import typer

from tools.up import options
from tools.up.plan import GRPC_PORT_DEFAULT, HTTP_PORT_DEFAULT, WORKERS_DEFAULT, LocalShape


def up_command(
    context: typer.Context,
    config: options.Config = None,
    model: options.Model = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="HTTP port of the first gateway.", show_default=str(HTTP_PORT_DEFAULT)),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Worker daemons.", show_default=str(WORKERS_DEFAULT))
    ] = None,
    controlplanes: Annotated[
        int | None, typer.Option(min=1, max=16, help="Control-plane processes.", show_default="1")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    grpc_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="gRPC port of the first control plane.",
            show_default=f"{GRPC_PORT_DEFAULT}, or a free one",
        ),
    ] = None,
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
    """Start a whole cluster on this machine and serve a model: etcd, control planes, worker daemons.

    What dies is started again. Ctrl-C stops everything in order. Flags win over --config.
    """
    # Only here: asking for help needs none of it.
    from tools.up.local import UpOptions, plan_up
    from tools.up.run import run_cluster
    from tools.up.state import default_state_dir

    with options.refusals("perdure up"):
        settings = options.settings(config, context.params)
        shape = LocalShape(workers=workers, controlplanes=controlplanes, http_port=port, grpc_port=grpc_port, host=host)
        folder = state_dir or default_state_dir(settings.cluster.name)
        asyncio.run(run_cluster(partial(plan_up, UpOptions(settings, shape, device)), folder, ready_file))
