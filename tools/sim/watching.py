"""What stands between each shell and its core: whoever watches sees every event and its effects, and may object."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from controlplane.runtime.messages.common import Reason
    from tools.sim.gateway import SimGateway
    from tools.sim.leader import SimCoordinator
    from tools.sim.worker import SimWorker

Act = Callable[[], list[Any]]
"""The core's step; to be called exactly once."""


class Watcher(Protocol):
    """Safety is checked here, after every step."""

    def leader_step(self, leader: SimCoordinator, event: Any, act: Act) -> list[Any]: ...

    def gateway_step(self, gateway: SimGateway, event: Any, act: Act) -> list[Any]: ...

    def worker_step(self, worker: SimWorker, event: Any, act: Act) -> list[Any]: ...

    def term_begun(self, leader: SimCoordinator) -> None: ...

    def term_ended(self, leader: SimCoordinator, reason: Reason) -> None: ...
