"""Finds or makes the model's folder, in a process of its own: that takes torch, which `perdure up` then never holds.

`python -m tools.up.prepare NAME` prints JSON lines: {"stage", "fraction"} while it works, then {"path"} or {"error"}.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from controlplane.runtime import die_with_parent
from tools.up.display import Display


class ModelMissing(RuntimeError):
    """There is no such model, or it cannot be made ready; the text says why."""


async def prepare_model(name: str, display: Display) -> Path:
    """The Hugging Face folder behind a path or name. Raises ModelMissing."""
    found = _folder_as_it_is(name)
    if found is not None:
        return found
    display.bar("model", 0, name)
    process = await asyncio.create_subprocess_exec(
        *die_with_parent.command([sys.executable, "-m", "tools.up.prepare", name], signal.SIGKILL),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        process_group=0,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    noise = asyncio.create_task(process.stderr.read())
    try:
        last = await _follow(process.stdout, display)
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if "path" in last:
        display.bar("model", 1, "prepared")
        return Path(last["path"])
    raise ModelMissing(last.get("error") or _last_line(await noise))


def _folder_as_it_is(name: str) -> Path | None:
    """The folder if it needs no preparation. Raises ModelMissing for a path to nothing."""
    path = Path(name).expanduser()
    if path.is_absolute() and not path.exists():
        raise ModelMissing(f"model {path} does not exist")
    return path.resolve() if (path / "config.json").is_file() else None


async def _follow(lines: asyncio.StreamReader, display: Display) -> dict[str, Any]:
    """Show progress as it comes; the last message is the outcome."""
    message: dict[str, Any] = {}
    async for line in lines:
        message = json.loads(line)
        if "stage" in message:
            display.bar("model", message["fraction"], message["stage"])
    return message


def _last_line(noise: bytes) -> str:
    lines = noise.decode(errors="replace").strip().splitlines()
    return f"preparing the model failed: {lines[-1] if lines else 'its process was killed'}"


def main(name: str) -> None:
    from controlplane.runtime.errors import Rejected
    from dataplane.models.demo import resolve_model

    # Libraries may print; only our lines go to the pipe.
    out, sys.stdout = sys.stdout, sys.stderr

    def say(**message: object) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        path = resolve_model(name, lambda stage, fraction: say(stage=stage, fraction=fraction))
    except (Rejected, OSError) as error:
        say(error=str(error))
        raise SystemExit(1) from error
    say(path=str(path.resolve()))


if __name__ == "__main__":
    main(sys.argv[1])
