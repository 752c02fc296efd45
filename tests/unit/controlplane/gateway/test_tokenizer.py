"""Model folders as the gateway reads them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from controlplane.gateway import tokenizer as module
from controlplane.gateway.chat_template import TemplateFailed
from controlplane.gateway.tokenizer import (
    LONG_TEXT_CHARS,
    ModelTokenizer,
    TextTooLong,
    TokenizerMissing,
    TokenizerPool,
)
from controlplane.runtime.errors import Retryable
from tests.support.tokenizers import CONTEXT_TOKENS, TEXT, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ModelTokenizer:
    return ModelTokenizer(folder)


def test_a_prompt_gets_its_bos_and_a_chat_brings_its_own(tokenizer: ModelTokenizer):
    assert tokenizer.encode("fox", add_special_tokens=True)[0] == 0
    assert 0 not in tokenizer.encode("fox", add_special_tokens=False)
    text = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    assert text == "<s><|user|>hi<|end|><|assistant|>"
    assert tokenizer.encode(text, add_special_tokens=False).count(0) == 1


def test_special_tokens_are_not_shown(tokenizer: ModelTokenizer):
    ids = tokenizer.encode("a<|end|>b", add_special_tokens=True)
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode_all(ids) == "<s>a<|end|>b"


def test_ids_that_end_a_text_come_from_the_generation_config(folder: Path, tmp_path: Path, tokenizer: ModelTokenizer):
    assert tokenizer.eos_ids == {1, 5}
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 3, "n_positions": 7}}))
    bare = ModelTokenizer(tmp_path)
    assert (bare.eos_ids, bare.context_tokens) == ({3}, 7)


def test_the_context_is_the_models(tokenizer: ModelTokenizer):
    assert tokenizer.context_tokens == CONTEXT_TOKENS


def test_the_bytes_of_all_tokens_are_the_bytes_of_the_text(tokenizer: ModelTokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == TEXT.encode()
    assert tokenizer.token_bytes(0) == b"<s>"


def test_without_a_template_a_plain_one_is_used(tmp_path: Path):
    plain = ModelTokenizer(write_model(tmp_path, template=None))
    assert plain.render_chat([{"role": "user", "content": "hi"}]) == "user: hi\nassistant:"


def test_a_template_that_does_not_compile_is_refused_when_used(tmp_path: Path):
    broken = ModelTokenizer(write_model(tmp_path, template="{% for %}"))
    with pytest.raises(TemplateFailed, match="does not compile"):
        broken.render_chat([{"role": "user", "content": "hi"}])


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(TokenizerMissing, match=r"tokenizer\.json does not exist"):
        ModelTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerMissing, match=r"tokenizer\.json"):
        ModelTokenizer(tmp_path)


async def test_what_is_surely_too_long_is_not_tokenised(folder: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = ModelTokenizer(folder)
    pool = TokenizerPool(retry_ms=100)
    text = "fox " * LONG_TEXT_CHARS
    tokens = len(await pool.encode(tokenizer, text, add_special_tokens=False))
    # What may still fit is counted.
    assert len(await pool.encode(tokenizer, text, add_special_tokens=False, tokens_max=tokens - 1)) == tokens
    monkeypatch.setattr(ModelTokenizer, "encode", None)
    with pytest.raises(TextTooLong) as refusal:
        await pool.encode(tokenizer, text, add_special_tokens=False, tokens_max=100)
    assert 100 < refusal.value.tokens_min <= tokens
    pool.close()


async def test_long_texts_are_tokenised_off_the_loop(tokenizer: ModelTokenizer, monkeypatch: pytest.MonkeyPatch):
    pool = TokenizerPool(retry_ms=100)
    text = "fox " * LONG_TEXT_CHARS
    ids = await pool.encode(tokenizer, text, add_special_tokens=True)
    assert ids == tokenizer.encode(text, add_special_tokens=True)
    monkeypatch.setattr(module, "POOL_WAITING_MAX", 1)
    first = asyncio.create_task(pool.encode(tokenizer, text, add_special_tokens=True))
    await asyncio.sleep(0)
    with pytest.raises(Retryable, match="long prompts wait"):
        await pool.encode(tokenizer, text, add_special_tokens=True)
    await first
    pool.close()
