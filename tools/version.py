"""`perdure version`."""

from __future__ import annotations

import importlib.metadata
import platform

PARTS = ("perdure", "grpcio", "protobuf", "etcd3aio", "torch", "transformers")


def version_command() -> None:
    """Print the versions of Perdure and what it stands on."""
    for part in PARTS:
        print(f"{part:<12} {_version(part)}")
    print(f"{'python':<12} {platform.python_version()}")


def _version(part: str) -> str:
    try:
        return importlib.metadata.version(part)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
