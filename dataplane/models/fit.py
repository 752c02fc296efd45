"""From a model folder to a module that runs this rank's part of the model.

Shape letters: T tokens of the step, N rows whose logits are wanted, H hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from controlplane.runtime.errors import invalid
from controlplane.runtime.messages.common import ReplicaSpec
from dataplane.models.checkpoint import open_checkpoint
from dataplane.models.demo import resolve_model
from dataplane.models.dry_run import DRY_ATTENTION, AttentionLayer, dry_run
from dataplane.models.fitted import Fitted
from dataplane.models.loading import Loading
from dataplane.models.rotary import Rotary
from dataplane.models.shelf import Shelf
from dataplane.models.structure import attention_modules, decoder_of, refused, set_implementation
from dataplane.models.surgery import fit
from dataplane.models.tensor_file import TensorReader
from dataplane.models.weights import (
    Report,
    Source,
    check_complete,
    dummy_source,
    file_source,
    materialise,
    tie,
)
from dataplane.parallel import expert, tensor
from dataplane.parallel.expert import EXPERTS_IMPLEMENTATION
from dataplane.parallel.mesh import Mesh
from dataplane.parallel.split import cut_padded

ATTENTION = "perdure"
"""Name under which the engine registers its attention function."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class FittedModel:
    """This rank's part of a model, ready to run."""

    module: PreTrainedModel
    # The text config of the model.
    config: Any
    dtype: torch.dtype
    attention: tuple[AttentionLayer, ...]
    vocab_size: int
    # This rank's rows of the head: [vocab_start, vocab_start + vocab_count) of the vocabulary. What lies behind them in
    # a logits row is padding.
    vocab_start: int
    vocab_count: int
    # Longest prompt and answer together, in tokens.
    max_model_tokens: int
    eos_ids: frozenset[int]
    # Changes when the files, the dtype or this rank's part change.
    weights: str
    # Tensors in the files that the model has no place for.
    extra_tensors: tuple[str, ...]
    # Whether `forward` needs `rope_lengths_T`.
    needs_rope_lengths: bool
    # What others may copy.
    shelf: Shelf
    mesh: Mesh
    _rotaries: tuple[Rotary, ...]

    def forward(
        self,
        tokens_T: Tensor | None,
        hidden_TH: Tensor | None,
        positions_T: Tensor,
        rows_N: Tensor | slice | None,
        rope_lengths_T: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, V_local) on the last stage, hidden states (T, H) before it.

        The first stage takes `tokens_T`, later ones `hidden_TH`. `rope_lengths_T`: the tokens each token's request may
        reach in all, the same in every step of the request.
        """
        for rotary in self._rotaries:
            rotary.lengths_T = rope_lengths_T
        inputs = _inputs(tokens_T, hidden_TH, positions_T)
        if self.mesh.is_last_stage:
            return self.module(**inputs, logits_to_keep=rows_N).logits[0]
        return decoder_of(self.module)(**inputs).last_hidden_state[0]

    def attach(self, mesh: Mesh) -> FittedModel:
        """The same weights in a new epoch: every exchange goes over the groups of `mesh` from now on.

        For the same place in a mesh of the same degrees; `fingerprint` tells.
        """
        assert _place(mesh) == _place(self.mesh), "the weights belong to another place"
        tensor.regroup(self.module, mesh.tensor)
        expert.regroup(self.module, mesh.tensor)
        return replace(self, mesh=mesh)


def _inputs(tokens_T: Tensor | None, hidden_TH: Tensor | None, positions_T: Tensor) -> dict[str, Any]:
    first = {"input_ids": tokens_T[None]} if tokens_T is not None else {"inputs_embeds": _one(hidden_TH)}
    # Without use_cache=False a DynamicCache would be made on every call.
    return {**first, "position_ids": positions_T[None], "use_cache": False}


def _one(hidden_TH: Tensor | None) -> Tensor:
    assert hidden_TH is not None, "a stage needs tokens or hidden states"
    return hidden_TH[None]


class ModelLoad:
    """A model that is built, cut and placed, and whose values are to come."""

    def __init__(self, model: FittedModel, fitted: Fitted, loading: Loading) -> None:
        self._model = model
        self._fitted = fitted
        self._loading = loading

    @property
    def weights(self) -> str:
        """What it will be: its fingerprint."""
        return self._model.weights

    @property
    def bytes_from(self) -> dict[str, int]:
        """Bytes by where they came from: "files", or a peer's address."""
        return self._loading.bytes_from

    def run(self, report: Report, sources: Sequence[str] = ()) -> FittedModel:
        """Fill it; see Loading.run."""
        self._loading.run(report, sources)
        tie(self._fitted)
        return self._model


def load_model(
    spec: ReplicaSpec,
    mesh: Mesh,
    device: torch.device,
    report: Report,
    attention: str = ATTENTION,
    sources: Sequence[str] = (),
) -> FittedModel:
    """Build, cut, place and fill the model of `spec` for this rank of `mesh`; see begin_load and Loading.run."""
    load = begin_load(spec, mesh, device, _within(report, 0.0, 0.2), attention)
    return load.run(_within(report, 0.2, 1.0), sources)


def begin_load(
    spec: ReplicaSpec, mesh: Mesh, device: torch.device, report: Report, attention: str = ATTENTION
) -> ModelLoad:
    """Build, cut and place the model of `spec` for this rank of `mesh`, whose groups are not made use of.

    `attention` names a function in transformers' ALL_ATTENTION_FUNCTIONS, `report` gets (stage, fraction). Raises
    Rejected for models that cannot be served, with the reason.
    """
    report("config", 0.0)
    folder = resolve_model(spec.model_path, _within(report, 0.0, 0.5))
    config = read_config(folder, spec.trust_remote_code)
    dtype = choose_dtype(spec.dtype, config)
    report("build", 0.5)
    whole = build_on_meta(config, dtype, spec.trust_remote_code)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    checkpoint = None if spec.load_format == "dummy" else open_checkpoint(folder, whole, shapes)
    fitted = fit(whole, mesh)
    layers = _dry_run(fitted, mesh, lambda: report("fit", 0.75))
    aliases = _aliases(whole)
    if checkpoint is not None:
        check_complete(fitted, checkpoint, aliases)
    materialise(fitted, dtype, device)
    set_implementation(whole, attention, EXPERTS_IMPLEMENTATION)

    def source(reader: TensorReader) -> Source:
        if checkpoint is None:
            return dummy_source(shapes, float(getattr(config, "initializer_range", 0.02)))
        return file_source(checkpoint, reader, aliases)

    loading = Loading(fitted, source, content(spec), aliases, device, cut=checkpoint is not None)
    limit = int(config.max_position_embeddings)
    vocabulary = cut_padded(int(config.vocab_size), mesh.tensor.size, mesh.tensor.index)
    model = FittedModel(
        module=whole.eval(),
        config=config,
        dtype=dtype,
        attention=layers,
        vocab_size=int(config.vocab_size),
        vocab_start=vocabulary[0],
        vocab_count=vocabulary[1] - vocabulary[0],
        max_model_tokens=min(spec.max_model_tokens or limit, limit),
        eos_ids=read_eos_ids(folder, config),
        weights=fingerprint(spec, mesh),
        extra_tensors=checkpoint.extra if checkpoint else (),
        needs_rope_lengths=any(rotary.by_length for rotary in fitted.rotaries),
        shelf=Shelf(content(spec), fitted),
        mesh=mesh,
        _rotaries=tuple(fitted.rotaries),
    )
    return ModelLoad(model, fitted, loading)


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The text config of the model in `folder`. Raises Rejected."""
    if not (folder / "config.json").is_file():
        raise invalid(f"{folder} has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise invalid(f"{folder}/config.json cannot be used: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise invalid(f"{folder} holds quantised weights, which are not supported")
    return config.get_text_config()


def choose_dtype(name: str, config: Any) -> torch.dtype:
    """The type of the weights: named, or the config's own for "auto". Raises Rejected."""
    if name == "auto":
        return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if name not in DTYPES:
        raise invalid(f"dtype {name!r} is none of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def build_on_meta(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The whole model without memory. Raises Rejected for classes outside the attention interface."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise invalid(f"{type(config).__name__} has no causal language model: {error}") from error
    if not model._can_set_attn_implementation():
        raise refused(model, "its attention does not go through transformers' attention interface")
    if next(attention_modules(model), None) is None:
        raise refused(model, "it has no attention module with layer_idx and scaling")
    return model


def _within(report: Report, start: float, stop: float) -> Report:
    """`report` for a part of the work."""
    return lambda stage, fraction: report(stage, start + (stop - start) * fraction)


def _dry_run(fitted: Fitted, mesh: Mesh, moved: Callable[[], None]) -> tuple[AttentionLayer, ...]:
    model = fitted.model
    set_implementation(model, DRY_ATTENTION, EXPERTS_IMPLEMENTATION)

    def forward() -> None:
        positions_T = torch.zeros(3, dtype=torch.long, device="meta")
        if mesh.is_first_stage:
            inputs = _inputs(positions_T, None, positions_T)
        else:
            hidden = torch.empty(3, model.config.hidden_size, dtype=model.dtype, device="meta")
            inputs = _inputs(None, hidden, positions_T)
        if mesh.is_last_stage:
            rows_N = torch.zeros(2, dtype=torch.long, device="meta")
            result = model(**inputs, logits_to_keep=rows_N).logits
            wanted = 2
        else:
            result = decoder_of(model)(**inputs).last_hidden_state
            wanted = 3
        if result.dim() != 3 or result.shape[:2] != (1, wanted):
            raise refused(model, f"its forward pass gives {list(result.shape)} for {wanted} rows")

    with torch.no_grad():
        return dry_run(model, forward, moved)


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    """The other name of each tied tensor: files hold one of the two."""
    if not model.config.tie_word_embeddings:
        return {}
    tied = dict(model.all_tied_weights_keys)
    return tied | {source: target for target, source in tied.items()}


def read_eos_ids(folder: Path, config: Any) -> frozenset[int]:
    """Tokens that end a text: of the generation config, else of the model's config."""
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    ids = config.eos_token_id if ids is None else ids
    if ids is None:
        return frozenset()
    return frozenset(ids if isinstance(ids, list) else [ids])


def fingerprint(spec: ReplicaSpec, mesh: Mesh) -> str:
    """Identifies what a rank holds after loading, without reading weights: equal means nothing to load."""
    return _digest([content(spec), str(_place(mesh))])


def content(spec: ReplicaSpec) -> str:
    """Identifies what weights are made of, whatever part of them a rank holds: equal means the same values."""
    facts = [str(Path(spec.model_path).resolve()), spec.dtype, spec.load_format]
    files = model_files(spec)
    return _digest(facts + [f"{item.name} {item.stat().st_size} {item.stat().st_mtime_ns}" for item in files])


def model_files(spec: ReplicaSpec) -> list[Path]:
    """The files that a model's path names; none for a name that is no path."""
    path = Path(spec.model_path).resolve()
    if path.is_file():
        return [path]
    return sorted(item for item in path.glob("*") if item.suffix in {".json", ".safetensors"})


def _digest(facts: list[str]) -> str:
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _place(mesh: Mesh) -> tuple[int, ...]:
    """What decides which part of a model a rank holds."""
    return mesh.degrees.tensor, mesh.degrees.pipeline, mesh.degrees.expert, mesh.tensor.index, mesh.stage


def assert_attention_reached(model: FittedModel, step: Callable[[], object], attention: str = ATTENTION) -> None:
    """Run one `step` of the engine and assert that each attention layer called the function named `attention` once.

    A layer that went another way would give wrong tokens without an error (a copied config does that).
    """
    reached: list[int] = []
    function = ALL_ATTENTION_FUNCTIONS[attention]

    def watch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        reached.append(int(module.perdure_layer))  # type: ignore[arg-type]
        return function(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(attention, watch)
    try:
        step()
    finally:
        ALL_ATTENTION_FUNCTIONS.register(attention, function)
    assert sorted(reached) == [layer.index for layer in model.attention], (
        f"attention layers reached {sorted(reached)} of {len(model.attention)}"
    )
