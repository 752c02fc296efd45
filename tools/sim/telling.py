"""What is told of the cores' effects: the lives of nodes, replicas and requests, as lines of the story."""

from __future__ import annotations

from typing import Any

from controlplane.core import messages as leader_core
from controlplane.gateway.messages import AskRoute, Deliver, Failed, Moved, SendWorker
from controlplane.runtime.messages.serve import OpenRequest
from dataplane.core import messages as worker_core
from tools.sim.kernel import Kernel

TOKEN_BYTES = 4


def tell_recorded(kernel: Kernel, who: str, recorded: leader_core.Recorded | worker_core.Recorded) -> None:
    """What a leader or a daemon puts on record."""
    about: dict[str, object] = {
        "node": getattr(recorded, "node", ""),
        "replica": recorded.replica,
        "epoch": recorded.epoch or "",
        "request": recorded.request,
        "reason": recorded.reason.text if recorded.reason is not None else "",
        **recorded.details,
    }
    kernel.tell(who, recorded.name, **about)


def tell_request(kernel: Kernel, gateway: str, effect: Any) -> None:
    """What its gateway's core decides of a request; single tokens are no news."""
    match effect:
        case AskRoute(entry):
            kernel.tell(gateway, "request_asked", request=entry.request, attempt=entry.attempt, cause=entry.cause.name)
        case SendWorker(worker, OpenRequest() as body):
            _tell_opened(kernel, gateway, worker, body)
        case Moved(request, attempt, planned, reason):
            kernel.tell(gateway, "request_moved", request=request, attempt=attempt, planned=planned, reason=reason.text)
        case Deliver(request, choice, first, tokens, _, finish) if finish is not None:
            count, why = first + len(tokens), finish.reason.name
            kernel.tell(gateway, "choice_finished", request=request, choice=choice, tokens=count, reason=why)
        case Failed(request, failure, reason):
            kernel.tell(gateway, "request_failed", request=request, failure=failure.value, reason=reason.text)
        case _:
            pass


def _tell_opened(kernel: Kernel, gateway: str, worker: str, body: OpenRequest) -> None:
    permit = body.permit
    kernel.tell(
        gateway,
        "request_opened",
        request=permit.request,
        attempt=permit.attempt,
        replica=permit.replica,
        epoch=permit.epoch,
        worker=worker,
        term=permit.term,
        delivered=sum(len(choice.delivered) for choice in body.choices) // TOKEN_BYTES,
    )
