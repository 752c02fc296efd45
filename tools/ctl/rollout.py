"""`perdure ctl rollout restart`: worker daemons drained, ended and started again, one after the other, under load."""

from __future__ import annotations

import time
from collections.abc import Callable

from protos.perdure.v1 import admin_pb2, common_pb2
from tools.ctl.client import CALL_TIMEOUT_S, CtlError, admin

POLL_S = 0.5


def restart(
    addresses: list[str], nodes: list[str], deadline_s: float, timeout_s: float, say: Callable[[str], None]
) -> None:
    """Restart the daemons of `nodes`, all if none is named. Raises CtlError at the first that does not come back."""
    before = _status(addresses)
    known = {node.id: node.incarnation for node in before.nodes if node.phase == admin_pb2.NODE_PHASE_LIVE}
    for node in nodes:
        if node not in known:
            raise CtlError(f"no live node {node}: {', '.join(sorted(known)) or 'there are none'}")
    ready = _ready(before)
    for node in nodes or sorted(known):
        say(f"{node}: draining")
        with admin(addresses) as stub:
            request = admin_pb2.DrainRequest(node=node, deadline_ms=round(deadline_s * 1000), exit=True)
            stub.Drain(request, timeout=CALL_TIMEOUT_S)
        _await_return(addresses, node, known[node], ready, timeout_s)
        say(f"{node}: restarted, {ready} replicas ready")


def _await_return(addresses: list[str], node: str, incarnation: str, ready: int, timeout_s: float) -> None:
    """Wait until another process of that name is live and as many replicas serve as before."""
    deadline = time.monotonic() + timeout_s
    seen = "no answer"
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        try:
            status = _status(addresses)
        except CtlError as error:
            # A leader may change meanwhile.
            seen = str(error)
            continue
        row = next((row for row in status.nodes if row.id == node), None)
        back = row is not None and row.incarnation != incarnation and row.phase == admin_pb2.NODE_PHASE_LIVE
        if back and _ready(status) >= ready:
            return
        phase = "gone" if row is None else admin_pb2.NodePhase.Name(row.phase).removeprefix("NODE_PHASE_").lower()
        seen = f"{_ready(status)} of {ready} replicas are ready" if back else f"the node is {phase}"
    hint = "is its daemon started again when it exits?"
    raise CtlError(f"{node} did not come back within {timeout_s:g} s ({seen}); {hint} The other nodes are left alone.")


def _status(addresses: list[str]) -> admin_pb2.StatusResponse:
    with admin(addresses) as stub:
        return stub.Status(admin_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)


def _ready(status: admin_pb2.StatusResponse) -> int:
    return sum(replica.phase == common_pb2.REPLICA_PHASE_READY for replica in status.replicas)
