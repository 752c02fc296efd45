from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from controlplane.runtime.errors import Rejected
from dataplane.models import tensor_file
from dataplane.models.tensor_file import TensorReader, list_tensors, read_header
from dataplane.parallel.split import Range


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors")


@st.composite
def slices(draw: st.DrawFn) -> tuple[list[int], list[Range]]:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    ranges = []
    for size in shape:
        start = draw(st.integers(0, size))
        ranges.append((start, draw(st.integers(start, size))))
    return shape, ranges


@settings(max_examples=150, deadline=None)
@given(
    drawn=slices(),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    wanted=st.sampled_from([torch.float32, torch.bfloat16]),
    strided=st.booleans(),
)
def test_any_slice_of_any_type_lands_in_any_place(
    drawn: tuple[list[int], list[Range]], stored: torch.dtype, wanted: torch.dtype, strided: bool, folder: Path
) -> None:
    shape, ranges = drawn
    whole = torch.arange(torch.Size(shape).numel()).view(shape).to(stored)
    save_file({"a": torch.ones(3), "x": whole}, folder / "x.safetensors")
    sizes = [stop - start for start, stop in ranges]
    place = torch.zeros(*sizes, 2, dtype=wanted)[..., 0] if strided else torch.zeros(sizes, dtype=wanted)
    with TensorReader() as reader:
        reader.read(read_header(folder / "x.safetensors")["x"], ranges, place)
    assert torch.equal(place, whole[tuple(slice(*part) for part in ranges)].to(wanted))


def test_slices_larger_than_the_buffer_are_read_in_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "BUFFER_BYTES", 256)
    whole = torch.randn(50, 30)
    save_file({"x": whole}, folder / "blocks.safetensors")
    columns, rows = torch.empty(50, 11), torch.empty(33, 30, dtype=torch.bfloat16)
    with TensorReader() as reader:
        stored = read_header(folder / "blocks.safetensors")["x"]
        reader.read(stored, [(0, 50), (7, 18)], columns)
        reader.read(stored, [(9, 42), (0, 30)], rows)
    assert torch.equal(columns, whole[:, 7:18])
    assert torch.equal(rows, whole[9:42].to(torch.bfloat16))


def test_a_scalar(folder: Path) -> None:
    save_file({"x": torch.tensor(2.5)}, folder / "scalar.safetensors")
    place = torch.zeros((), dtype=torch.bfloat16)
    with TensorReader() as reader:
        reader.read(read_header(folder / "scalar.safetensors")["x"], [], place)
    assert place == 2.5


def test_an_index_names_the_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    save_file({"stray": torch.ones(3)}, tmp_path / "three.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(list_tensors(tmp_path)) == {"a", "b"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(Rejected, match=r"lacks two\.safetensors, which its index names"):
        list_tensors(tmp_path)


def test_a_type_that_torch_cannot_hold_is_refused(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F6_E3M2", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(Rejected, match="x has the type F6_E3M2"):
        read_header(tmp_path / "odd.safetensors")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(Rejected, match="no safetensors file"):
        read_header(tmp_path / "odd.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Rejected, match="holds no safetensors files"):
        list_tensors(tmp_path / "empty")
