"""Chunks and answers in the OpenAI API's shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from controlplane.gateway.render import ChatShape, CompletionShape, Echo, Usage, gather
from controlplane.gateway.text_stream import Piece, TokenInfo
from controlplane.gateway.tokenizer import ModelTokenizer
from tests.support.tokenizers import write_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    folder: Path = tmp_path_factory.mktemp("model")
    return ModelTokenizer(write_model(folder))


def chat(tokenizer: ModelTokenizer, *, logprobs: bool = False, with_usage: bool = False) -> ChatShape:
    return ChatShape("chatcmpl-1", 5, "m", tokenizer, logprobs=logprobs, with_usage=with_usage)


def completion(tokenizer: ModelTokenizer, *, logprobs: bool = False) -> CompletionShape:
    return CompletionShape("cmpl-1", 5, "m", tokenizer, logprobs=logprobs, with_usage=False)


def parsed(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2, "an event is one line"
    return json.loads(event[6:])


def test_the_quick_way_writes_what_the_plain_way_does(tokenizer: ModelTokenizer):
    text = 'a"\\\n\u2028😀\0'
    quick = parsed(chat(tokenizer).piece(Piece(1, text)))
    plain = parsed(chat(tokenizer).piece(Piece(1, text, finish="stop")))
    assert quick["choices"][0] == {"index": 1, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    assert quick.keys() == plain.keys()
    assert plain["choices"][0]["delta"] == quick["choices"][0]["delta"]
    assert parsed(completion(tokenizer).piece(Piece(0, text)))["choices"][0]["text"] == text


def test_a_piece_with_nothing_to_tell_is_no_event(tokenizer: ModelTokenizer):
    assert chat(tokenizer).piece(Piece(0, "")) == b""


def test_a_null_usage_stands_in_every_chunk_if_asked_for(tokenizer: ModelTokenizer):
    shape = chat(tokenizer, with_usage=True)
    assert parsed(shape.piece(Piece(0, "a")))["usage"] is None
    assert "usage" not in parsed(chat(tokenizer).piece(Piece(0, "a")))
    last = parsed(shape.usage(Usage(3, 4, 1)))
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 7)
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_half_a_character_has_its_bytes_in_both_shapes(tokenizer: ModelTokenizer):
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) > 1
    infos = tuple(TokenInfo(token, -1.0, ((token, -1.0),), 0) for token in ids)
    content = parsed(chat(tokenizer, logprobs=True).piece(Piece(0, "🦊", infos=infos)))["choices"][0]["logprobs"][
        "content"
    ]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "🦊"
    legacy = parsed(completion(tokenizer, logprobs=True).piece(Piece(0, "🦊", infos=infos)))["choices"][0]["logprobs"]
    assert all(token.startswith("bytes:\\x") for token in legacy["tokens"])


def test_the_token_itself_is_among_its_alternatives(tokenizer: ModelTokenizer):
    infos = (TokenInfo(70, -2.0, ((71, -0.5), (72, -1.0)), 0),)
    legacy = parsed(completion(tokenizer, logprobs=True).piece(Piece(0, "x", infos=infos)))["choices"][0]["logprobs"]
    assert sorted(legacy["top_logprobs"][0].values()) == [-2.0, -1.0, -0.5]


def test_a_whole_answer_joins_its_pieces_after_its_echo(tokenizer: ModelTokenizer):
    answers: dict[int, Any] = {}
    gather([Piece(1, "b"), Piece(0, "a")], answers)
    gather([Piece(0, "c", finish="stop", stop_reason="END"), Piece(1, "", finish="length")], answers)
    body = json.loads(completion(tokenizer).whole(answers, [Echo("p1 "), Echo("p2 ")], 1, Usage(2, 3, 0)))
    assert [choice["text"] for choice in body["choices"]] == ["p1 ac", "p2 b"]
    assert [choice["stop_reason"] for choice in body["choices"]] == ["END", None]
    assert body["object"] == "text_completion"
