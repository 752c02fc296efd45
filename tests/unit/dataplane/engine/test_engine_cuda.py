"""The engine on a GPU, against transformers on the same device and against itself without graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ReplicaSpec, Sampling
from controlplane.runtime.packing import unpack_u32
from dataplane.engine.engine import Engine
from dataplane.engine.library import Generated, generate, submission
from dataplane.frames import Submission
from dataplane.models.fit import load_model
from dataplane.parallel.mesh import Mesh
from tests.support.models import FAMILIES, MOE_FAMILIES, tiny_model
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
        **{"dtype": "float32", "kv_cache_tokens": 4096, "max_model_tokens": 400, "max_sequences": 8, **options},  # type: ignore[arg-type]
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
    uncached = {"enable_prefix_cache": False}
    for options in ({}, crowded, {**uncached, "disable_cuda_graph": True}, {**crowded, **uncached, "overlap": "off"}):
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_exact_numerics_depend_on_nothing_but_the_sequence(folder: Path, family: str, dtype: str) -> None:
    """Equal tokens and log probabilities, to the last bit: one sequence at a time and token by token as a replay of all
    but the last; with neighbours; in chunks; over cached prefixes; preempted; from graphs and without."""
    path = tiny_model(folder, family)
    exact = {"numerics": "exact", "dtype": dtype}
    items = varied(9)
    alone = make_engine(path, **exact, disable_cuda_graph=True, enable_prefix_cache=False, overlap="off")
    wanted = [described(generate(alone, [item])[0]) for item in items]
    crowded = {"kv_cache_tokens": 512, "max_batch_tokens": 48}
    for options in ({}, crowded, {"disable_cuda_graph": True, "max_batch_tokens": 33}):
        engine = make_engine(path, **exact, **options)
        for _ in range(2):
            assert [described(answer) for answer in generate(engine, items)] == wanted, options
    tokens = [[token for token, _ in answer] for answer in wanted]
    replays = [
        submission(n, unpack_u32(item.prompt), item.sampling, delivered=answer[: 3 * n % 14])
        for n, (item, answer) in enumerate(zip(items, tokens, strict=True))
    ]
    replayed = [described(answer) for answer in generate(engine, replays)]
    assert replayed == [answer[3 * n % 14 :] for n, answer in enumerate(wanted)]


def varied(count: int) -> list[Submission]:
    """Greedy and drawn answers, the last ones with prompts that begin as the first ones do, one beyond a split."""
    drawn = Sampling(temperature=0.9, top_p=0.8, seed=3, max_tokens=16, ignore_eos=True, logprobs=3)
    cut = Sampling(temperature=0.7, top_k=12, seed=4, max_tokens=16, ignore_eos=True, logprobs=3)
    kinds = [replace(GREEDY, logprobs=3), drawn, cut]
    prompts = mixed_prompts(count - 3)
    prompts += [prompt[:100] + [7, 8] for prompt in prompts[:3]]
    return [submission(n, prompt, kinds[n % 3]) for n, prompt in enumerate(prompts)]


def described(answer: Generated) -> list[tuple[int, float]]:
    """Tokens, and the bits of their log probabilities."""
    return [(token, item.chosen) for token, item in zip(answer.tokens, answer.logprobs, strict=True)]


def test_exact_numerics_over_many_parts(folder: Path) -> None:
    """Sequences of several splits, in a captured step and in launches of their own."""
    path = tiny_model(folder, "qwen3", max_position_embeddings=4096, head_dim=64)
    long = [[(7 * n + 3 * i) % 323 for i in range(length)] for n, length in enumerate((1900, 511, 513, 1024, 40))]
    items = [submission(n, prompt, replace(GREEDY, logprobs=1)) for n, prompt in enumerate(long)]
    room = {"numerics": "exact", "dtype": "bfloat16", "kv_cache_tokens": 8192, "max_model_tokens": 2048}
    alone = make_engine(path, **room, max_batch_tokens=64, disable_cuda_graph=True, enable_prefix_cache=False)
    wanted = [described(generate(alone, [item])[0]) for item in items]
    for tokens in (500, 4096):
        engine = make_engine(path, **room, max_batch_tokens=tokens)
        assert [described(answer) for answer in generate(engine, items)] == wanted


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_in_half_precision(folder: Path, family: str) -> None:
    """Logits of a prompt as transformers gives them on this device, the captured steps' tokens as the plain ones'."""
    path = tiny_model(folder, family)
    prompt = mixed_prompts(4)[3]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(GPU).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt], device=GPU), use_cache=False).logits[0].float().log_softmax(-1)
    item = submission(0, prompt, Sampling(temperature=0, max_tokens=24, ignore_eos=True, prompt_logprobs=0, logprobs=0))
    with_graphs = generate(make_engine(path, dtype="bfloat16"), [item])[0]
    given = [entry for entry in with_graphs.logprobs if entry.prompt]
    assert len(given) == len(prompt) - 1
    theirs = wanted[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])].tolist()
    assert sum(abs(a.chosen - b) for a, b in zip(given, theirs, strict=True)) / len(theirs) < 0.05
    plain = make_engine(path, dtype="bfloat16", disable_cuda_graph=True)
    assert generate(plain, [item])[0].tokens == with_graphs.tokens


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_cache_of_8_bit_floats(folder: Path, family: str) -> None:
    """Nearly the log probabilities of a full cache, with graphs and without, and batch-invariant."""
    path = tiny_model(folder, family)
    prompt = mixed_prompts(4)[3]
    item = submission(0, prompt, Sampling(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0, logprobs=0))
    full = generate(make_engine(path), [item])[0]
    for options in ({}, {"disable_cuda_graph": True, "max_batch_tokens": 48}, {"numerics": "exact"}):
        small = generate(make_engine(path, kv_cache_dtype="fp8_e4m3", **options), [item])[0]
        pairs = [(a.chosen, b.chosen) for a, b in zip(full.logprobs, small.logprobs, strict=True) if a.prompt]
        assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 0.2, options
