"""What ranks do with the demo model. Each function runs on every rank; see tests/support/ranks.py."""

from __future__ import annotations

from math import fsum
from typing import Any

import torch

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec, Sampling
from dataplane.engine.engine import Engine
from dataplane.engine.library import Generated, submission
from dataplane.engine.replicas import Replicas
from dataplane.frames import Submission
from dataplane.models.fit import FittedModel, load_model
from tests.support.ranks import Ranks

CPU = torch.device("cpu")


def read_and_write(
    ranks: Ranks, path: str, degrees: dict[str, int], prompts: list[list[int]], pages: list[list[int]], count: int
) -> dict[str, Any]:
    """Greedy tokens after each prompt in float32, and the sum of log probabilities of each page's tokens."""
    spec = _spec(path, degrees, "float32", kv_cache_tokens=4096)
    mesh = ranks.mesh(120.0, **degrees)
    replicas = Replicas(load_model(spec, mesh, CPU, lambda *_: None), spec, CPU)
    greedy = Sampling(temperature=0, max_tokens=count, ignore_eos=True)
    reading = Sampling(temperature=0, max_tokens=1, prompt_logprobs=0)
    written = replicas.generate([submission(n, prompt, greedy) for n, prompt in enumerate(prompts)])
    read = replicas.generate([submission(n, page, reading) for n, page in enumerate(pages)])
    replicas.close()
    mesh.close()
    assert written is not None
    assert read is not None
    return {
        "tokens": [answer.tokens for answer in written],
        "sums": [fsum(item.chosen for item in answer.logprobs if item.prompt) for answer in read],
    }


def disturb(ranks: Ranks, path: str, degrees: dict[str, int], prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Tokens of each prompt in bfloat16, by what else happened, and how often it did."""
    mesh = ranks.mesh(120.0, **degrees)
    model = load_model(_spec(path, degrees, "bfloat16"), mesh, CPU, lambda *_: None)
    half_sampled = [
        Sampling(temperature=0.0 if n % 2 else 0.8, seed=n, max_tokens=count, ignore_eos=True)
        for n in range(len(prompts))
    ]
    items = [submission(n, *item) for n, item in enumerate(zip(prompts, half_sampled, strict=True))]
    roomy = _engine(model, _spec(path, degrees, "bfloat16", kv_cache_tokens=8192, enable_prefix_cache=False))
    alone = [_run(roomy, [item])[0] for item in items]
    replays = [
        submission(n, prompt, half_sampled[n], delivered=alone[n].tokens[: 7 * n + 1])
        for n, prompt in enumerate(prompts)
    ]
    found = {
        "alone": alone,
        "in a batch": _run(roomy, items),
        "in a batch of three": [answer for start in range(0, 8, 3) for answer in _run(roomy, items[start : start + 3])],
        "replayed": _run(roomy, replays),
    }
    roomy.close()
    small = _engine(
        model,
        _spec(
            path,
            degrees,
            "bfloat16",
            kv_cache_tokens=256,
            block_tokens=8,
            max_batch_tokens=10,
            max_sequences=6,
            max_model_tokens=160,
        ),
    )
    found["in chunks and preempted"] = _run(small, items)
    small.close()
    caching = _engine(model, _spec(path, degrees, "bfloat16", kv_cache_tokens=8192, block_tokens=4))
    _run(caching, items)
    if isinstance(caching.engine, Engine):
        caching.engine.load_report()
    found["with cached prefixes"] = _run(caching, items)
    cached = caching.engine.load_report().admitted if isinstance(caching.engine, Engine) else ()
    caching.close()
    mesh.close()
    tokens = {name: [answer.tokens for answer in answers] for name, answers in found.items()}
    tokens["replayed"] = [[*alone[n].tokens[: 7 * n + 1], *answer] for n, answer in enumerate(tokens["replayed"])]
    return {"tokens": tokens, "cached": sum(item.cached_tokens for item in cached)}


def _spec(path: str, degrees: dict[str, int], dtype: str, **fields: Any) -> ReplicaSpec:
    return ReplicaSpec(
        deployment=DeploymentId("demo"),
        model_path=path,
        dtype=dtype,
        degrees=ParallelDegrees(**degrees),
        **{"max_model_tokens": 1024, **fields},
    )


def _engine(model: FittedModel, spec: ReplicaSpec) -> Replicas:
    return Replicas(model, spec, CPU)


def _run(replicas: Replicas, items: list[Submission]) -> list[Generated]:
    answers = replicas.generate(items)
    assert answers is not None
    return answers
