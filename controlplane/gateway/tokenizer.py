"""A model's tokenizer as the gateway needs it: text to ids, ids to text and bytes, chats to prompts. Without torch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import structlog
from tokenizers import Tokenizer

from controlplane.gateway.chat_template import PLAIN_TEMPLATE, ChatTemplate, TemplateFailed, find_template
from controlplane.gateway.token_bound import byte_level_alphabet, chars_per_token_max
from controlplane.runtime.errors import Retryable
from controlplane.runtime.messages.common import Reason, ReasonKind

LONG_TEXT_CHARS = 4096
"""Longer texts are tokenised off the loop: 4096 characters take about a millisecond."""

POOL_THREADS = 2
POOL_WAITING_MAX = 256

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

log = structlog.get_logger()


class TokenizerMissing(ValueError):
    """The model's folder has no usable tokenizer; the text says what is wrong."""


class TextTooLong(ValueError):
    """A text cannot have as few tokens as it may."""

    def __init__(self, tokens_min: int) -> None:
        super().__init__(f"a text of at least {tokens_min} tokens")
        self.tokens_min = tokens_min


class ModelTokenizer:
    """Tokenizer, chat template and special ids of one model folder."""

    def __init__(self, folder: Path) -> None:
        """Reads the files; takes up to a second for a large vocabulary. Raises TokenizerMissing."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TokenizerMissing(f"{file} does not exist")
        config = _read_json(folder / "tokenizer_config.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:
            raise TokenizerMissing(f"{file}: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special_tokens = _special_tokens(config)
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.eos_ids = _eos_ids(folder)
        self.context_tokens = _context_tokens(folder)
        self._token_bytes = _TokenBytes(self._tokenizer)
        self.template, self.template_failure = self._load_template(folder, config)

    def _load_template(self, folder: Path, config: Mapping[str, Any]) -> tuple[ChatTemplate | None, str]:
        source = find_template(folder, config)
        if source is None:
            log.info("chat_template_missing", model_path=str(folder), used="plain")
            source = PLAIN_TEMPLATE
        try:
            return ChatTemplate(source, self._special_tokens), ""
        except TemplateFailed as error:
            log.warning("chat_template_refused", model_path=str(folder), reason=str(error))
            return None, str(error)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of a short text. Which special tokens are added is said by tokenizer.json alone, as in transformers 5:
        add_bos_token beside it means nothing."""
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_within(self, text: str, tokens_max: int, *, add_special_tokens: bool) -> list[int]:
        """Ids of a text, at most `tokens_max` unless that is 0. A text that is surely longer is not tokenised, which
        takes a second for each million tokens. Raises TextTooLong then."""
        if 0 < tokens_max < len(text) and self._chars_per_token is not None:
            tokens_min = -(-len(text) // self._chars_per_token)
            if tokens_min > tokens_max:
                raise TextTooLong(tokens_min)
        return self.encode(text, add_special_tokens=add_special_tokens)

    @cached_property
    def _chars_per_token(self) -> int | None:
        return chars_per_token_max(self._tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids as clients see it: without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of ids with special tokens written out."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, also half a character; special tokens as they are written."""
        return self._token_bytes.of(token)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation. Raises TemplateFailed."""
        if self.template is None:
            raise TemplateFailed(self.template_failure)
        return self.template.render(messages, **options)


class TokenizerPool:
    """Runs what would hold up the loop in a few threads; the tokenizer's batch calls release the interpreter lock."""

    def __init__(self, retry_ms: int) -> None:
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="tokenize")
        self._waiting = 0
        self._retry_ms = retry_ms

    async def load(self, folder: Path) -> ModelTokenizer:
        return await asyncio.get_running_loop().run_in_executor(self._pool, ModelTokenizer, folder)

    async def encode(
        self, tokenizer: ModelTokenizer, text: str, *, add_special_tokens: bool, tokens_max: int = 0
    ) -> list[int]:
        """Ids of a text of any length. Raises TextTooLong for one that surely has more than `tokens_max` (0: any number
        will do), Retryable when too many long texts wait already."""
        if len(text) <= LONG_TEXT_CHARS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await self._off_loop(
            lambda: tokenizer.encode_within(text, tokens_max, add_special_tokens=add_special_tokens)
        )

    async def render_chat(
        self, tokenizer: ModelTokenizer, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> str:
        """A conversation's prompt text. Raises TemplateFailed, Retryable."""
        if sum(len(str(message.get("content"))) for message in messages) <= LONG_TEXT_CHARS:
            return tokenizer.render_chat(messages, **options)
        return await self._off_loop(lambda: tokenizer.render_chat(messages, **options))

    async def _off_loop(self, work: Any) -> Any:
        if self._waiting >= POOL_WAITING_MAX:
            text = f"{POOL_WAITING_MAX} long prompts wait for their tokenisation"
            raise Retryable(Reason(kind=ReasonKind.OVERLOADED, text=text), self._retry_ms)
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _TokenBytes:
    """Id to bytes by the tokenizer's decoder: byte-level BPE, byte fallback, or plain text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items()}
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._metaspace = "Metaspace" in kinds or "Replace" in kinds
        self._bytes_of = byte_level_alphabet() if self._byte_level else {}
        self._known: dict[int, bytes] = {}

    def of(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._find(token)
        return found

    def _find(self, token: int) -> bytes:
        if token in self._special:
            return self._special[token].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level and all(character in self._bytes_of for character in piece):
            return bytes(self._bytes_of[character] for character in piece)
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        if self._metaspace:
            return piece.replace("▁", " ").encode()
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()


def _decoder_kinds(tokenizer: Tokenizer) -> set[str]:
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else None
    if decoder is None:
        return set()
    parts = decoder.get("decoders", [decoder])
    return {part["type"] for part in parts}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or nothing if there is no such file. Raises TokenizerMissing."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerMissing(f"{path}: {error}") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _eos_ids(folder: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        found = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _context_tokens(folder: Path) -> int:
    """The model's own limit, 0 if its config names none."""
    config = _read_json(folder / "config.json")
    for part in (config, config.get("text_config", {})):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(part.get(name), int):
                return part[name]
    return 0
