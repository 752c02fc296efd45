"""What `perdure up` prints once the cluster serves: where it is and lines to paste."""

from __future__ import annotations

from tools.up.state import RunningCluster


def banner(running: RunningCluster) -> str:
    """Endpoint, a curl line, a Python line, and where to look."""
    url = running.urls[0]
    others = f" (also {', '.join(running.urls[1:])})" if running.urls[1:] else ""
    body = f'{{"model": "{running.model}", "prompt": "The capital of France is", "max_tokens": 24}}'
    python = (
        f"from openai import OpenAI; client = OpenAI(base_url='{url}/v1', api_key='none'); "
        f"print(client.completions.create(model='{running.model}', prompt='The capital of France is', "
        "max_tokens=24).choices[0].text)"
    )
    return "\n".join(
        [
            "",
            f"Serving {running.model} at {url}/v1{others}. Ctrl-C stops everything.",
            "",
            f"  curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'",
            "",
            f'  python -c "{python}"',
            "",
            f"  perdure ctl --help      (gRPC and grpcurl: {', '.join(running.addresses)})",
            "",
        ]
    )
