"""Flags of `perdure up` and `perdure serve` as overrides of the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from controlplane.config import ClusterConfig
from controlplane.config_source import ConfigError, Loc, Override

EXIT_REFUSED = 2


class UpRefused(RuntimeError):
    """The command cannot do what it was asked; each line of the text names one thing that is wrong."""


SETTINGS: dict[str, Loc] = {
    "name": ("cluster", "name"),
    "model": ("model", "path"),
    "served_model_name": ("model", "name"),
    "dtype": ("model", "dtype"),
    "numerics": ("model", "numerics"),
    "kv_cache_dtype": ("model", "kv_cache_dtype"),
    "mem_fraction_static": ("model", "mem_fraction_static"),
    "disable_cuda_graph": ("model", "disable_cuda_graph"),
    "trust_remote_code": ("model", "trust_remote_code"),
    "tensor_parallel_size": ("parallelism", "tensor_parallel_size"),
    "pipeline_parallel_size": ("parallelism", "pipeline_parallel_size"),
    "data_parallel_size": ("parallelism", "data_parallel_size"),
    "expert_parallel_size": ("parallelism", "expert_parallel_size"),
    "failure_timeout": ("fault_tolerance", "failure_timeout"),
    "heartbeat_interval": ("fault_tolerance", "heartbeat_interval"),
}
"""Each parameter and the value of the configuration that its flag sets."""

Config = Annotated[Path | None, typer.Option("--config", "-c", help="The cluster's YAML file.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"], typer.Option("--device", help="What to run on; auto: GPUs if there are any.")
]
StateFolder = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        help="Folder for etcd's data and the logs.",
        show_default="~/.perdure/NAME or $XDG_STATE_HOME/perdure/NAME",
    ),
]
ReadyFile = Annotated[
    Path | None,
    typer.Option("--ready-file", help="Write addresses and process ids there, as JSON, once all is ready."),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the cluster.", show_default="local")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--model-path",
        help="A Hugging Face folder, a .gguf file, or a name on the hub.",
        show_default="the Gemma 3 270M of the extra `demo`",
    ),
]
ServedModelName = Annotated[
    str | None, typer.Option(help="The name clients ask for.", show_default="the last part of --model")
]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", show_default="auto")]
Numerics = Annotated[
    str | None,
    typer.Option(
        help="exact: the same tokens in any batch and after any replay; fast; or auto: exact on CPUs.",
        show_default="auto",
    ),
]
KvCacheDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype", help="auto, or fp8_e4m3: twice the tokens in the same memory.", show_default="auto"
    ),
]
MemFraction = Annotated[
    float | None, typer.Option("--mem-fraction-static", help="Share of device memory to use.", show_default="0.85")
]
DisableCudaGraph = Annotated[bool, typer.Option("--disable-cuda-graph", help="Never capture CUDA graphs.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
TensorSize = Annotated[
    int | None, typer.Option("--tensor-parallel-size", "--tp", help="Ranks that share each layer.", show_default="1")
]
PipelineSize = Annotated[
    int | None, typer.Option("--pipeline-parallel-size", "--pp", help="Stages of layers.", show_default="1")
]
DataSize = Annotated[
    int | None,
    typer.Option("--data-parallel-size", "--dp", help="Replicas.", show_default="as many as the devices hold"),
]
ExpertSize = Annotated[
    int | None,
    typer.Option(
        "--expert-parallel-size",
        "--ep",
        help="Ways in which experts lie across the tensor ranks; divides the tensor size.",
        show_default="1",
    ),
]
FailureTimeout = Annotated[
    float | None, typer.Option(help="Seconds until silence counts as death; all times follow.", show_default="3")
]
HeartbeatInterval = Annotated[float | None, typer.Option(help="Seconds between heartbeats.", show_default="0.5")]


def overrides(parameters: Mapping[str, Any]) -> dict[Loc, Override]:
    """The flags that were given, as overrides. A switch that is off and an option left out say nothing."""
    return {
        loc: Override(parameters[name], "--" + name.replace("_", "-"))
        for name, loc in SETTINGS.items()
        if parameters.get(name) is not None and parameters[name] is not False
    }


def settings(config: Path | None, parameters: Mapping[str, Any]) -> ClusterConfig:
    """The configuration of a command: its file, flags winning over it. Raises ConfigError."""
    given = overrides(parameters)
    return ClusterConfig.from_flags(given) if config is None else ClusterConfig.load(config, given)


@contextmanager
def refusals(command: str) -> Iterator[None]:
    """Say what is wrong, a line each, and end with exit code 2."""
    try:
        yield
    except (ConfigError, UpRefused) as error:
        for line in str(error).splitlines():
            typer.echo(f"{command}: {line}", err=True)
        raise typer.Exit(EXIT_REFUSED) from error
