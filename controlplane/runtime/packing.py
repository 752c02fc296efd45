"""Token arrays on the wire: little-endian u32 in bytes, one copy instead of a loop."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

assert array("I").itemsize == 4, "array('I') must hold 32-bit items"
assert array("f").itemsize == 4, "array('f') must hold 32-bit items"
_SWAP = sys.byteorder == "big"


def pack_u32(values: Iterable[int] | array[int]) -> bytes:
    """Bytes of `values`, four each. Raises OverflowError for a value outside u32."""
    packed = values if isinstance(values, array) and values.typecode == "I" else array("I", values)
    if _SWAP:
        packed = array("I", packed)
        packed.byteswap()
    return packed.tobytes()


def unpack_u32(data: bytes) -> array[int]:
    """The values of `pack_u32`. Raises ValueError if the length is no multiple of four."""
    values = array("I")
    values.frombytes(data)
    if _SWAP:
        values.byteswap()
    return values


def pack_f32(values: Iterable[float]) -> bytes:
    """Bytes of `values` as 32-bit floats, four each."""
    packed = array("f", values)
    if _SWAP:
        packed.byteswap()
    return packed.tobytes()


def unpack_f32(data: bytes) -> array[float]:
    """The values of `pack_f32`. Raises ValueError if the length is no multiple of four."""
    values = array("f")
    values.frombytes(data)
    if _SWAP:
        values.byteswap()
    return values
