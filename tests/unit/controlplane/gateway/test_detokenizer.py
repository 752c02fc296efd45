"""Incremental text: whole characters only, equal to the whole decode, never a stop string."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from controlplane.gateway.detokenizer import HALF_CHARACTER, HELD_TOKENS_MAX, Detokenizer, StopStrings
from controlplane.gateway.token_bound import byte_level_alphabet
from tests.support.tokenizers import SPECIAL, write_model


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(str(write_model(tmp_path_factory.mktemp("model")) / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Like Llama 2's and Gemma's: pieces with ▁ for a space, and a token for each byte."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁fox", "s", "é", "▁你好"]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def known(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    assert found is not None
    return found


def shown(tokenizer: Tokenizer, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(lambda part: decode(tokenizer, part), context)
    return [detokenizer.add(token) for token in ids]


def test_half_a_character_waits_for_its_other_half(byte_level: Tokenizer):
    ids = byte_level.encode("a👩‍🚀b", add_special_tokens=False).ids
    parts = shown(byte_level, ids)
    assert "".join(parts) == "a👩‍🚀b"
    assert all(HALF_CHARACTER not in part for part in parts)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_the_parts_of_any_text_are_the_text(byte_level: Tokenizer, text: str):
    ids = byte_level.encode(text, add_special_tokens=False).ids
    # A text may itself end in a replacement character, which cannot be told from half a character.
    assert "".join(shown(byte_level, ids)) == text.rstrip(HALF_CHARACTER) or HALF_CHARACTER in text


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_parts_of_any_tokens_are_the_whole_decode(byte_level: Tokenizer, data: st.DataObject):
    size = byte_level.get_vocab_size()
    ids = data.draw(st.lists(st.integers(len(SPECIAL), size - 1), max_size=HELD_TOKENS_MAX))
    whole = decode(byte_level, ids)
    assert whole.startswith("".join(shown(byte_level, ids)))
    assert set(whole[len("".join(shown(byte_level, ids))) :]) <= {HALF_CHARACTER} or HALF_CHARACTER in whole


def test_bytes_of_one_character_by_fallback(byte_fallback: Tokenizer):
    ids = [known(byte_fallback, f"<0x{byte:02X}>") for byte in "你好".encode()]
    assert shown(byte_fallback, ids) == ["", "", "你", "", "", "好"]


def test_a_leading_space_is_kept_after_a_prompt_and_dropped_without(byte_fallback: Tokenizer):
    the, fox = known(byte_fallback, "▁the"), known(byte_fallback, "▁fox")
    assert "".join(shown(byte_fallback, [fox, the], context=[the])) == " fox the"
    assert "".join(shown(byte_fallback, [the, fox])) == "the fox"


def test_special_tokens_leave_no_text_and_do_not_pile_up(byte_level: Tokenizer):
    (a,) = byte_level.encode("a", add_special_tokens=False).ids
    detokenizer = Detokenizer(lambda part: decode(byte_level, part))
    parts = [detokenizer.add(token) for token in [a, *[1] * 500, a]]
    assert "".join(parts) == "aa"


def test_bytes_that_are_no_text_come_out_in_the_end(byte_level: Tokenizer):
    lone = known(byte_level, "ÿ")  # byte 0xFF
    assert HALF_CHARACTER in "".join(shown(byte_level, [lone] * (HELD_TOKENS_MAX + 2)))


def test_a_prompt_that_ends_within_a_character_lends_its_half(byte_level: Tokenizer):
    first, second = (known(byte_level, piece) for piece in _byte_pieces("é"))
    assert "".join(shown(byte_level, [second], context=[first])) == "é"


def _byte_pieces(text: str) -> list[str]:
    names = {byte: character for character, byte in byte_level_alphabet().items()}
    return [names[byte] for byte in text.encode()]


class TestStops:
    def test_a_stop_over_several_parts_is_never_shown(self):
        stops = StopStrings(["END"])
        assert [stops.add(part) for part in ("ab", "cE", "N", "D", "more")] == ["ab", "c", "", "", ""]
        assert stops.found == "END"

    def test_what_only_looked_like_a_stop_is_shown_after_all(self):
        stops = StopStrings(["END"])
        assert [stops.add(part) for part in ("aE", "N", "x")] == ["a", "", "ENx"]

    def test_what_is_held_comes_with_the_end(self):
        stops = StopStrings(["\n\n"])
        assert stops.add("a\n") == "a"
        assert stops.flush() == "\n"

    def test_the_stop_that_ends_first_counts(self):
        stops = StopStrings(["abcd", "bc"])
        assert stops.add("xabcd") == "xa"
        assert stops.found == "bc"

    def test_the_stop_is_shown_if_asked_for(self):
        stops = StopStrings(["END"], include=True)
        assert stops.add("abEND tail") == "abEND"

    @given(
        st.lists(st.text("abc", max_size=3), max_size=12), st.lists(st.text("abc", min_size=1, max_size=3), max_size=3)
    )
    def test_any_cut_of_a_text_shows_the_same(self, parts: list[str], wanted: list[str]):
        stops = StopStrings(wanted)
        text = "".join(stops.add(part) for part in parts) + stops.flush()
        whole = "".join(parts)
        found = [whole.find(stop) + len(stop) for stop in wanted if stop in whole]
        if not found:
            assert text == whole
        else:
            assert stops.found is not None
            assert text == whole[: min(found) - len(stops.found)]
