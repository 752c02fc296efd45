from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from controlplane.runtime.errors import Rejected
from dataplane.models import gguf as conversion
from dataplane.models.demo import prepare_demo_model, resolve_model
from dataplane.models.gguf import prepare_gguf
from dataplane.models.gguf_file import open_gguf
from tests.support.models import tiny_model


def quiet(stage: str, fraction: float) -> None: ...


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_llama_file_gives_back_the_model_it_was_made_of(models: Path, tmp_path: Path, cache: Path) -> None:
    original = tiny_model(models, "llama")
    folder = prepare_gguf(_llama_gguf(original, tmp_path / "tiny.gguf"), quiet)
    wanted = load_file(original / "model.safetensors")
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == wanted.keys()
    for name, tensor in converted.items():
        assert torch.equal(tensor, wanted[name].to(torch.bfloat16)), name
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["rms_norm_eps"], config["tie_word_embeddings"]) == ("llama", 1e-06, False)
    assert folder.is_relative_to(cache)


def test_its_tokenizer_round_trips_text(models: Path, tmp_path: Path, cache: Path) -> None:
    original = tiny_model(models, "llama")
    folder = prepare_gguf(_llama_gguf(original, tmp_path / "tiny.gguf"), quiet)
    ours, wanted = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, original))
    text = "The river carried the boat, Grüße \U0001f600"
    assert ours.decode(ours.encode(text).ids) == text
    assert ours.encode(text).ids == wanted.encode(text).ids


def test_quantised_blocks_are_dequantised_as_by_the_gguf_package(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    _finish(writer)
    file = open_gguf(tmp_path / "q.gguf")
    wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(file.load("token_embd.weight"), wanted)
    assert file.tensors["token_embd.weight"].shape == (6, 64)


def test_two_at_once_convert_once(models: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _llama_gguf(tiny_model(models, "llama"), tmp_path / "tiny.gguf")
    conversions: list[Path] = []
    convert = conversion.convert
    monkeypatch.setattr(conversion, "convert", lambda *args: (conversions.append(args[1]), convert(*args)))
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(prepare_gguf(path, quiet))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert results[0] == results[1]


def test_a_conversion_that_fails_leaves_no_folder(tmp_path: Path, cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "starcoder")
    _finish(writer)
    with pytest.raises(Rejected, match="architecture starcoder; gemma3, llama, qwen2, qwen3 can be converted"):
        prepare_gguf(tmp_path / "odd.gguf", quiet)
    assert not [path for path in (cache / "perdure" / "models").iterdir() if path.name.count(".") == 0]


@pytest.mark.parametrize("keep", [2, 40, 3000])
def test_a_file_that_is_cut_short_is_refused(models: Path, tmp_path: Path, keep: int) -> None:
    whole = _llama_gguf(tiny_model(models, "llama"), tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[:keep])
    with pytest.raises(Rejected, match=r"no GGUF file|ends within its header"):
        open_gguf(tmp_path / "short.gguf")
    (tmp_path / "short.gguf").write_bytes(whole[:-100])
    with pytest.raises(Rejected, match="cut short"):
        open_gguf(tmp_path / "short.gguf")


def test_names_resolve_to_folders(models: Path, tmp_path: Path, cache: Path) -> None:
    path = tiny_model(models, "llama")
    assert resolve_model(str(path), quiet) == path
    file = _llama_gguf(path, tmp_path / "alone" / "tiny.gguf")
    assert resolve_model(str(file), quiet) == resolve_model(str(file.parent), quiet)
    with pytest.raises(Rejected, match=r"no model folder, no \.gguf file and no name"):
        resolve_model("/nowhere/at/all", quiet)


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        Rejected, match=r"nobody/nothing is no folder here and could not be had from the Hugging Face hub"
    ):
        resolve_model("nobody/nothing", quiet)


def test_the_default_model_is_bit_identical_to_transformers_load() -> None:
    """The digest was taken from `AutoModelForCausalLM.from_pretrained(gguf_file=…, dequantize=True)` in bfloat16."""
    folder = prepare_demo_model(quiet)
    digest = hashlib.sha256()
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == DEMO_DIGEST
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("The capital of France is").ids == [2, 818, 5279, 529, 7001, 563]
    assert tokenizer.encode("<start_of_turn>").ids == [2, 105]


DEMO_DIGEST = "abdfdce87cda53bdcedb4f6eedb312414ef12640d3e3021bc095dfeef02516d4"

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _llama_gguf(source: Path, target: Path) -> Path:
    """`source` as llama.cpp's converter writes it: its names, query and key rows in its rotary order."""
    config = json.loads((source / "config.json").read_text())
    target.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10_000.0)
    _add_tokenizer(writer, source)
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(_gguf_name(name), values)
    _finish(writer)
    return target


def _gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in fixed:
        return f"{fixed[stem]}.{kind}"
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def _add_tokenizer(writer: gguf.GGUFWriter, source: Path) -> None:
    state: dict[str, Any] = json.loads((source / "tokenizer.json").read_text())
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    special = {item["content"] for item in state["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
