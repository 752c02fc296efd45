"""The engine on a GPU, against transformers on the same device and against itself without graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ReplicaSpec, Sampling
from dataplane.engine.engine import Engine
from dataplane.engine.library import generate, submission
from dataplane.models.fit import load_model
from dataplane.parallel.mesh import Mesh
from tests.support.models import FAMILIES, tiny_model
from tests.unit.dataplane.engine.reference import mixed_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

GPU = torch.device("cuda")
GREEDY = Sampling(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield tmp_path_factory.mktemp("models")
    torch.set_float32_matmul_precision(precision)


def make_engine(path: Path, **options: object) -> Engine:
    spec = ReplicaSpec(
        deployment=DeploymentId("d"),
        model_path=str(path),
        dtype="float32",
        **{"kv_cache_tokens": 4096, "max_model_tokens": 400, "max_sequences": 8, **options},  # type: ignore[arg-type]
    )
    return Engine(load_model(spec, Mesh.single(), GPU, lambda *_: None), spec, GPU)


def expected(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates on this device; eager, for its fused attention lets near ties fall the other way."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").to(GPU).eval()
    model.generation_config.eos_token_id = None
    answers: list[list[int]] = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=GPU)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_are_those_of_transformers(folder: Path, family: str) -> None:
    """With graphs and without, a step ahead and not, prompts in chunks, cached prefixes and preempted sequences."""
    path = tiny_model(folder, family)
    prompts = mixed_prompts(6)
    prompts += [prompt + [7, 8] for prompt in prompts[:2]]
    submissions = [submission(n, prompt, GREEDY) for n, prompt in enumerate(prompts)]
    wanted = expected(path, prompts)
    crowded = {"kv_cache_tokens": 512, "max_batch_tokens": 48}
    for options in ({}, crowded, {"disable_cuda_graph": True}, {**crowded, "overlap": "off"}):
        engine = make_engine(path, **options)
        assert [answer.tokens for answer in generate(engine, submissions)] == wanted, options


def test_graphs_and_plain_steps_draw_alike(folder: Path) -> None:
    """Rows that need more than the arg-max, beside rows that do not; log probabilities from captured steps."""
    path = tiny_model(folder, "qwen3")
    samplings = [
        GREEDY,
        Sampling(temperature=0.8, top_p=0.9, seed=4, max_tokens=16, ignore_eos=True, logprobs=2),
        Sampling(temperature=1.0, seed=5, max_tokens=16, ignore_eos=True),
        Sampling(temperature=0, presence_penalty=0.7, max_tokens=16, ignore_eos=True, logprobs=1),
        Sampling(temperature=0.7, top_k=20, seed=6, max_tokens=16, ignore_eos=True),
    ]
    items = [submission(n, prompt, samplings[n % 5]) for n, prompt in enumerate(mixed_prompts(7))]
    with_graphs, without = make_engine(path), make_engine(path, disable_cuda_graph=True, overlap="off")
    first, second = generate(with_graphs, items), generate(without, items)
    assert [answer.tokens for answer in first] == [answer.tokens for answer in second]
    for a, b in zip(first, second, strict=True):
        assert [item.index for item in a.logprobs] == [item.index for item in b.logprobs]
        assert all(abs(x.chosen - y.chosen) < 1e-3 for x, y in zip(a.logprobs, b.logprobs, strict=True))
