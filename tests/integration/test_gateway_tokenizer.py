"""The gateway reads a model folder as transformers does, without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from controlplane.gateway.tokenizer import ModelTokenizer
from tests.support.tokenizers import TEXT, write_model


@pytest.mark.parametrize("has_processor", [True, False])
@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_chats_and_prompts_are_those_of_transformers(tmp_path: Path, config: dict[str, bool], has_processor: bool):
    folder = write_model(tmp_path)
    if not has_processor:
        file = folder / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    ours, reference = ModelTokenizer(folder), PreTrainedTokenizerFast.from_pretrained(str(folder))
    messages = [{"role": "system", "content": "Ü"}, {"role": "user", "content": "你好"}]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == text
    assert ours.encode(TEXT, add_special_tokens=True) == reference(TEXT)["input_ids"]
