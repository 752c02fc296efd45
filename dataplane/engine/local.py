"""The engine as a library: one model in this process, or over ranks that nobody has to start.

    with open_engine("gemma-3-270m", tensor=2) as engine:
        for answer in engine.generate(["The capital of France is"], Sampling(temperature=0, max_tokens=24)):
            print(answer.text)

Run by itself, such a script starts the ranks that its degrees ask for beside its own, rank 0, on this machine. Run by
torchrun, on one machine or many, it is every rank: each makes the same calls, and all get the answers. No cluster, so
a rank that dies ends the run.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer

from controlplane.runtime.errors import invalid
from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec, Sampling
from dataplane.engine.library import Generated, submission
from dataplane.engine.replicas import Replicas
from dataplane.engine.setup import Report
from dataplane.frames import Finished, Logprobs
from dataplane.models.demo import resolve_model
from dataplane.models.fit import load_model
from dataplane.parallel.mesh import Formation, Mesh, Rendezvous, form_mesh, world_size
from dataplane.zygote import die_with_parent

HOST = "127.0.0.1"
FORM_S = 300.0
"""Limit for all ranks to come, in seconds: each imports torch first."""

EXCHANGE_S = 300.0
"""Limit of an exchange between ranks, in seconds."""

_SPEC_KEY = "spec"
_meshes = count(1)

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What followed one prompt."""

    prompt_tokens: list[int]
    tokens: list[int]
    # "" for a model folder without a tokenizer.
    text: str
    logprobs: list[Logprobs]
    finished: Finished


class LocalEngine:
    """A model that is ready to generate. See `open_engine`."""

    def __init__(self, replicas: Replicas, tokenizer: Tokenizer | None) -> None:
        self._replicas = replicas
        self._tokenizer = tokenizer

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling]) -> list[Answer]:
        """Run `prompts`, texts or token ids, as one batch over all replicas; the answers come in their order.

        `sampling`: one for all, or one a prompt. Raises Rejected for a text without a tokenizer, PeerLost when a rank
        dies. A prompt that cannot run has an answer whose `finished` holds the error.
        """
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        ids = [self._encode(prompt) for prompt in prompts]
        items = [submission(n, *item) for n, item in enumerate(zip(ids, settings, strict=True))]
        answers = self._replicas.generate(items)
        assert answers is not None, "rank 0 left while other ranks still wanted answers"
        return [self._answer(*item) for item in zip(ids, answers, strict=True)]

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise invalid("the model folder has no tokenizer.json: give token ids")
        return self._tokenizer.encode(prompt).ids

    def _answer(self, prompt_tokens: list[int], given: Generated) -> Answer:
        assert given.finished is not None, "every sequence ends"
        text = "" if self._tokenizer is None else self._tokenizer.decode(given.tokens)
        return Answer(prompt_tokens, given.tokens, text, given.logprobs, given.finished)


@contextmanager
def open_engine(
    model: str,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    data: int = 1,
    expert: int = 1,
    report: Report = lambda *_: None,
    **spec: Any,
) -> Iterator[LocalEngine]:
    """An engine for `model` (a folder, a .gguf file, a hub name or "gemma-3-270m"), until the block ends.

    The degrees multiply to the number of ranks, but for `expert`, which divides `tensor`: experts lie across the same
    ranks. Every replica of `data` has its own cache. `spec` names further fields of ReplicaSpec (dtype, block_tokens,
    kv_cache_tokens, …). Raises Rejected when the model or the degrees cannot be had, PeerLost when a rank does not
    come.
    """
    degrees = ParallelDegrees(tensor=tensor, pipeline=pipeline, data=data, expert=expert)
    wanted = ReplicaSpec(deployment=DeploymentId("local"), model_path=model, degrees=degrees, **spec)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        with _joined(wanted, os.environ, report) as engine:
            yield engine
        return
    # Once, here: not in each rank.
    wanted = replace(wanted, model_path=str(resolve_model(model, report)))
    with _started_ranks(wanted) as environment, _joined(wanted, environment, report) as engine:
        yield engine


@contextmanager
def _started_ranks(spec: ReplicaSpec) -> Iterator[Mapping[str, str]]:
    """Start all ranks but this one on this machine; what this one's environment would be. They end with the block."""
    size = world_size(spec.degrees)
    rendezvous = Rendezvous.listen(HOST)
    rendezvous.store.set(_SPEC_KEY, msgspec.json.encode(spec))
    shared = {"MASTER_ADDR": HOST, "MASTER_PORT": str(rendezvous.store.port), "WORLD_SIZE": str(size)}

    def places(rank: int) -> dict[str, str]:
        return {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}

    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "dataplane.engine.local", str(os.getpid())], env={**os.environ, **places(rank)}
        )
        for rank in range(1, size)
    ]
    try:
        yield {**places(0), _STORE_IS_THERE: "True"}
        for rank in ranks:
            rank.wait()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


_STORE_IS_THERE = "TORCHELASTIC_USE_AGENT_STORE"
"""torchrun's word for: the store at MASTER_ADDR:MASTER_PORT is held by someone else than rank 0."""


@contextmanager
def _joined(spec: ReplicaSpec, environment: Mapping[str, str], report: Report) -> Iterator[LocalEngine]:
    """This process as the rank that `environment` says it is, in torchrun's words."""
    size, rank = int(environment["WORLD_SIZE"]), int(environment["RANK"])
    if size != world_size(spec.degrees):
        raise invalid(f"{size} ranks were started for degrees that need {world_size(spec.degrees)}")
    device = _device(environment)
    torch.set_num_threads(spec.cpu_threads or _cores_of(environment))
    mesh = _form(spec, environment, size, rank, device)
    try:
        # Rank 0 of each host would do, but equal paths are all that the ranks need.
        folder = resolve_model(spec.model_path, report)
        spec = replace(spec, model_path=str(folder))
        replicas = Replicas(load_model(spec, mesh, device, report), spec, device, report)
        yield LocalEngine(replicas, _tokenizer(folder))
        replicas.close()
    finally:
        mesh.abort()
        mesh.close()


def _form(spec: ReplicaSpec, environment: Mapping[str, str], size: int, rank: int, device: torch.device) -> Mesh:
    if size == 1:
        return Mesh.single()
    deadline = time.monotonic() + FORM_S
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if rank == 0 and environment.get(_STORE_IS_THERE) != "True":
        rendezvous = Rendezvous.listen(address, port)
    else:
        rendezvous = Rendezvous.join(f"{address}:{port}", deadline)
    life = f"{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}-{next(_meshes)}"
    store = rendezvous.store
    store.set(f"host/{life}/{rank}", _own_address(address, port))
    formation = Formation(
        degrees=spec.degrees,
        hosts=tuple(store.get(f"host/{life}/{other}").decode() for other in range(size)),
        nonce=f"local-{port}-{life}",
        epoch=1,
        backend="nccl" if device.type == "cuda" and spec.backend != "gloo" else "gloo",
        collective_timeout_s=EXCHANGE_S,
    )
    return form_mesh(formation, rank, device, rendezvous, deadline)


def _own_address(peer: str, port: int) -> str:
    """The address of this host on the way to `peer`. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, port))
        return probe.getsockname()[0]


def _device(environment: Mapping[str, str]) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _cores_of(environment: Mapping[str, str]) -> int:
    return max(len(os.sched_getaffinity(0)) // int(environment.get("LOCAL_WORLD_SIZE", "1")), 1)


def _tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else None


def _serve(parent: int) -> None:
    """A rank that `open_engine` started: take part in whatever rank 0 generates."""
    die_with_parent(parent)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    rendezvous = Rendezvous.join(address, time.monotonic() + FORM_S)
    spec = msgspec.json.decode(rendezvous.store.get(_SPEC_KEY), type=ReplicaSpec)
    with _joined(spec, {**os.environ, _STORE_IS_THERE: "True"}, lambda *_: None):
        pass


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
