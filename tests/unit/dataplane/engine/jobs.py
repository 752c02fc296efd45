"""What the ranks of the engine's mesh tests do. Each function runs on every rank; see tests/support/ranks.py."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from typing import Any

import torch

from controlplane.runtime.errors import PeerLost
from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec, Sampling
from dataplane.engine import sizing
from dataplane.engine.engine import Engine
from dataplane.engine.follower import Follower
from dataplane.engine.library import Generated, generate, submission
from dataplane.engine.replicas import Replicas
from dataplane.engine.setup import agree
from dataplane.frames import Submission
from dataplane.models.fit import load_model
from dataplane.parallel.mesh import Mesh
from tests.support.ranks import Ranks


def answers(
    ranks: Ranks,
    paths: list[str],
    prompts: list[list[int]],
    degrees: dict[str, int],
    count: int,
    kind: str = "cpu",
    options: dict[str, Any] | None = None,
) -> Any:
    """Greedy tokens by model."""
    told: dict[str, list[list[int]]] = {}
    device = ranks.device(kind)
    for path in paths:
        mesh = ranks.mesh(kind=kind, **degrees)
        # In chunks, with sequences preempted.
        spec = _spec(path, degrees, kv_cache_tokens=384, max_batch_tokens=48, **options or {})
        replicas = Replicas(load_model(spec, mesh, device, lambda *_: None), spec, device)
        generated = replicas.generate(_submissions(prompts, count))
        assert generated is not None
        told[path] = [answer.tokens for answer in generated]
        replicas.close()
        mesh.abort()
        mesh.close()
    return told


def regrouped(ranks: Ranks, path: str, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Two GPUs generate; the second leaves amid a step, the first is aborted as by its daemon; both keep engine and
    weights, form the next epoch, and generate again."""
    degrees, device = {"tensor": 2}, ranks.device("cuda")
    mesh = ranks.mesh(kind="cuda", **degrees)
    # Each step is read before the next one: it is on the GPU that the driver waits.
    spec = _spec(path, degrees, kv_cache_tokens=2048, overlap="off")
    model = load_model(spec, mesh, device, lambda *_: None)
    replicas = Replicas(model, spec, device)
    first = replicas.generate(_submissions(prompts, count))
    lost = _lose_the_other(replicas.engine, mesh, prompts)
    replicas.engine.leave()
    mesh.abort()
    mesh.close()
    again = ranks.mesh(kind="cuda", **degrees)
    replicas.engine.attach(model.attach(again), lambda *_: None)
    engine = replicas.engine
    if isinstance(engine, Engine):
        second = generate(engine, _submissions(prompts, count))
        engine.close()
        return {"first": _tokens(first or []), "second": _tokens(second), "lost": lost}
    engine.run()
    return {"first": _tokens(first or []), "second": [], "lost": lost}


def survivors_of_two(ranks: Ranks, path: str, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Two replicas of two ranks; the second rank of the one and of the other change places. How many blocks each rank
    had, whether ranks would go on with their engines, before and after, and what the new replicas generate."""
    degrees = {"tensor": 2, "data": 2}
    # As of two machines.
    sizing.available_bytes = lambda: 3_000_000 if ranks.rank < 2 else 2_000_000
    spec = _spec(path, degrees)
    mesh = ranks.mesh(**degrees)
    model = load_model(spec, mesh, ranks.device("cpu"), lambda *_: None)
    replicas = Replicas(model, spec, ranks.device("cpu"))
    settled = replicas.engine.settled
    before = agree(mesh.control, settled)
    replicas.generate(_submissions(prompts, count))
    ranks.rank = (0, 3, 2, 1)[ranks.rank]
    mesh.close()
    mesh = ranks.mesh(**degrees)
    after = agree(mesh.control, settled)
    replicas = Replicas(model.attach(mesh), spec, ranks.device("cpu"))
    tokens = _tokens(replicas.generate(_submissions(prompts, count)) or [])
    return {"settled": settled, "alike": [before, after, agree(mesh.control, None)], "tokens": tokens}


def logits_kept(ranks: Ranks, path: str, prompts: list[list[int]], count: int) -> int:
    """Logits that a rank of two still holds after some steps."""
    mesh = ranks.mesh(tensor=ranks.size)
    spec = _spec(path, {"tensor": ranks.size}, kv_cache_tokens=2048)
    model = load_model(spec, mesh, ranks.device("cpu"), lambda *_: None)
    replicas = Replicas(model, spec, ranks.device("cpu"))
    replicas.generate(_submissions(prompts, count))
    gc.collect()
    kept = [item for item in gc.get_objects() if torch.is_tensor(item) and item.shape[-1:] == (model.vocab_size,)]
    return len([item for item in kept if item.device.type == "cpu"])


def _lose_the_other(engine: Engine | Follower, mesh: Mesh, prompts: list[list[int]]) -> str:
    """The reason that the driver's step ends with; "" on the other rank, which runs two plans and then none."""
    if isinstance(engine, Follower):
        engine.step()
        engine.step()
        return ""
    threading.Timer(1.0, mesh.abort).start()
    engine.submit(_submissions(prompts, 30))
    try:
        while True:
            engine.step()
    except PeerLost as error:
        return error.reason.text


def _spec(path: str, degrees: dict[str, int], **options: Any) -> ReplicaSpec:
    return ReplicaSpec(
        deployment=DeploymentId("d"),
        model_path=path,
        degrees=ParallelDegrees(**degrees),
        max_sequences=6,
        max_model_tokens=300,
        **options,
    )


def _submissions(prompts: list[list[int]], count: int) -> list[Submission]:
    sampling = Sampling(temperature=0, max_tokens=count, ignore_eos=True)
    return [submission(number, prompt, sampling) for number, prompt in enumerate(prompts)]


def _tokens(answers: Sequence[Generated]) -> list[list[int]]:
    return [answer.tokens for answer in answers]
