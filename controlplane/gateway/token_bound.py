"""How much text one token can stand for at most, so that a text far too long is refused without its tokenisation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, models

NFC_CHARS = 4
"""Code points of which NFC makes one, at most: the longest canonical decomposition (UAX #15)."""

_KEEPING = ("ByteLevel", "Digits", "Metaspace")
"""Pre-tokenizers that leave no text out."""


def chars_per_token_max(tokenizer: Tokenizer) -> int | None:
    """Characters that a token covers at most; None where text may go without a token, or any length of it in one: as
    unknown, as white space that is dropped or beside an added token that takes it in, or by a normalizer."""
    factor = _normalizer_factor(tokenizer)
    added = tokenizer.get_added_tokens_decoder().values()
    if factor is None or any(token.lstrip or token.rstrip for token in added):
        return None
    if not _pre_tokenizer_keeps_all(tokenizer) or not _knows_all_bytes(tokenizer):
        return None
    # One by one, so that other threads run in between: as one dictionary they hold the interpreter's lock for long.
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    lengths = [len(token) for token in map(tokenizer.id_to_token, range(size)) if token is not None]
    # A vocabulary with holes has ids beyond its size, and maybe the longest token there.
    return factor * max(lengths) if len(lengths) == size else None


def _normalizer_factor(tokenizer: Tokenizer) -> int | None:
    """How many characters become one at most, None if any number may."""
    factor = 1
    for part in _parts(tokenizer.normalizer, "normalizers"):
        match part:
            case {"type": "NFC"}:
                factor *= NFC_CHARS
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if len(new) >= len(old):
                pass
            case _:
                return None
    return factor


def _pre_tokenizer_keeps_all(tokenizer: Tokenizer) -> bool:
    return all(
        part["type"] in _KEEPING or (part["type"] == "Split" and part["behavior"] != "Removed")
        for part in _parts(tokenizer.pre_tokenizer, "pretokenizers")
    )


def _knows_all_bytes(tokenizer: Tokenizer) -> bool:
    """Whatever a text holds has tokens, none of them for what is unknown."""
    model = tokenizer.model
    if not isinstance(model, models.BPE):
        return False
    if any(part["type"] == "ByteLevel" for part in _parts(tokenizer.pre_tokenizer, "pretokenizers")):
        names: Iterator[str] = iter(byte_level_alphabet())
    elif model.byte_fallback:
        names = (f"<0x{byte:02X}>" for byte in range(256))
    else:
        return False
    return all(model.token_to_id(name) is not None for name in names)


def _parts(component: Any, key: str) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer as what it is made of; nothing if there is none."""
    if component is not None:
        yield from _flat(json.loads(component.__getstate__()), key)


def _flat(part: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part[key]:
        yield from _flat(inner, key)


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: bytes that print stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + place): byte for place, byte in enumerate(rest)})
    return alphabet
