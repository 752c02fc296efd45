"""What the ranks of the fitting tests do. Each function runs on every rank; see tests/support/ranks.py."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ReplicaSpec
from dataplane.models.fit import FittedModel, load_model
from dataplane.models.shelf import ShelfServer
from dataplane.models.tensor_file import StoredTensor, TensorReader, list_tensors
from dataplane.parallel.mesh import Mesh
from dataplane.parallel.pipeline import StageLink
from tests.support.attention import LENGTHS, REFERENCE, register
from tests.support.ranks import Ranks

CPU = torch.device("cpu")


def load_on(mesh: Mesh, path: str, sources: tuple[str, ...] = (), **fields: Any) -> FittedModel:
    register()
    spec = ReplicaSpec(deployment=DeploymentId("test"), model_path=path, **fields)
    return load_model(spec, mesh, CPU, lambda stage, fraction: None, attention=REFERENCE, sources=sources)


def logits(model: FittedModel, prompts: list[list[int]], lengths_T: Tensor | None = None) -> Tensor | None:
    """Logits after each prompt, (N, V), gathered; None on all but the last stage."""
    mesh = model.mesh
    LENGTHS[:] = [len(item) for item in prompts]
    tokens_T = torch.tensor([token for item in prompts for token in item])
    positions_T = torch.cat([torch.arange(len(item)) for item in prompts])
    rows_N = torch.tensor(LENGTHS).cumsum(0) - 1
    link = StageLink(mesh.pipeline, model.config.hidden_size, model.dtype, CPU)
    hidden_TH = None if mesh.is_first_stage else link.receive_hidden(len(tokens_T))
    with torch.no_grad():
        out = model.forward(tokens_T if mesh.is_first_stage else None, hidden_TH, positions_T, rows_N, lengths_T)
    if not mesh.is_last_stage:
        link.send_hidden(out)
        link.drain()
        return None
    parts = mesh.tensor.all_gather(out.contiguous())
    return parts.transpose(0, 1).reshape(len(prompts), -1)[:, : model.vocab_size]


def differences(
    ranks: Ranks, paths: list[str], wanted: str, prompts: list[list[int]], degrees: dict[str, int], **fields: Any
) -> dict[str, Any]:
    """By model: the largest difference to the logits in `wanted`, and the share of parameters held here."""
    mesh = ranks.mesh(**degrees)
    reference = torch.load(wanted, weights_only=True)
    results: dict[str, Any] = {}
    for path in paths:
        model = load_on(mesh, path, **fields)
        got = logits(model, prompts)
        results[path] = {
            "difference": None if got is None else float((got - reference[path]).abs().max()),
            "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
            "layers": [layer.layer_idx for layer in model.attention],
            "heads": [[layer.q_heads, layer.kv_heads] for layer in model.attention],
        }
    mesh.close()
    return results


def read_from(ranks: Ranks, path: str, degrees: dict[str, int]) -> list[str]:
    """Names of the stored tensors whose bytes this rank reads, by watching its reader."""
    names = {(stored.file, stored.offset): name for name, stored in list_tensors(Path(path)).items()}
    seen: set[str] = set()
    read = TensorReader.read

    def watch(self: TensorReader, stored: StoredTensor, *arguments: Any) -> None:
        seen.add(names[stored.file, stored.offset])
        read(self, stored, *arguments)

    TensorReader.read = watch  # type: ignore[method-assign]
    try:
        load_on(ranks.mesh(**degrees), path)
    finally:
        TensorReader.read = read  # type: ignore[method-assign]
    return sorted(seen)


def peak_bytes(ranks: Ranks, path: str, degrees: dict[str, int]) -> list[int]:
    """How far resident memory rose while the model was loaded: from files, then from a rank that holds it as well."""
    mesh = ranks.mesh(**degrees)
    # A first load brings in code and buffers; its weights go again.
    load_on(mesh, path)
    with rise_of_memory() as risen:
        held = load_on(mesh, path)
    from_files = risen()
    with closing(ShelfServer("127.0.0.1", CPU)) as server:
        server.show(held.shelf)
        with rise_of_memory() as risen:
            load_on(mesh, path, sources=(server.address,))
        return [from_files, risen()]


@contextmanager
def rise_of_memory() -> Iterator[Callable[[], int]]:
    """How far resident memory, file pages included, has risen at most since the block began, in bytes."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield lambda: _status("VmHWM") - before


def _status(field: str) -> int:
    """A size from the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def next_epoch(ranks: Ranks, path: str, prompts: list[list[int]]) -> bool:
    """The same weights, over the groups of a second epoch, after the first was aborted."""
    first = ranks.mesh(tensor=2, expert=2)
    model = load_on(first, path)
    before = logits(model, prompts)
    first.abort()
    first.close()
    again = logits(model.attach(ranks.mesh(tensor=2, expert=2)), prompts)
    assert before is not None
    assert again is not None
    return torch.equal(before, again)
