"""`perdure up`: flags in, a served model out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Literal

import typer

from controlplane.config import ClusterConfig
from controlplane.config_source import ConfigError
from tools.up import options
from tools.up.plan import GRPC_PORT_DEFAULT, HTTP_PORT_DEFAULT, WORKERS_DEFAULT, LocalShape

Devices = Literal["auto", "cpu", "cuda"]


def up_command(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The cluster's YAML file.")] = None,
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
    device: Annotated[Devices, typer.Option(help="What to run on; auto: GPUs if there are any.")] = "auto",
    served_model_name: options.ServedModelName = None,
    dtype: options.Dtype = None,
    numerics: options.Numerics = None,
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
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for etcd's data and the logs.", show_default="~/.perdure/NAME or $XDG_STATE_HOME/perdure/NAME"
        ),
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Write addresses and process ids there, as JSON, once all is ready.")
    ] = None,
) -> None:
    """Start a whole cluster on this machine and serve a model: etcd, control planes, worker daemons.

    What dies is started again. Ctrl-C stops everything in order. Flags win over --config.
    """
    # Only here: asking for help needs none of it.
    from tools.up.run import UpOptions, UpRefused, run_up

    given = options.overrides(
        {
            "--name": name,
            "--model": model,
            "--served-model-name": served_model_name,
            "--dtype": dtype,
            "--numerics": numerics,
            "--mem-fraction-static": mem_fraction_static,
            "--disable-cuda-graph": disable_cuda_graph,
            "--trust-remote-code": trust_remote_code,
            "--tensor-parallel-size": tensor_parallel_size,
            "--pipeline-parallel-size": pipeline_parallel_size,
            "--data-parallel-size": data_parallel_size,
            "--expert-parallel-size": expert_parallel_size,
            "--failure-timeout": failure_timeout,
            "--heartbeat-interval": heartbeat_interval,
        }
    )
    try:
        settings = ClusterConfig.from_flags(given) if config is None else ClusterConfig.load(config, given)
        shape = LocalShape(workers=workers, controlplanes=controlplanes, http_port=port, grpc_port=grpc_port, host=host)
        asyncio.run(run_up(UpOptions(settings, shape, device, state_dir, ready_file)))
    except (ConfigError, UpRefused) as error:
        for line in str(error).splitlines():
            typer.echo(f"perdure up: {line}", err=True)
        raise typer.Exit(2) from error
