"""The other ranks of a mesh that is measured: processes of their own, a GPU each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch

from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.engine.follower import Follower
from dataplane.parallel.mesh import Formation, Mesh, Rendezvous, form_mesh
from tools.bench.start import load_shape
from tools.bench.workloads import SHAPES

HOST = "127.0.0.1"
FORM_S = 120.0


@contextmanager
def tensor_mesh(ranks: int, names: Sequence[str], options: dict[str, object]) -> Iterator[Mesh]:
    """Rank 0's mesh. The others follow an engine of each shape in `names`, in turn, until it closes."""
    if ranks == 1:
        yield Mesh.single()
        return
    rendezvous = Rendezvous.listen(HOST)
    # Fresh processes: a fork of one that has used a GPU can use none.
    with ProcessPoolExecutor(ranks - 1, mp_context=get_context("spawn")) as pool:
        others = [
            pool.submit(_follow, rank, ranks, rendezvous.address, list(names), options) for rank in range(1, ranks)
        ]
        mesh = _form(0, ranks, rendezvous)
        yield mesh
        for other in others:
            other.result()
        mesh.abort()
        mesh.close()


def _follow(rank: int, ranks: int, address: str, names: list[str], options: dict[str, object]) -> None:
    mesh = _form(rank, ranks, Rendezvous.join(address, time.monotonic() + FORM_S))
    device = torch.device("cuda", rank)
    for name in names:
        model, spec = load_shape(SHAPES[name], device, mesh, options)
        Follower(model, spec, device, None, lambda *_: None).run()
        del model
        torch.cuda.empty_cache()
    mesh.abort()
    mesh.close()


def _form(rank: int, ranks: int, rendezvous: Rendezvous) -> Mesh:
    torch.cuda.set_device(rank)
    # As a worker's ranks do: more threads than cores, and each waits for the others.
    torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks, 1))
    formation = Formation(
        degrees=ParallelDegrees(tensor=ranks),
        hosts=(HOST,) * ranks,
        nonce=f"bench-{rendezvous.store.port}",
        epoch=1,
        backend="nccl",
        collective_timeout_s=FORM_S,
    )
    return form_mesh(formation, rank, torch.device("cuda", rank), rendezvous, time.monotonic() + FORM_S)
