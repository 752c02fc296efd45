"""Token arrays as bytes: little-endian, four bytes each, on every machine."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.runtime import packing
from controlplane.runtime.packing import pack_f32, pack_u32, unpack_f32, unpack_u32

TOKENS = st.lists(st.integers(0, 2**32 - 1))


@given(TOKENS)
def test_tokens_return_as_they_went(tokens: list[int]) -> None:
    assert list(unpack_u32(pack_u32(tokens))) == tokens
    assert pack_u32(array("I", tokens)) == pack_u32(tokens)


@given(TOKENS)
def test_tokens_are_little_endian(tokens: list[int]) -> None:
    assert pack_u32(tokens) == struct.pack(f"<{len(tokens)}I", *tokens)


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_floats_return_as_they_went(values: list[float]) -> None:
    packed = pack_f32(values)
    assert packed == struct.pack(f"<{len(values)}f", *values)
    assert list(unpack_f32(packed)) == values


def test_a_big_endian_machine_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = array("I", [1, 2**31])
    monkeypatch.setattr(packing, "_SWAP", True)
    assert pack_u32(tokens) == struct.pack(">2I", *tokens)
    assert unpack_u32(pack_u32(tokens)) == tokens
    assert list(unpack_f32(pack_f32([1.5]))) == [1.5]
    # The caller's array is not touched.
    assert list(tokens) == [1, 2**31]


@pytest.mark.parametrize("value", [-1, 2**32])
def test_what_is_no_u32_is_refused(value: int) -> None:
    with pytest.raises(OverflowError):
        pack_u32([value])


@pytest.mark.parametrize("unpack", [unpack_u32, unpack_f32])
def test_a_torn_array_is_refused(unpack: object) -> None:
    with pytest.raises(ValueError, match="multiple of item size"):
        unpack(b"12345")  # type: ignore[operator]
