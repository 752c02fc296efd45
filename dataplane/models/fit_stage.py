"""Cuts a model into pipeline stages and its vocabulary over the tensor ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dataplane.models.dry_run import DRY_ATTENTION
from dataplane.models.fitted import Fitted
from dataplane.models.pieces import part
from dataplane.models.structure import decoder_of, layers_of, path_of, refused, set_implementation
from dataplane.parallel.expert import EXPERTS_IMPLEMENTATION
from dataplane.parallel.split import Range, cut_padded, split_layers
from dataplane.parallel.tensor import Linear, VocabParallelEmbedding

_MULTIPLIER = "embedding_multiplier"


class PassThrough(nn.Module):
    """Stands where a layer of another stage stood: positions in the list, and what is read from them, stay right."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(layer).items() if isinstance(value, int | str | float | bool)}
        self.__dict__.update({name: value for name, value in plain.items() if name != "training"})

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def fit_stage(fitted: Fitted) -> None:
    """Drop the layers, the final norm, the head and the embedding of other stages. Raises Rejected, SplitError."""
    mesh = fitted.mesh
    if mesh.pipeline.size == 1:
        return
    model = fitted.model
    path, layers = layers_of(model)
    first, last = split_layers(len(layers), mesh.pipeline.size, mesh.stage)
    decoder = decoder_of(model)
    norms = _final_norms(fitted, decoder, layers)
    for index, layer in enumerate(layers):
        if not first <= index < last:
            fitted.replace(f"{path}.{index}", PassThrough(layer))
    if not mesh.is_last_stage:
        for name in norms:
            setattr(decoder, name, nn.Identity())
        fitted.replace(path_of(model, model.get_output_embeddings()), nn.Identity())
    if not mesh.is_first_stage:
        fitted.replace(path_of(model, model.get_input_embeddings()), nn.Identity())
        if hasattr(decoder, _MULTIPLIER):
            # Applied by the decoder's forward code to whatever comes in.
            setattr(decoder, _MULTIPLIER, 1.0)
        _check_transparent(fitted, decoder, path, layers, norms)


def _final_norms(fitted: Fitted, decoder: nn.Module, layers: nn.ModuleList) -> list[str]:
    """Names of what the decoder applies after its layers. Raises Rejected for parts whose place is not known."""
    embedding = fitted.model.get_input_embeddings()
    norms: list[str] = []
    for name, child in decoder.named_children():
        parameters = list(child.parameters())
        if child in (layers, embedding) or not parameters:
            continue
        if any(item.dim() != 1 for item in parameters):
            raise refused(fitted.model, f"its part {name} belongs to no known pipeline stage")
        norms.append(name)
    return norms


def _check_transparent(fitted: Fitted, decoder: Any, path: str, layers: nn.ModuleList, norms: list[str]) -> None:
    """Without layers and norm the decoder must hand on what it was given: nothing in its code may scale it again."""
    kept = {name: getattr(decoder, name) for name in norms}
    set_implementation(fitted.model, DRY_ATTENTION, EXPERTS_IMPLEMENTATION)
    fitted.replace(path, nn.ModuleList(PassThrough(layer) for layer in layers))
    for name in norms:
        setattr(decoder, name, nn.Identity())
    try:
        with torch.device("cpu"), torch.no_grad():
            x = torch.arange(1.0, 1.0 + 2 * fitted.model.config.hidden_size).view(1, 2, -1)
            positions = torch.arange(2).unsqueeze(0)
            same = decoder(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state
    finally:
        fitted.replace(path, layers)
        for name, module in kept.items():
            setattr(decoder, name, module)
    if not torch.equal(same, x):
        raise refused(fitted.model, "its decoder changes hidden states outside its layers: it cannot be cut in stages")


def fit_vocabulary(fitted: Fitted) -> None:
    """Cut embedding and head by rows, padded to equal parts; a head is never gathered here. Raises Rejected."""
    model, mesh = fitted.model, fitted.mesh
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear | nn.Identity):
        raise refused(model, f"its head is a {type(head).__name__}, not a linear layer")
    tied = model.config.tie_word_embeddings and isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
    source = f"{path_of(model, embedding)}.weight" if isinstance(embedding, nn.Embedding) else ""
    local = _fit_embedding(fitted, embedding) if isinstance(embedding, nn.Embedding) else ""
    if not isinstance(head, nn.Linear):
        return
    path = path_of(model, head)
    rows = _shard(head.out_features, mesh.tensor.size, mesh.tensor.index)
    _fit_head(fitted, path, head, rows)
    if tied:
        assert source
        fitted.tied[f"{path}.weight"] = local


def _fit_embedding(fitted: Fitted, embedding: nn.Embedding) -> str:
    """Returns the local name of its weight."""
    group = fitted.mesh.tensor
    path = path_of(fitted.model, embedding)
    if group.size == 1:
        return f"{path}.weight"
    start, stop = _shard(embedding.num_embeddings, group.size, group.index)
    shape = tuple(embedding.weight.shape)
    size = _padded(shape[0], group.size)
    fitted.layout[f"{path}.table.weight"] = (part(f"{path}.weight", shape, 0, (start, stop)),)
    embedding.weight = nn.Parameter(
        torch.empty(size, shape[1], dtype=embedding.weight.dtype, device="meta"), requires_grad=False
    )
    embedding.num_embeddings = size
    fitted.replace(path, VocabParallelEmbedding(embedding, group.index * size, group))
    return f"{path}.table.weight"


def _fit_head(fitted: Fitted, path: str, head: nn.Linear, rows: Range) -> None:
    size = _padded(head.out_features, fitted.mesh.tensor.size)
    weight = torch.empty(size, head.in_features, dtype=head.weight.dtype, device="meta")
    fitted.layout[f"{path}.weight"] = (part(f"{path}.weight", head.weight.shape, 0, rows),)
    bias = None
    if head.bias is not None:
        bias = torch.empty(size, dtype=head.bias.dtype, device="meta")
        fitted.layout[f"{path}.bias"] = (part(f"{path}.bias", head.bias.shape, 0, rows),)
    fitted.replace(path, Linear(weight, bias))


def _shard(count: int, ranks: int, rank: int) -> Range:
    return cut_padded(count, ranks, rank)


def _padded(count: int, ranks: int) -> int:
    return -(-count // ranks)
