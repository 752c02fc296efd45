"""From a model's own tensor names to the tensors on disk, by transformers' conversion mapping.

Files may name tensors differently from the model and store them apart (one tensor an expert and projection). The
mapping is interpreted as geometry, regions of whole tensors, so that a rank reads only what its pieces cover:
an expert that lies on another rank is never touched. Operations that are no geometry are refused by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from controlplane.runtime.errors import invalid
from dataplane.models.pieces import Box, Piece, Shape, overlap
from dataplane.models.tensor_file import StoredTensor, TensorReader, list_tensors


@dataclass(frozen=True, slots=True)
class Region:
    """`whole[to] = stored[at]`; `to` may have one leading dimension of length 1 more than `at` (a merged list)."""

    stored: StoredTensor
    at: Box
    to: Box


class Checkpoint:
    """A folder's tensors under the model's names. `extra` are names on disk that the model has no place for."""

    def __init__(self, regions: dict[str, tuple[Region, ...]], extra: tuple[str, ...]) -> None:
        self.regions = regions
        self.extra = extra
        # Regions of merged lists by their place in it: of hundreds of experts a piece wants one or a few.
        self._merged = {name: _by_place(parts) for name, parts in regions.items() if _is_merged(parts)}

    def read(self, piece: Piece, reader: TensorReader, local: torch.Tensor) -> None:
        """Copy what `piece` covers into `local`. Raises Rejected where a part of it is not on disk."""
        for region in self._candidates(piece):
            common = overlap(piece.at, region.to)
            if common is None:
                continue
            target = local
            for dim, ((start, stop), at, to) in enumerate(zip(common, piece.at, piece.to, strict=True)):
                target = target.narrow(dim, start - at[0] + to[0], stop - start)
            lead = len(region.to) - len(region.at)
            if lead:
                target = target.squeeze(0)
            ranges = [
                (start - to[0] + at[0], stop - to[0] + at[0])
                for (start, stop), to, at in zip(common[lead:], region.to[lead:], region.at, strict=True)
            ]
            reader.read(region.stored, ranges, target)

    def _candidates(self, piece: Piece) -> Iterable[Region]:
        places = self._merged.get(piece.source)
        if places is None:
            return self.regions[piece.source]
        return [region for place in range(*piece.at[0]) for region in places[place]]


def open_checkpoint(folder: Path, model: PreTrainedModel, shapes: dict[str, Shape]) -> Checkpoint:
    """The checkpoint in `folder` for `model` (whole, before surgery; may be on meta) with tensors of `shapes`.

    Raises Rejected for operations that cannot be cut and for tensors whose shape is not the model's.
    """
    transforms = _conversions(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    found: dict[str, dict[str | None, list[StoredTensor]]] = defaultdict(lambda: defaultdict(list))
    names: dict[str, list[str]] = defaultdict(list)
    tensors = list_tensors(folder)
    for key in sorted(tensors, key=dot_natural_key):
        # The text model of a multimodal checkpoint lies under this prefix.
        text_key = key.replace("language_model.", "", 1)
        name, pattern = rename_source_key(text_key, renamings, converters, model.base_model_prefix, shapes)
        found[name][pattern].append(tensors[key])
        names[name].append(key)
    regions: dict[str, tuple[Region, ...]] = {}
    extra: list[str] = []
    for name, parts in found.items():
        converter = by_pattern.get(next(iter(parts)) or "")
        for target, pieces in _targets(name, parts, converter):
            if target not in shapes:
                extra += [key for key in names[name] if key not in extra]
                continue
            _check(target, pieces, shapes[target])
            regions[target] = tuple(pieces)
    return Checkpoint(regions, tuple(extra))


def _conversions(model: PreTrainedModel) -> list[WeightTransform]:
    return get_model_conversion_mapping(model)


def _targets(
    name: str, parts: dict[str | None, list[StoredTensor]], converter: WeightConverter | None
) -> Iterable[tuple[str, list[Region]]]:
    if converter is None:
        (stored,) = parts[None]
        yield name, [Region(stored, _full(stored.shape), _full(stored.shape))]
        return
    kinds = [type(operation) for operation in converter.operations]
    ordered = [parts[pattern] for pattern in converter.source_patterns if pattern in parts]
    make = _GEOMETRY.get(tuple(kinds))
    if make is None:
        text = ", ".join(kind.__name__ for kind in kinds)
        raise invalid(f"{name} is stored in a form that cannot be read in slices (operations: {text})")
    yield from make(name, ordered, converter)


def _merged(
    name: str, ordered: list[list[StoredTensor]], converter: WeightConverter
) -> Iterable[tuple[str, list[Region]]]:
    """Lists of tensors stacked along a new first dimension, then the stacks joined along another one."""
    join = next((operation.dim for operation in converter.operations if isinstance(operation, Concatenate)), 1)
    regions: list[Region] = []
    offset = 0
    for stack in ordered:
        for index, stored in enumerate(stack):
            to = [(index, index + 1), *_full(stored.shape)]
            start, stop = to[join]
            to[join] = (start + offset, stop + offset)
            regions.append(Region(stored, _full(stored.shape), tuple(to)))
        offset += stack[0].shape[join - 1]
    yield name, regions


def _joined(
    name: str, ordered: list[list[StoredTensor]], converter: WeightConverter
) -> Iterable[tuple[str, list[Region]]]:
    """Tensors joined along one dimension."""
    (join,) = (operation.dim for operation in converter.operations if isinstance(operation, Concatenate))
    regions: list[Region] = []
    offset = 0
    for stored in (item for items in ordered for item in items):
        to = list(_full(stored.shape))
        to[join] = (offset, offset + stored.shape[join])
        offset += stored.shape[join]
        regions.append(Region(stored, _full(stored.shape), tuple(to)))
    yield name, regions


def _chunked(
    name: str, ordered: list[list[StoredTensor]], converter: WeightConverter
) -> Iterable[tuple[str, list[Region]]]:
    """One tensor cut into equal parts for several targets."""
    (operation,) = (item for item in converter.operations if isinstance(item, Chunk))
    stored = ordered[0][0]
    targets = converter.target_patterns
    if operation.num_shards_attribute is not None or stored.shape[operation.dim] % len(targets):
        raise invalid(f"{name} is stored in a form that cannot be read in slices (an uneven Chunk)")
    size = stored.shape[operation.dim] // len(targets)
    for index, target in enumerate(targets):
        at = list(_full(stored.shape))
        at[operation.dim] = (index * size, (index + 1) * size)
        to = list(at)
        to[operation.dim] = (0, size)
        yield name.replace(targets[0], target), [Region(stored, tuple(at), tuple(to))]


_Make = Callable[[str, list[list[StoredTensor]], WeightConverter], Iterable[tuple[str, list[Region]]]]
_GEOMETRY: dict[tuple[type, ...], _Make] = {
    (MergeModulelist,): _merged,
    (MergeModulelist, Concatenate): _merged,
    (Concatenate,): _joined,
    (Chunk,): _chunked,
}


def _is_merged(regions: tuple[Region, ...]) -> bool:
    return any(len(region.to) > len(region.at) for region in regions)


def _by_place(regions: tuple[Region, ...]) -> dict[int, list[Region]]:
    places: dict[int, list[Region]] = defaultdict(list)
    for region in regions:
        places[region.to[0][0]].append(region)
    return places


def _full(shape: Iterable[int]) -> Box:
    return tuple((0, size) for size in shape)


def _check(name: str, regions: list[Region], shape: Shape) -> None:
    """The regions tile the tensor: as many values as it has, none outside."""
    inside = all(
        len(region.to) == len(shape) and all(stop <= size for (_, stop), size in zip(region.to, shape, strict=True))
        for region in regions
    )
    values = sum(prod(stop - start for start, stop in region.to) for region in regions)
    if not inside or values != prod(shape):
        stored = ", ".join(str(list(region.stored.shape)) for region in regions[:3])
        raise invalid(f"{name}: the file has {len(regions)} × {stored}, the model wants {list(shape)}")
