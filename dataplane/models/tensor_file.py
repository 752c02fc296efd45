"""Reads slices of safetensors files straight into place.

A mapping would keep every touched page of a file resident, whole rows for a column slice; `pread` into the destination
holds the share alone, plus one bounded buffer for slices that are not contiguous or change their type.
Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from controlplane.runtime.errors import invalid
from dataplane.parallel.split import Range

BUFFER_BYTES = 8 * 1024 * 1024
HEADER_BYTES_MAX = 512 * 1024 * 1024

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: its first byte counts from the start of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises Rejected for a broken file or a type that torch cannot hold."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, HEADER_BYTES_MAX):
            raise invalid(f"{path} is no safetensors file: its header claims {length} of {size} bytes")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length, size) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: dict[str, object], data: int, size: int) -> StoredTensor:
    dtype = DTYPES.get(str(entry["dtype"]))
    if dtype is None:
        raise invalid(f"{path}: {name} has the type {entry['dtype']}, which is not supported")
    start, stop = entry["data_offsets"]  # type: ignore[misc]
    stored = StoredTensor(path, dtype, tuple(entry["shape"]), data + start)  # type: ignore[arg-type]
    if stored.bytes != stop - start or data + stop > size:
        raise invalid(f"{path}: {name} does not fit its place, the file is broken or cut short")
    return stored


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model folder: those its index names, else of all its safetensors files. Raises Rejected."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise invalid(f"{folder} holds no safetensors files")
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        if not (folder / name).is_file():
            raise invalid(f"{folder} lacks {name}, which its index names")
        tensors.update(read_header(folder / name))
    return tensors


class TensorReader:
    """Reads from any number of files, one descriptor each. Close it, or use it in a `with`."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._buffer: torch.Tensor | None = None

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, stored: StoredTensor, ranges: Sequence[Range], destination: torch.Tensor) -> None:
        """Fill `destination` (any device, dtype and strides; the shape of `ranges`) with that slice of `stored`."""
        assert tuple(stop - start for start, stop in ranges) == tuple(destination.shape), (ranges, destination.shape)
        if destination.numel():
            self._read(stored, stored.offset, stored.shape, list(ranges), destination)

    def _read(
        self, stored: StoredTensor, offset: int, shape: tuple[int, ...], ranges: list[Range], destination: torch.Tensor
    ) -> None:
        if all((0, size) == part for size, part in zip(shape[1:], ranges[1:], strict=True)):
            self._read_rows(stored, offset, shape, ranges, destination)
        elif len(shape) == 2:
            self._read_columns(stored, offset, shape, ranges, destination)
        else:
            step = prod(shape[1:]) * stored.dtype.itemsize
            for to, row in enumerate(range(*ranges[0])):
                self._read(stored, offset + row * step, shape[1:], ranges[1:], destination[to])

    def _read_rows(
        self, stored: StoredTensor, offset: int, shape: tuple[int, ...], ranges: list[Range], destination: torch.Tensor
    ) -> None:
        row_bytes = prod(shape[1:]) * stored.dtype.itemsize
        start = offset + (ranges[0][0] * row_bytes if shape else 0)
        if _is_plain(destination, stored.dtype):
            self._fill(stored.file, start, destination)
            return
        rows = destination.reshape(1) if not shape else destination
        for first, last in _blocks(rows.shape[0], row_bytes):
            block = self._scratch(stored.dtype, (last - first, *rows.shape[1:]))
            self._fill(stored.file, start + first * row_bytes, block)
            rows[first:last].copy_(block)

    def _read_columns(
        self, stored: StoredTensor, offset: int, shape: tuple[int, ...], ranges: list[Range], destination: torch.Tensor
    ) -> None:
        (top, bottom), (left, right) = ranges
        row_bytes = shape[1] * stored.dtype.itemsize
        for first, last in _blocks(bottom - top, row_bytes):
            block = self._scratch(stored.dtype, (last - first, shape[1]))
            self._fill(stored.file, offset + (top + first) * row_bytes, block)
            destination[first:last].copy_(block[:, left:right])

    def _scratch(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = torch.empty(max(size, BUFFER_BYTES), dtype=torch.uint8)
        return self._buffer[:size].view(dtype).view(shape)

    def _fill(self, path: Path, offset: int, block: torch.Tensor) -> None:
        # A contiguous tensor of one item may have any stride, which a view as bytes refuses.
        flat = block.as_strided((block.numel(),), (1,))
        view = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        descriptor = self._descriptors.get(path)
        if descriptor is None:
            descriptor = self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        done = 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                raise invalid(f"{path} ended while it was read")
            done += count


def _is_plain(destination: torch.Tensor, dtype: torch.dtype) -> bool:
    return destination.dtype == dtype and destination.is_contiguous() and destination.device.type == "cpu"


def _blocks(rows: int, row_bytes: int) -> Iterator[Range]:
    step = max(1, BUFFER_BYTES // max(1, row_bytes))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
