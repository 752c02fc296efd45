"""`perdure bench engine` and `attention`: measurements in this process, without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from controlplane.runtime.errors import Rejected

Json = Annotated[Path | None, typer.Option("--json", help="Write every number there.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the table there (needs matplotlib).")]

EXIT_UNUSABLE = 2


def engine_command(
    models: Annotated[str, typer.Option(help="On a GPU: 8b, 0.6b or both, random weights.")] = "8b,0.6b",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU if there is one.")] = "auto",
    peer: Annotated[
        Literal["none", "transformers"], typer.Option(help="Run the peer in turn with us, and print the ratio.")
    ] = "none",
    tensor: Annotated[int, typer.Option(min=1, help="GPUs that a model is cut over.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Repeats of each workload; medians count.")] = 3,
    model: Annotated[str, typer.Option(help="On a CPU: a model folder or name.")] = "gemma-3-270m",
    disable_cuda_graph: Annotated[bool, typer.Option("--disable-cuda-graph")] = False,
    overlap: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Prepare the next step while one runs.")
    ] = "auto",
    numerics: Annotated[Literal["auto", "exact", "fast"], typer.Option(help="exact: batch-invariant.")] = "auto",
    kv_cache_dtype: Annotated[Literal["auto", "fp8_e4m3"], typer.Option(help="What keys and values are kept as.")] = (
        "auto"
    ),
    profile: Annotated[bool, typer.Option("--profile", help="Take decode steps apart, too.")] = False,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Whole workloads through the engine: requests in, tokens out.

    On GPUs: (a) 256 mixed requests at once, (b) one request, (c) 32 prompts of 2,048 tokens; for one GPU beside them
    memory bandwidth and cuBLAS, measured in the same run. On a CPU: one request, 16 equal ones, a queue of 64 mixed
    ones.
    """
    # Only here: asking for help needs no torch.
    from tools.bench import engine_cpu, engine_gpu
    from tools.bench.rows import publish
    from tools.bench.start import has_gpu

    if device == "cuda" and not has_gpu():
        _refuse("engine", "--device cuda: torch finds no GPU")
    if device == "cuda" or (device == "auto" and has_gpu()):
        options = {
            "disable_cuda_graph": disable_cuda_graph,
            "overlap": overlap,
            "numerics": numerics,
            "kv_cache_dtype": kv_cache_dtype,
        }
        names = [name.strip() for name in models.split(",")]
        report = engine_gpu.measure(names, rounds, options, tensor=tensor, with_profile=profile)
    else:
        try:
            report = engine_cpu.measure(
                model, rounds, with_peer=peer == "transformers", overlap=overlap, with_profile=profile
            )
        except Rejected as error:
            _refuse("engine", str(error))
    publish(report, json, plot)


def attention_command(json: Json = None, plot: Plot = None) -> None:
    """The attention kernels alone, on a GPU: decodes against memory bandwidth, prompts against the library's."""
    from tools.bench import attention
    from tools.bench.rows import publish
    from tools.bench.start import has_gpu

    if not has_gpu():
        _refuse("attention", "needs a GPU, and torch finds none")
    publish(attention.measure(), json, plot)


def _refuse(command: str, why: str) -> NoReturn:
    """End the command with one line on standard error."""
    typer.echo(f"perdure bench {command}: {why}", err=True)
    raise typer.Exit(EXIT_UNUSABLE)
