"""Reads the header of a GGUF file (version 2 and 3) and single tensors from it.

Own parser: the gguf package walks a 262k-token vocabulary string by string through a memory map, some 20 s a pass;
this takes a quarter of a second. The package still dequantises.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from controlplane.runtime.errors import invalid

MAGIC = b"GGUF"
ALIGNMENT_DEFAULT = 32
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor's place; `shape` is outermost dimension first, as in torch."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block * size


@dataclass(frozen=True, slots=True)
class GgufFile:
    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def load(self, name: str) -> np.ndarray[Any, Any]:
        """The tensor as float32 of its shape."""
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, dtype=np.uint8, count=tensor.bytes, offset=tensor.offset)
        block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
        rows = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * size)
        values = gguf.quants.dequantize(rows, tensor.kind)
        return values.astype(np.float32, copy=False).reshape(tensor.shape)


def open_gguf(path: Path) -> GgufFile:
    """The header of the file at `path`. Raises Rejected for what is no GGUF file, or a broken one."""
    with path.open("rb") as file:
        header = file.read(16 * 1024 * 1024)
        while True:
            try:
                return _Parser(header).file(path)
            except (struct.error, IndexError) as error:
                more = file.read(len(header))
                if not more:
                    raise invalid(f"{path} ends within its header") from error
                header += more


class _Parser:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def file(self, path: Path) -> GgufFile:
        if self._data[:4] != MAGIC:
            raise invalid(f"{path} is no GGUF file")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            raise invalid(f"{path} has GGUF version {version}; 2 and 3 are supported")
        tensors, entries = self._scalar("<Q"), self._scalar("<Q")
        metadata = {self._string(): self._value(self._scalar("<I")) for _ in range(entries)}
        infos = [(self._string(), self._tensor(path)) for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", ALIGNMENT_DEFAULT))
        data = -(-self._at // alignment) * alignment
        placed = {name: GgufTensor(info.kind, info.shape, data + info.offset) for name, info in infos}
        size = path.stat().st_size
        short = [name for name, info in placed.items() if info.offset + info.bytes > size]
        if short:
            raise invalid(f"{path} is cut short: {short[0]} lies behind its end")
        return GgufFile(path, metadata, placed)

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._data):
            raise IndexError("a string lies behind the end of what was read")
        return self._data[start : self._at].decode("utf-8", "surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("<I"), self._scalar("<Q")
        if item in (_STRING, _ARRAY):
            return [self._value(item) for _ in range(count)]
        form = f"<{count}{_SCALARS[item][1]}"
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return list(values)

    def _tensor(self, path: Path) -> GgufTensor:
        dims = tuple(self._scalar("<Q") for _ in range(self._scalar("<I")))
        kind = self._scalar("<I")
        try:
            quantisation = gguf.GGMLQuantizationType(kind)
        except ValueError as error:
            raise invalid(f"{path} holds a tensor of the unknown type {kind}") from error
        return GgufTensor(quantisation, dims[::-1], self._scalar("<Q"))
