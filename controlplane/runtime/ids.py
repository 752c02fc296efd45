"""Identities. Names are chosen by people; the rest is drawn once and never reused."""

from __future__ import annotations

import secrets
from typing import NewType

ClusterId = NewType("ClusterId", str)
NodeId = NewType("NodeId", str)
GatewayId = NewType("GatewayId", str)
ReplicaId = NewType("ReplicaId", str)
DeploymentId = NewType("DeploymentId", str)
RequestId = NewType("RequestId", str)
Incarnation = NewType("Incarnation", str)

Term = NewType("Term", int)
Epoch = NewType("Epoch", int)
Attempt = NewType("Attempt", int)
NO_ATTEMPT = Attempt(0)
SessionId = NewType("SessionId", int)
Slot = NewType("Slot", int)


def draw_id() -> str:
    """128 random bits as 32 lower-case hex digits: an incarnation, a request, a cluster."""
    return secrets.token_hex(16)


def is_drawn_id(text: str) -> bool:
    """True if `text` has the form that `draw_id` gives."""
    return len(text) == 32 and all(character in "0123456789abcdef" for character in text)
