"""Ways to be wrong without an error, one test each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from controlplane.runtime.errors import Rejected
from controlplane.runtime.messages.common import ParallelDegrees
from dataplane.models import fit_stage
from dataplane.models.dry_run import DRY_ATTENTION
from dataplane.models.fit import build_on_meta
from dataplane.models.structure import configs_of, set_implementation
from dataplane.models.surgery import fit
from dataplane.models.weights import materialise
from dataplane.models.work_list import PORTION_BYTES
from dataplane.parallel.expert import EXPERTS_IMPLEMENTATION
from dataplane.parallel.mesh import Mesh, plan_mesh
from tests.support.models import tiny_model
from tests.support.ranks import RankPool
from tests.unit.dataplane.models.conftest import Load, our_logits, prompts, reference_logits

JOBS = "tests.unit.dataplane.models.jobs"
TOLERANCE = 1e-4
IDS = [item.tolist() for item in prompts()]

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10_000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10_000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1],
    "long_factor": [2.0, 5.0],
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
}


def check(rank_pool: RankPool, path: Path, folder: Path, size: int, **degrees: int) -> list[dict[str, Any]]:
    """The model on a mesh gives transformers' logits; what each rank says of its part."""
    wanted = folder / "wanted.pt"
    torch.save({str(path): reference_logits(path, prompts())}, wanted)
    results = rank_pool.run(
        f"{JOBS}:differences", size, paths=[str(path)], wanted=str(wanted), prompts=IDS, degrees=degrees
    )
    parts = [result[str(path)] for result in results]
    assert all(part["difference"] is None or part["difference"] < TOLERANCE for part in parts), parts
    return parts


@pytest.mark.parametrize("rope", [LINEAR, LLAMA3, YARN, DYNAMIC], ids=lambda rope: str(rope["rope_type"]))
def test_scaled_rotary_tables_equal_transformers(rope: dict[str, Any], models: Path, load: Load) -> None:
    path = tiny_model(models, "llama", rope_parameters=rope)
    got = our_logits(load(path), prompts())
    torch.testing.assert_close(got, reference_logits(path, prompts()), atol=TOLERANCE, rtol=0)


def test_longrope_neighbours_do_not_change_each_other(models: Path, load: Load) -> None:
    """transformers picks the set by the longest request of the batch; here each request has its own."""
    path = tiny_model(
        models,
        "phi3",
        max_position_embeddings=128,
        original_max_position_embeddings=24,
        rope_parameters=LONGROPE,
        partial_rotary_factor=0.5,
        sliding_window=None,
    )
    _neighbours(path, load(path), lengths=(5, 60), threshold=24)


def test_dynamic_neighbours_do_not_change_each_other(models: Path, load: Load) -> None:
    path = tiny_model(models, "llama", max_position_embeddings=24, rope_parameters=DYNAMIC)
    _neighbours(path, load(path), lengths=(5, 60), threshold=24)


def _neighbours(path: Path, model: Any, lengths: tuple[int, int], threshold: int) -> None:
    assert model.needs_rope_lengths
    assert lengths[0] < threshold < lengths[1]
    short, long = prompts(lengths)
    lengths_T = torch.tensor([lengths[0]] * lengths[0] + [lengths[1]] * lengths[1])
    together = our_logits(model, [short, long], lengths_T)
    alone = our_logits(model, [short], lengths_T[: lengths[0]])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)
    # Each in the regime that transformers uses for it alone.
    wanted = torch.cat([reference_logits(path, [short]), reference_logits(path, [long])])
    torch.testing.assert_close(together, wanted, atol=TOLERANCE, rtol=0)
    # And the two regimes do differ: the test can fail.
    all_long_T = torch.full_like(lengths_T, lengths[1])
    assert (our_logits(model, [short, long], all_long_T)[0] - together[0]).abs().max() > 0.01


def test_a_request_that_may_grow_long_is_long_from_its_first_token(models: Path, load: Load) -> None:
    path = tiny_model(models, "llama", max_position_embeddings=24, rope_parameters=DYNAMIC)
    model = load(path)
    (prompt,) = prompts((20,))
    chunk, whole = (our_logits(model, [item], torch.full((len(item),), 60)) for item in (prompt[:10], prompt))
    assert chunk.shape == whole.shape
    short = our_logits(model, [prompt], torch.full((20,), 20))
    assert (whole - short).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "deepseek_v3"])
def test_buffers_outside_the_state_dict_are_computed_after_a_meta_build(family: str, models: Path, load: Load) -> None:
    path = tiny_model(models, family)
    ours, theirs = load(path).module, AutoModelForCausalLM.from_pretrained(path)
    wanted = {name: item for name, item in theirs.named_buffers() if "inv_freq" not in name}
    assert {name for name, _ in ours.named_buffers()} == set(wanted)
    for name, item in ours.named_buffers():
        assert torch.equal(item, wanted[name]), name
    x, positions = torch.zeros(1, 9, 4), torch.arange(9).unsqueeze(0)
    types = getattr(theirs.model.rotary_emb, "layer_types", None) or [None]
    for kind in types:
        arguments = (x, positions) if kind is None else (x, positions, kind)
        for a, b in zip(ours.model.rotary_emb(*arguments), theirs.model.rotary_emb(*arguments), strict=True):
            assert torch.equal(a, b)


def test_a_buffer_that_nothing_computes_is_refused(models: Path) -> None:
    model = build_on_meta(AutoConfig.from_pretrained(tiny_model(models, "llama")), torch.float32, False)
    model.model.register_buffer("odd", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(Rejected, match=r"nothing computes the buffer model\.odd"):
        materialise(fit(model, Mesh.single()), torch.float32, torch.device("cpu"))


def test_copied_configs_get_the_attention_function_too(models: Path) -> None:
    """Phi-3 under tensor parallelism holds copies; one that is missed goes on with another function, silently."""
    model = build_on_meta(AutoConfig.from_pretrained(tiny_model(models, "phi3")), torch.float32, False)
    fit(model, plan_mesh(ParallelDegrees(tensor=2), 1))
    assert len({id(config) for config in configs_of(model)}) == 5
    set_implementation(model, DRY_ATTENTION, EXPERTS_IMPLEMENTATION)
    assert {config._attn_implementation for config in configs_of(model)} == {DRY_ATTENTION}


def test_tied_weights_share_memory(models: Path, load: Load) -> None:
    model = load(tiny_model(models, "gemma2")).module
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_tied_weights_may_be_stored_under_either_name(models: Path, tmp_path: Path, load: Load) -> None:
    path = tiny_model(models, "gemma2")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    torch.testing.assert_close(our_logits(load(tmp_path), prompts()), our_logits(load(path), prompts()))


def test_the_text_model_of_a_multimodal_folder(models: Path, tmp_path: Path, load: Load) -> None:
    path = tiny_model(models, "gemma3_text")
    text = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    tensors = {f"language_model.{name}": item for name, item in load_file(path / "model.safetensors").items()}
    save_file({**tensors, "vision_tower.odd": torch.ones(2)}, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.extra_tensors == ("vision_tower.odd",)
    torch.testing.assert_close(our_logits(model, prompts()), our_logits(load(path), prompts()))


def test_fused_projections_hold_each_parameter_once(models: Path, load: Load) -> None:
    path = tiny_model(models, "qwen2")
    model = load(path).module
    ours = sum(parameter.numel() for parameter in model.parameters())
    assert ours == sum(item.numel() for item in load_file(path / "model.safetensors").values())


def test_a_padding_index_outside_the_shard(models: Path, tmp_path: Path, rank_pool: RankPool) -> None:
    check(rank_pool, tiny_model(models, "llama", pad_token_id=300), tmp_path, 2, tensor=2)


def test_a_row_parallel_bias_is_added_once(models: Path, tmp_path: Path, rank_pool: RankPool) -> None:
    check(rank_pool, tiny_model(models, "llama", attention_bias=True, mlp_bias=True), tmp_path, 4, tensor=4)


def test_an_odd_vocabulary_is_padded_over_ranks_and_cut_again(
    models: Path, tmp_path: Path, rank_pool: RankPool
) -> None:
    check(rank_pool, tiny_model(models, "llama", vocab_size=331), tmp_path, 4, tensor=4)


def test_a_tied_head_is_the_embeddings_shard(models: Path, tmp_path: Path, rank_pool: RankPool) -> None:
    """And the embedding's own scale reaches looked-up rows, not the head."""
    path = tiny_model(models, "gemma2")
    parts = check(rank_pool, path, tmp_path, 4, tensor=4)
    whole = sum(item.numel() for item in load_file(path / "model.safetensors").values())
    assert all(part["parameters"] < whole * 0.32 for part in parts)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_projections_that_are_stored_fused_are_cut_part_by_part(
    family: str, models: Path, tmp_path: Path, rank_pool: RankPool
) -> None:
    check(rank_pool, tiny_model(models, family), tmp_path, 4, tensor=4)


@pytest.mark.parametrize("family", ["phi3", "stablelm", "deepseek_v3"])
def test_forward_code_that_counts_heads_counts_those_of_its_rank(
    family: str, models: Path, tmp_path: Path, rank_pool: RankPool
) -> None:
    check(rank_pool, tiny_model(models, family), tmp_path, 2, tensor=2)


def test_sinks_are_cut_by_head_and_an_experts_bias_is_added_once(
    models: Path, tmp_path: Path, rank_pool: RankPool
) -> None:
    check(rank_pool, tiny_model(models, "gpt_oss"), tmp_path, 4, tensor=4, expert=2)


def test_a_multiplier_of_embeddings_is_applied_on_the_first_stage_alone(
    models: Path, tmp_path: Path, rank_pool: RankPool
) -> None:
    check(rank_pool, tiny_model(models, "granite"), tmp_path, 2, pipeline=2)


def test_no_cache_object_is_made_in_a_forward_pass(models: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_model(models, "gemma3_text"))

    def made(*_: Any, **__: Any) -> None:
        raise AssertionError("a cache was made")

    monkeypatch.setattr(DynamicCache, "__init__", made)
    our_logits(model, prompts())


def test_a_full_width_norm_counts_replicated_heads_once(models: Path, tmp_path: Path, rank_pool: RankPool) -> None:
    parts = check(rank_pool, tiny_model(models, "olmo2"), tmp_path, 4, tensor=4)
    # Two key/value heads on four ranks: each is held twice.
    assert [part["heads"][0] for part in parts] == [[2, 1]] * 4


def test_fewer_key_value_heads_than_ranks_are_replicated(models: Path, tmp_path: Path, rank_pool: RankPool) -> None:
    path = tiny_model(models, "llama", num_key_value_heads=1)
    parts = check(rank_pool, path, tmp_path, 4, tensor=4)
    whole = sum(item.numel() for item in load_file(path / "model.safetensors").values())
    assert all(0.24 < part["parameters"] / whole < 0.31 for part in parts)


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "size", "wanted"),
    [(9, 3, 2, [[6, 2], [3, 1]]), (12, 3, 4, [[2, 1], [2, 1], [4, 1], [4, 1]]), (5, 5, 2, [[3, 3], [2, 2]])],
)
def test_uneven_heads(
    heads: int,
    key_value_heads: int,
    size: int,
    wanted: list[list[int]],
    models: Path,
    tmp_path: Path,
    rank_pool: RankPool,
) -> None:
    path = tiny_model(
        models, "qwen3", num_attention_heads=heads, num_key_value_heads=key_value_heads, intermediate_size=97
    )
    parts = check(rank_pool, path, tmp_path, size, tensor=size)
    assert [part["heads"][0] for part in parts] == wanted


def test_a_full_width_norm_over_uneven_replicated_heads(models: Path, tmp_path: Path, rank_pool: RankPool) -> None:
    path = tiny_model(models, "olmo2", num_attention_heads=12, num_key_value_heads=3, hidden_size=96)
    check(rank_pool, path, tmp_path, 4, tensor=4)


def test_stages_keep_their_layers_places(models: Path, tmp_path: Path, rank_pool: RankPool) -> None:
    path = tiny_model(
        models, "gemma3_text", num_hidden_layers=5, layer_types=["sliding_attention"] * 4 + ["full_attention"]
    )
    parts = check(rank_pool, path, tmp_path, 4, pipeline=4)
    assert [part["layers"] for part in parts] == [[0, 1], [2], [3], [4]]


def test_a_decoder_that_scales_outside_its_layers_cannot_be_cut_in_stages(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_stage, "_MULTIPLIER", "unknown_to_this_class")
    model = build_on_meta(AutoConfig.from_pretrained(tiny_model(models, "granite")), torch.float32, False)
    with pytest.raises(Rejected, match="GraniteForCausalLM cannot be served: its decoder changes hidden states"):
        fit(model, plan_mesh(ParallelDegrees(pipeline=2), 1))


@pytest.mark.parametrize(
    ("overrides", "degrees", "text"),
    [
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1},
            {"tensor": 4},
            "2 query heads over 1 key/value heads cannot be cut over 4 ranks: 4 ranks would share 2 query heads",
        ),
        ({"num_hidden_layers": 3}, {"pipeline": 4}, "3 layers cannot be cut over 4 pipeline stages"),
        ({"intermediate_size": 3}, {"tensor": 4}, "3 inner features cannot be cut over 4 ranks"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_the_numbers(
    overrides: dict[str, int], degrees: dict[str, int], text: str, models: Path
) -> None:
    config = AutoConfig.from_pretrained(tiny_model(models, "llama", **overrides))
    with pytest.raises(Rejected, match=text):
        fit(build_on_meta(config, torch.float32, False), plan_mesh(ParallelDegrees(**degrees), 0))


def test_an_attention_part_that_is_not_understood_is_refused_under_tensor_parallelism(models: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model(models, "llama"))
    model = build_on_meta(config, torch.float32, False)
    model.model.layers[1].self_attn.gate = torch.nn.Linear(4, 4, device="meta")
    with pytest.raises(Rejected, match=r"model\.layers\.1\.self_attn\.gate is not known to be cut by heads"):
        fit(model, plan_mesh(ParallelDegrees(tensor=2), 0))


def test_each_rank_reads_only_its_own_experts(models: Path, rank_pool: RankPool) -> None:
    path = tiny_model(models, "mixtral")
    reads = rank_pool.run(f"{JOBS}:read_from", 2, path=str(path), degrees={"tensor": 2, "expert": 2})
    for rank, names in enumerate(reads):
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name}
        assert experts == ({0, 1} if rank == 0 else {2, 3})


def test_dummy_weights_are_the_same_model_on_every_mesh(
    models: Path, tmp_path: Path, rank_pool: RankPool, load: Load
) -> None:
    path = tiny_model(models, "qwen3_moe")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    wanted = our_logits(load(tmp_path, load_format="dummy"), prompts())
    torch.save({str(tmp_path): wanted}, tmp_path / "wanted.pt")
    results = rank_pool.run(
        f"{JOBS}:differences",
        2,
        paths=[str(tmp_path)],
        wanted=str(tmp_path / "wanted.pt"),
        prompts=IDS,
        degrees={"tensor": 2, "expert": 2},
        load_format="dummy",
    )
    assert all(result[str(tmp_path)]["difference"] < TOLERANCE for result in results)


def test_loading_never_holds_more_than_the_share_and_one_tensor(models: Path, rank_pool: RankPool) -> None:
    """Peak resident memory, file pages included, of a rank of four.

    Of a peer that is this process itself, the slices on their way count on both sides.
    """
    path = tiny_model(models, "llama", hidden_size=512, intermediate_size=6144, num_hidden_layers=4)
    stored = load_file(path / "model.safetensors").values()
    whole, largest = (function(item.numel() * 4 for item in stored) for function in (sum, max))
    peaks = rank_pool.run(f"{JOBS}:peak_bytes", 4, path=str(path), degrees={"tensor": 4})
    for from_files, from_peer in peaks:
        assert from_files < whole / 4 + largest + 16 * 2**20, (from_files, whole, largest)
        assert from_peer < whole / 4 + largest + 16 * 2**20 + 2 * PORTION_BYTES, (from_peer, whole, largest)


def test_weights_serve_the_next_epoch_after_they_are_attached(models: Path, rank_pool: RankPool) -> None:
    path = tiny_model(models, "qwen3_moe")
    assert rank_pool.run(f"{JOBS}:next_epoch", 2, path=str(path), prompts=IDS) == [True, True]


def test_a_folder_without_config_is_refused(tmp_path: Path, load: Load) -> None:
    with pytest.raises(Rejected, match=r"no config\.json"):
        load(tmp_path)
