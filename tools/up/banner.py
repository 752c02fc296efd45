"""What `perdure up` prints once the cluster serves: where it is and lines to paste."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from tools.up.state import RunningCluster, local_state_dir

PROMPT = "The capital of France is"


def banner(running: RunningCluster, state_dir: Path) -> str:
    """Endpoint, a curl line, a Python line, and where to look."""
    # Of a cluster elsewhere `perdure ctl` has to be told.
    address = "" if state_dir == local_state_dir() else f" --address {','.join(running.addresses)}"
    url = running.urls[0]
    others = f" (also {', '.join(running.urls[1:])})" if running.urls[1:] else ""
    body = json.dumps({"model": running.model, "prompt": PROMPT, "max_tokens": 24, "temperature": 0})
    python = (
        f"from openai import OpenAI; client = OpenAI(base_url='{url}/v1', api_key='none'); "
        f"print(client.completions.create(model='{running.model}', prompt='{PROMPT}', max_tokens=24, "
        "temperature=0).choices[0].text)"
    )
    return "\n".join(
        [
            "",
            f"Serving {running.model} at {url}/v1{others}. Ctrl-C stops everything.",
            "",
            f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
            "",
            f'  {_typed(Path(sys.executable))} -c "{python}"',
            "",
            f"  {_typed(Path(sys.argv[0]))} ctl status{address}",
            f"  {_typed(Path(sys.executable).with_name('grpcurl'))} -plaintext {running.addresses[0]} list",
            "",
        ]
    )


def _typed(program: Path) -> str:
    """How this user types a program's name here: bare if PATH finds it, else the shorter of its paths."""
    if not program.exists() or shutil.which(program.name) == str(program):
        return program.name
    relative = os.path.relpath(program)
    return min(str(program), relative, key=len)
