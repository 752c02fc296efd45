"""Flags of `perdure up` and `perdure serve` as overrides of the configuration."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from controlplane.config_source import Loc, Override

SHARED_FLAGS: dict[str, Loc] = {
    "--name": ("cluster", "name"),
    "--model": ("model", "path"),
    "--served-model-name": ("model", "name"),
    "--dtype": ("model", "dtype"),
    "--numerics": ("model", "numerics"),
    "--mem-fraction-static": ("model", "mem_fraction_static"),
    "--disable-cuda-graph": ("model", "disable_cuda_graph"),
    "--trust-remote-code": ("model", "trust_remote_code"),
    "--tensor-parallel-size": ("parallelism", "tensor_parallel_size"),
    "--pipeline-parallel-size": ("parallelism", "pipeline_parallel_size"),
    "--data-parallel-size": ("parallelism", "data_parallel_size"),
    "--expert-parallel-size": ("parallelism", "expert_parallel_size"),
    "--failure-timeout": ("fault_tolerance", "failure_timeout"),
    "--heartbeat-interval": ("fault_tolerance", "heartbeat_interval"),
}
"""Each flag and the value of the configuration that it sets."""

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
    typer.Option(help="exact: the same tokens in any batch and after any replay; or fast.", show_default="exact"),
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
    typer.Option("--expert-parallel-size", "--ep", help="Tensor ranks that share the experts.", show_default="1"),
]
FailureTimeout = Annotated[
    float | None, typer.Option(help="Seconds until silence counts as death; all times follow.", show_default="3")
]
HeartbeatInterval = Annotated[float | None, typer.Option(help="Seconds between heartbeats.", show_default="0.5")]


def overrides(flags: dict[str, Any]) -> dict[Loc, Override]:
    """The flags that were given, as overrides. A switch that is off and an option left out say nothing."""
    return {
        SHARED_FLAGS[flag]: Override(value, flag)
        for flag, value in flags.items()
        if value is not None and value is not False
    }
