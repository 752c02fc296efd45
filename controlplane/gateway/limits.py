"""What one gateway accepts and holds at most."""

from __future__ import annotations

from dataclasses import dataclass, field

from controlplane.gateway.state import JournalLimits


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """Bounds of requests, each with its refusal: 413, 400 or 429."""

    journals: JournalLimits = field(default_factory=JournalLimits)
    body_bytes_max: int = 32 * 1024 * 1024
    choices_max: int = 128
    prompts_max: int = 256
    # Alternatives reported beside a token.
    logprobs_max: int = 20
    stops_max: int = 16
    stop_chars_max: int = 1024
    open_requests_max: int = 8192
    # A request that is not done by then ends with an error; the usual patience of OpenAI clients.
    request_deadline_s: float = 600.0
    # How long a stream's status waits for its first token: until then a refusal has a status of its own.
    answer_s: float = 15.0
    # A comment line in a stream that has nothing to say, so that no proxy cuts it and clients notice a stopped gateway.
    keepalive_s: float = 1.0
    # How long `stop` lets open streams go on.
    stop_grace_s: float = 30.0
