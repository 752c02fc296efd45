"""The engine on real (tiny, random) models, against transformers and against itself undisturbed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from controlplane.runtime.errors import PeerLost, Rejected
from controlplane.runtime.ids import DeploymentId, Epoch
from controlplane.runtime.messages.common import Reason, ReasonKind, ReplicaSpec, Sampling
from controlplane.runtime.messages.serve import FinishReason
from controlplane.runtime.packing import unpack_f32, unpack_u32
from dataplane.engine.engine import Engine
from dataplane.engine.library import Generated, collect, generate, submission
from dataplane.frames import SequenceId, StepBegun
from dataplane.models.fit import load_model
from dataplane.parallel.mesh import Mesh
from dataplane.progress import ProgressPage
from tests.support.models import tiny_model
from tests.unit.dataplane.engine.reference import greedy, mixed_prompts, reference_model

CPU = torch.device("cpu")

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def make_engine(folder: Path) -> MakeEngine:
    """Engines over tiny models; the second one of a family and dtype reuses its weights."""
    loaded = {}

    def make(family: str = "llama", dtype: str = "float32", page: ProgressPage | None = None, **spec: object) -> Engine:
        usual: dict[str, object] = {"kv_cache_tokens": 4096, "max_model_tokens": 400}
        full = ReplicaSpec(
            deployment=DeploymentId("d"),
            model_path=str(tiny_model(folder, family)),
            dtype=dtype,
            **{**usual, **spec},  # type: ignore[arg-type]
        )
        if (family, dtype) not in loaded:
            loaded[family, dtype] = load_model(full, Mesh.single(), CPU, lambda *_: None)
        model = replace(loaded[family, dtype], max_model_tokens=full.max_model_tokens)
        return Engine(model, full, CPU, page)

    return make


GREEDY = Sampling(temperature=0, max_tokens=16, ignore_eos=True)

FAMILIES = ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers(make_engine: MakeEngine, folder: Path, family: str) -> None:
    """With prompts in chunks, prefixes from the cache and sequences preempted, all at once."""
    prompts = mixed_prompts(6)
    prompts += [prompt + [7, 8] for prompt in prompts[:2]]
    # Room for about four of the ten.
    engine = make_engine(family, kv_cache_tokens=512, max_batch_tokens=48, max_sequences=8)
    answers = generate(engine, [submission(n, prompt, GREEDY) for n, prompt in enumerate(prompts)])
    expected = [greedy(tiny_model(folder, family), prompt, 16) for prompt in prompts]
    assert [answer.tokens for answer in answers] == expected


def test_a_layer_that_drops_extra_arguments_attends_all_the_same(make_engine: MakeEngine, folder: Path) -> None:
    """StableLM's does: the step's context does not travel in the call."""
    prompts = mixed_prompts(3)
    answers = generate(make_engine("stablelm"), [submission(n, prompt, GREEDY) for n, prompt in enumerate(prompts)])
    assert [answer.tokens for answer in answers] == [
        greedy(tiny_model(folder, "stablelm"), prompt, 16) for prompt in prompts
    ]


# ---------------------------------------------------------------- exactness

SAMPLED = Sampling(temperature=0.9, top_p=0.95, max_tokens=14, ignore_eos=True, logprobs=2)


def drawn(number: int) -> Sampling:
    """Half greedy, half sampled, with log probabilities: equal ones mean equal bits of the logits."""
    return replace(SAMPLED, seed=1000 + number, temperature=0.0 if number % 2 else 0.9)


def facts(answers: list[Generated]) -> list[tuple[list[int], list[float]]]:
    return [(answer.tokens, [item.chosen for item in answer.logprobs]) for answer in answers]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("gemma3_text", "bfloat16"), ("qwen3_moe", "bfloat16")],
)
def test_bits_do_not_depend_on_what_else_runs(make_engine: MakeEngine, family: str, dtype: str) -> None:
    """Alone, in a batch, in chunks, after preemption, with a cached prefix and replayed: the same bits."""
    submissions = [submission(n, prompt, drawn(n)) for n, prompt in enumerate(mixed_prompts(6))]
    engine = make_engine(family, dtype, enable_prefix_cache=False)
    alone = [generate(engine, [item])[0] for item in submissions]
    assert facts(generate(engine, submissions)) == facts(alone)

    crowded = make_engine(family, dtype, kv_cache_tokens=512, max_batch_tokens=20, max_sequences=8)
    assert facts(generate(crowded, submissions)) == facts(alone)

    caching = make_engine(family, dtype)
    generate(caching, submissions)
    caching.load_report()
    assert facts(generate(caching, submissions)) == facts(alone)
    assert sum(item.cached_tokens for item in caching.load_report().admitted) > 100

    replays = [
        submission(n, prompt, drawn(n), delivered=alone[n].tokens[: 3 + n]) for n, prompt in enumerate(mixed_prompts(6))
    ]
    replayed = generate(engine, replays)
    assert [(answer.first, answer.tokens) for answer in replayed] == [
        (3 + n, answer.tokens[3 + n :]) for n, answer in enumerate(alone)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_a_replay_of_many_tokens_gives_the_bits_of_the_decodes(family: str, dtype: str, tmp_path: Path) -> None:
    """In widths at which libraries take other kernels for many rows than for few."""
    path = tiny_model(tmp_path, family, hidden_size=640, intermediate_size=1536, num_hidden_layers=2)
    spec = ReplicaSpec(
        deployment=DeploymentId("d"), model_path=str(path), dtype=dtype, kv_cache_tokens=4096, max_model_tokens=400
    )
    engine = Engine(load_model(spec, Mesh.single(), CPU, lambda *_: None), spec, CPU)
    sampling = Sampling(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2)
    prompt = mixed_prompts(1)[0][:10]
    (whole,) = generate(engine, [submission(0, prompt, sampling)])
    for index in (1, 5, 20, 33, 40, 59):
        engine.reset(Epoch(index))
        (rest,) = generate(engine, [submission(index, prompt, sampling, delivered=whole.tokens[:index])])
        assert rest.tokens == whole.tokens[index:]
        told = [[item.chosen for item in part] for part in (rest.logprobs, whole.logprobs[index:])]
        assert told[0] == told[1], index


def test_a_cache_of_8_bit_floats_changes_little_and_depends_on_nothing_else(make_engine: MakeEngine) -> None:
    items = [submission(n, prompt, drawn(n)) for n, prompt in enumerate(mixed_prompts(4))]
    small = {"kv_cache_dtype": "fp8_e4m3"}
    alone = [generate(make_engine("llama", "float32", **small), [item])[0] for item in items]
    crowded = make_engine("llama", "float32", **small, kv_cache_tokens=512, max_batch_tokens=20, max_sequences=8)
    assert facts(generate(crowded, items)) == facts(alone)
    full = generate(make_engine("llama", "float32"), items)
    assert all(abs(a.logprobs[0].chosen - b.logprobs[0].chosen) < 0.3 for a, b in zip(full, alone, strict=True))
    assert facts(full) != facts(alone)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_step_ahead_gives_the_same_bits(make_engine: MakeEngine, family: str) -> None:
    """With tokens fed back before they are known, but where a penalty must know them; crowded, and poked at the end."""
    samplings = [drawn(0), replace(drawn(1), presence_penalty=0.5), drawn(2), replace(drawn(3), prompt_logprobs=1)]
    prompts = mixed_prompts(6)
    submissions = [submission(n, prompt, samplings[n % 4]) for n, prompt in enumerate(prompts)]
    crowded = {"kv_cache_tokens": 512, "max_batch_tokens": 20, "max_sequences": 8}
    plain = make_engine(family, "bfloat16", overlap="off", **crowded)
    ahead = make_engine(family, "bfloat16", overlap="on", **crowded)
    expected = facts(generate(plain, submissions))
    assert facts(generate(ahead, submissions)) == expected
    stop = expected[0][0][4]
    stops = submission(10, prompts[0], replace(drawn(0), stop_ids=(stop,), max_tokens=30))
    answer = generate(ahead, [stops])[0]
    assert answer.tokens == expected[0][0][: expected[0][0].index(stop) + 1]


def test_seeds_tell_samples_apart(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = [3, 4, 5]
    answers = generate(engine, [submission(n, prompt, replace(SAMPLED, seed=n % 4), group=1) for n in range(8)])
    texts = [tuple(answer.tokens) for answer in answers]
    assert texts[:4] == texts[4:]
    assert len(set(texts)) == 4


# ---------------------------------------------------------------- log probabilities


def test_logprobs_are_transformers_own(make_engine: MakeEngine, folder: Path) -> None:
    prompt = mixed_prompts(1)[0][:70]
    sampling = replace(GREEDY, max_tokens=3, logprobs=4, prompt_logprobs=2)
    # A chunk of sixteen positions at most, beside another sequence.
    engine = make_engine(max_batch_tokens=16, max_sequences=4)
    answer = generate(engine, [submission(1, prompt, sampling), submission(2, [5] * 40, GREEDY)])[0]
    tokens = prompt + answer.tokens
    with torch.no_grad():
        logits = reference_model(tiny_model(folder, "llama"))(torch.tensor([tokens])).logits[0]
    expected = logits.log_softmax(-1)
    told = {(item.prompt, item.index): item for item in answer.logprobs}
    assert set(told) == {(True, n) for n in range(1, len(prompt))} | {(False, n) for n in range(3)}
    for (is_prompt, index), item in told.items():
        at = index if is_prompt else len(prompt) + index
        row = expected[at - 1]
        assert item.chosen == pytest.approx(float(row[tokens[at]]), abs=1e-4)
        assert item.chosen_rank == int((row > row[tokens[at]]).sum()) + 1
        count = 2 if is_prompt else 4
        assert list(unpack_u32(item.top_ids)) == row.topk(count).indices.tolist()
        assert list(unpack_f32(item.top_values)) == pytest.approx(row.topk(count).values.tolist(), abs=1e-4)


def test_prompt_logprobs_come_without_a_token_too(make_engine: MakeEngine) -> None:
    answer = generate(make_engine(), [submission(1, [5, 6, 7], Sampling(max_tokens=0, prompt_logprobs=0))])[0]
    assert [item.index for item in answer.logprobs] == [1, 2]
    assert answer.tokens == []
    assert answer.finished is not None
    assert answer.finished.reason is FinishReason.LENGTH


def test_prompt_logprobs_come_once(make_engine: MakeEngine) -> None:
    """They travel with the first token: a replay that has one has them."""
    sampling = Sampling(temperature=0, max_tokens=3, prompt_logprobs=0, ignore_eos=True)
    engine = make_engine()
    first = generate(engine, [submission(1, [5, 6, 7], sampling)])[0]
    replay = generate(engine, [submission(2, [5, 6, 7], sampling, delivered=first.tokens[:1])])[0]
    assert replay.tokens == first.tokens[1:]
    assert replay.logprobs == []


# ---------------------------------------------------------------- ends and refusals


def test_end_token_stops_and_is_delivered(make_engine: MakeEngine) -> None:
    engine = make_engine()
    free = generate(engine, [submission(1, [9, 8, 7], GREEDY)])[0].tokens
    stop = free[5]
    answer = generate(engine, [submission(2, [9, 8, 7], replace(GREEDY, stop_ids=(stop,)))])[0]
    assert answer.tokens == free[: free.index(stop) + 1]
    assert answer.finished is not None
    assert (answer.finished.reason, answer.finished.stop_id) == (FinishReason.STOP, stop)


def test_bad_parameters_end_one_sequence_alone(make_engine: MakeEngine) -> None:
    answers = generate(make_engine(), [submission(1, [5], Sampling(top_p=2.0)), submission(2, [5], GREEDY)])
    bad, good = (answer.finished for answer in answers)
    assert bad is not None
    assert good is not None
    assert bad.error is not None
    assert (bad.reason, bad.error.kind) == (FinishReason.ERROR, ReasonKind.INVALID)
    assert "top_p" in bad.error.text
    assert good.reason is FinishReason.LENGTH


def test_cancelled_sequence_leaves_the_others_unchanged(make_engine: MakeEngine) -> None:
    prompts = mixed_prompts(4)
    engine = make_engine()
    undisturbed = generate(engine, [submission(n, prompt, GREEDY) for n, prompt in enumerate(prompts)])
    answers = {SequenceId(10 + n): Generated() for n in range(4)}
    engine.submit([submission(10 + n, prompt, GREEDY) for n, prompt in enumerate(prompts)])
    for turn in range(100):
        if turn == 5:
            engine.cancel([SequenceId(11)])
        if not engine.has_work:
            break
        done = engine.step()
        assert done is not None
        collect(done, answers)
    ends = [answer.finished.reason for answer in answers.values() if answer.finished]
    assert ends == [FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.LENGTH, FinishReason.LENGTH]
    assert engine.load_report().free_blocks == engine.capacity.total_blocks
    for n in (0, 2, 3):
        assert answers[SequenceId(10 + n)].tokens == undisturbed[n].tokens


def test_logits_of_no_numbers_end_only_their_sequence(make_engine: MakeEngine) -> None:
    """Its blocks go to others afterwards, and hold nothing that could reach them."""
    engine = make_engine(kv_cache_tokens=128, max_model_tokens=100)
    table = engine._model.module.get_input_embeddings().weight
    healthy = generate(engine, [submission(1, [11, 12, 13], GREEDY)])[0]
    engine.reset(Epoch(1))
    kept = table[300].clone()
    table[300] = float("nan")
    try:
        answers = generate(engine, [submission(2, [300] * 60, GREEDY), submission(3, [11, 12, 13], GREEDY)])
        after = generate(engine, [submission(4, [11, 12, 13], GREEDY), submission(5, [14] * 60, GREEDY)])
    finally:
        table[300] = kept
    assert answers[0].finished is not None
    assert answers[0].finished.error is not None
    assert answers[0].finished.error.kind is ReasonKind.POISON
    assert answers[1].tokens == healthy.tokens == after[0].tokens
    assert after[1].finished is not None
    assert after[1].finished.reason is FinishReason.LENGTH


def test_what_is_no_number_does_not_outlive_its_epoch(make_engine: MakeEngine) -> None:
    """Its blocks were still to be zeroed when the epoch ended."""
    engine = make_engine(kv_cache_tokens=128, max_model_tokens=100)
    table = engine._model.module.get_input_embeddings().weight
    kept = table[300].clone()
    table[300] = float("nan")
    try:
        generate(engine, [submission(2, [300] * 60, GREEDY)])
    finally:
        table[300] = kept
    engine.reset(Epoch(1))
    after = generate(engine, [submission(4, [14] * 30, GREEDY), submission(5, [15] * 30, GREEDY)])
    assert [answer.finished.reason for answer in after if answer.finished] == [FinishReason.LENGTH] * 2


def test_what_an_aborted_step_stored_does_not_outlive_its_epoch(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(kv_cache_tokens=128, max_model_tokens=100)
    runner, prompt = engine._runner, [14] * 30
    undisturbed = generate(engine, [submission(1, prompt, GREEDY)])[0]
    engine.reset(Epoch(1))

    def torn(out: torch.Tensor) -> None:
        for cache in (*runner._cache.keys, *runner._cache.values):
            cache[cache != 0] = float("nan")
        raise PeerLost(Reason(kind=ReasonKind.GROUP_FAILED))

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_pass_on", torn)
        engine.submit([submission(2, [15] * 60, GREEDY)])
        with pytest.raises(PeerLost):
            engine.step()
    engine.reset(Epoch(0))
    engine.attach(engine._model, lambda *_: None)
    engine.reset(Epoch(2))
    assert generate(engine, [submission(3, prompt, GREEDY)])[0].tokens == undisturbed.tokens


# ---------------------------------------------------------------- around a step


def test_step_is_announced_and_moves_the_page(make_engine: MakeEngine, tmp_path: Path) -> None:
    page = ProgressPage.create(tmp_path / "page")
    engine = make_engine(page=page)
    engine.reset(Epoch(4))
    engine.submit([submission(7, [1, 2, 3], GREEDY)])
    begun: list[tuple[StepBegun, int]] = []
    before = page.progress
    done = engine.step(lambda frame: begun.append((frame, page.progress)))
    assert done is not None
    assert [(frame.epoch, frame.step, list(unpack_u32(frame.sequences))) for frame, _ in begun] == [(4, 1, [7])]
    assert begun[0][1] == before, "the device was touched before the step was announced"
    layers = 4
    assert page.progress >= before + layers
    assert page.step == 0


def test_reset_forgets_sequences_and_cache(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = list(range(40))
    first = generate(engine, [submission(1, prompt, GREEDY)])[0]
    engine.submit([submission(2, prompt, GREEDY)])
    engine.step()
    engine.reset(Epoch(9))
    assert not engine.has_work
    assert engine.load_report().prefix_digest == b""
    assert generate(engine, [submission(2, prompt, GREEDY)])[0].tokens == first.tokens


def test_load_report_tells_queue_and_prefixes(make_engine: MakeEngine) -> None:
    engine = make_engine(max_sequences=1)
    engine.submit([submission(n, [n] * 33, GREEDY, priority=n % 2) for n in range(3)])
    engine.step()
    report = engine.load_report()
    assert (report.running, report.waiting, report.waiting_tokens) == (1, 2, 66)
    assert report.queue == ((0, 2, 66),)
    assert report.free_blocks == engine.capacity.total_blocks - 3
    assert len(report.prefix_digest) == 2 * 8
    assert report.step_ms > 0
    assert [(item.sequence, item.cached_tokens) for item in report.admitted] == [(1, 0)]


def test_capacity_is_what_was_asked_for_or_what_memory_gives(make_engine: MakeEngine) -> None:
    asked = make_engine(kv_cache_tokens=100, max_model_tokens=400).capacity
    assert (asked.total_blocks, asked.max_model_tokens) == (7, 112)
    sized = make_engine(kv_cache_tokens=0, max_sequences=3, max_model_tokens=400).capacity
    assert sized.total_blocks == 3 * 25, "no more than all sequences at full length need"


def test_no_memory_for_a_cache_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(Rejected) as caught:
        make_engine(kv_cache_tokens=0, mem_fraction_static=0.0)
    assert caught.value.reason.kind is ReasonKind.OUT_OF_MEMORY
