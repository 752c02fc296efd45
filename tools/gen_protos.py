"""Compile protos/ into the *_pb2 files beside them, or check that they are current.

Compiled from the repository root, so that a proto's path is its Python path.
"""

from __future__ import annotations

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def compile_protos(out: Path) -> list[Path]:
    """Write the generated files of every proto under `out` and return their paths relative to it."""
    import grpc_tools
    from grpc_tools import protoc

    protos = sorted(path.relative_to(ROOT) for path in (ROOT / "protos").rglob("*.proto"))
    include = Path(grpc_tools.__file__).parent / "_proto"
    arguments = [
        "protoc",
        f"-I{ROOT}",
        f"-I{include}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main([*arguments, *map(str, protos)]) != 0:
        raise SystemExit("protoc failed")
    return sorted(path.relative_to(out) for path in out.rglob("*_pb2*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a generated file is stale")
    if not parser.parse_args().check:
        compile_protos(ROOT)
        return
    with tempfile.TemporaryDirectory() as folder:
        fresh = compile_protos(Path(folder))
        stale = [
            path
            for path in fresh
            if not (ROOT / path).exists() or not filecmp.cmp(ROOT / path, Path(folder) / path, shallow=False)
        ]
    if stale:
        print("stale generated files (run `python -m tools.gen_protos`):", *stale, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
