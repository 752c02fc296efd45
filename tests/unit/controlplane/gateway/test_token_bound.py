"""No text has fewer tokens than the bound says; where there is none, none is said."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from controlplane.gateway.token_bound import NFC_CHARS, byte_level_alphabet, chars_per_token_max

SPACES = "▁▁▁▁"


def byte_level(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """As Llama 3 and Qwen have it."""
    names = [*byte_level_alphabet(), "ab", "abc"]
    tokenizer = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, [("a", "b"), ("ab", "c")]))
    split = pre_tokenizers.Split(Regex(r"\s+|\w+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Gemma has it."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "<unk>", "▁", "▁▁", SPACES, "a"]
    vocab = {name: place for place, name in enumerate(names)}
    merges = [("▁", "▁"), ("▁▁", "▁▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return tokenizer


BOUND = {
    "byte level": (byte_level(), 5),
    "byte level after NFC": (byte_level(normalizers.NFC()), 5 * NFC_CHARS),
    "byte fallback": (byte_fallback(), 6),
}


@pytest.mark.parametrize("kind", BOUND)
@given(text=st.text(st.sampled_from("abc <end>\t\nüé́̈ᾂ가각한\u1100\u1161\u11a8Å👩‍🚀\0")))
def test_no_text_has_fewer_tokens(kind: str, text: str) -> None:
    tokenizer, chars = BOUND[kind]
    assert chars_per_token_max(tokenizer) == chars
    for form in (text, unicodedata.normalize("NFD", text)):
        assert len(tokenizer.encode(form).ids) * chars >= len(form)


def test_nfc_makes_one_code_point_of_at_most_so_many() -> None:
    assert max(len(unicodedata.normalize("NFD", chr(code))) for code in range(0x110000)) == NFC_CHARS


def strips() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


def drops_white_space() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel()])
    return tokenizer


def splits_white_space_off() -> Tokenizer:
    tokenizer = byte_level()
    split = pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel()])
    return tokenizer


def knows_few_bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    return tokenizer


def has_unknown_words() -> Tokenizer:
    return Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))


def has_unknown_characters() -> Tokenizer:
    return Tokenizer(models.BPE({"a": 0, "?": 1}, [], unk_token="?", fuse_unk=True))


@pytest.mark.parametrize(
    "tokenizer",
    [
        strips(),
        drops_white_space(),
        splits_white_space_off(),
        knows_few_bytes(),
        has_unknown_words(),
        has_unknown_characters(),
        byte_level(normalizers.Strip()),
        byte_level(normalizers.NFKC()),
        byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.Replace("  ", " ")])),
        byte_level(normalizers.Replace(Regex(" +"), " ")),
    ],
)
def test_where_text_may_go_without_tokens_there_is_no_bound(tokenizer: Tokenizer) -> None:
    assert chars_per_token_max(tokenizer) is None
