from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from controlplane.runtime.errors import Rejected
from dataplane.models.fit import assert_attention_reached, build_on_meta
from tests.support.attention import REFERENCE
from tests.support.models import FAMILIES, tiny_model
from tests.unit.dataplane.models.conftest import Load, our_logits, prompts, reference_logits

TOLERANCE = 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, models: Path, load: Load) -> None:
    path = tiny_model(models, family)
    model = load(path)
    torch.testing.assert_close(our_logits(model, prompts()), reference_logits(path, prompts()), atol=TOLERANCE, rtol=0)
    assert model.extra_tensors == ()
    assert [layer.index for layer in model.attention] == [0, 1, 2, 3]


def test_the_text_of_a_tiny_model_goes_through_its_tokenizer_and_back(models: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model(models, "llama") / "tokenizer.json"))
    text = "Grüße, 世界! \U0001f600\n\ttabs  and  spaces"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_windows_come_from_what_each_layer_hands_over(models: Path, load: Load) -> None:
    assert [layer.window for layer in load(tiny_model(models, "gemma2")).attention] == [12, None, 12, None]
    assert [layer.window for layer in load(tiny_model(models, "mistral")).attention] == [12] * 4


def test_key_and_value_sizes_may_differ(models: Path, load: Load) -> None:
    layer = load(tiny_model(models, "deepseek_v3")).attention[0]
    assert (layer.key_dim, layer.value_dim, layer.kv_heads) == (16, 12, 8)


def test_dtype_is_chosen_and_a_routers_correction_stays_float32(models: Path, load: Load) -> None:
    model = load(tiny_model(models, "deepseek_v3"), dtype="bfloat16")
    state = model.module.state_dict()
    assert state["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert state["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32


def test_missing_tensors_are_named(models: Path, tmp_path: Path, load: Load) -> None:
    path = _copy(tiny_model(models, "llama"), tmp_path, drop="model.layers.2.mlp.up_proj.weight")
    with pytest.raises(Rejected, match=r"1 tensors are missing.*model\.layers\.2\.mlp\.up_proj\.weight"):
        load(path)


def test_extra_tensors_are_named(models: Path, tmp_path: Path, load: Load) -> None:
    path = _copy(tiny_model(models, "llama"), tmp_path, add="model.layers.2.mlp.side_proj.weight")
    assert load(path).extra_tensors == ("model.layers.2.mlp.side_proj.weight",)


def test_a_shape_that_the_config_does_not_want_is_refused(models: Path, tmp_path: Path, load: Load) -> None:
    path = _copy(tiny_model(models, "llama"), tmp_path, reshape="model.norm.weight")
    with pytest.raises(Rejected, match=r"model\.norm\.weight: the file has 1 × \[7\], the model wants \[64\]"):
        load(path)


def test_a_file_that_is_cut_short_is_refused(models: Path, tmp_path: Path, load: Load) -> None:
    path = _copy(tiny_model(models, "llama"), tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(Rejected, match="cut short"):
        load(path)


def test_dummy_weights_need_a_config_only_and_are_the_same_each_time(models: Path, tmp_path: Path, load: Load) -> None:
    (tmp_path / "config.json").write_text((tiny_model(models, "llama") / "config.json").read_text())
    first, second = (our_logits(load(tmp_path, load_format="dummy"), prompts()) for _ in range(2))
    assert torch.equal(first, second)
    assert first.std() > 0


def test_progress_ends_at_one(models: Path, load: Load) -> None:
    seen: list[tuple[str, float]] = []
    load(tiny_model(models, "llama"), report=lambda stage, fraction: seen.append((stage, fraction)))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert seen[-1] == ("weights", 1.0)


def test_the_fingerprint_changes_with_the_files(models: Path, tmp_path: Path, load: Load) -> None:
    path = _copy(tiny_model(models, "llama"), tmp_path)
    before = load(path).weights
    assert load(path).weights == before
    assert load(path, dtype="bfloat16").weights != before
    _copy(path, tmp_path, add="other")
    assert load(path).weights != before


def test_eos_ids_come_from_the_generation_config(models: Path, tmp_path: Path, load: Load) -> None:
    path = _copy(tiny_model(models, "llama"), tmp_path)
    assert load(path).eos_ids == {1}
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    assert load(path).eos_ids == {1, 3}


def test_every_attention_layer_is_asserted_to_reach_the_function(models: Path, load: Load) -> None:
    model = load(tiny_model(models, "phi3"))
    assert_attention_reached(model, lambda: our_logits(model, prompts()), REFERENCE)
    strayed = model.module.model.layers[2].self_attn  # type: ignore[union-attr,index]
    strayed.config = copy.deepcopy(strayed.config)  # type: ignore[union-attr]
    strayed.config._attn_implementation = "eager"  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match=r"reached \[0, 1, 3\] of 4"):
        assert_attention_reached(model, lambda: our_logits(model, prompts()), REFERENCE)


@pytest.mark.parametrize("family", ["bloom", "codegen", "gptj", "mpt", "rwkv", "mamba"])
def test_classes_outside_the_attention_interface_are_refused_by_name(family: str) -> None:
    config = AutoConfig.for_model(family)
    with pytest.raises(Rejected, match=r"\w+ForCausalLM cannot be served: "):
        build_on_meta(config, torch.float32, False)


def test_quantised_folders_are_refused(models: Path, tmp_path: Path, load: Load) -> None:
    path = _copy(tiny_model(models, "gpt_oss"), tmp_path)
    text = (path / "config.json").read_text().rstrip().rstrip("}")
    (path / "config.json").write_text(text + ', "quantization_config": {"quant_method": "mxfp4"}}')
    with pytest.raises(Rejected, match="quantised"):
        load(path)


def _copy(source: Path, folder: Path, drop: str = "", add: str = "", reshape: str = "") -> Path:
    """A copy of a model folder with one tensor changed."""
    target = folder / "copy"
    target.mkdir(exist_ok=True)
    for file in source.glob("*.json"):
        (target / file.name).write_text(file.read_text())
    tensors = load_file(source / "model.safetensors")
    tensors.pop(drop, None)
    if add:
        tensors[add] = torch.ones(3)
    if reshape:
        tensors[reshape] = torch.ones(7)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
