"""Frees a rank that is stuck in an exchange with its peers when the daemon ends the epoch."""

from __future__ import annotations

import threading

from controlplane.runtime.ids import Epoch
from dataplane.parallel.mesh import Mesh
from dataplane.progress import ProgressPage

LOOK_S = 0.005
"""How often the abort word is read."""


class AbortWatch:
    """A thread that aborts `mesh` once the progress page says that `epoch` is over; until `stop`."""

    def __init__(self, mesh: Mesh, page: ProgressPage, epoch: Epoch) -> None:
        self._mesh = mesh
        self._page = page
        self._epoch = epoch
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="abort-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_S):
            if self._page.abort_epoch >= self._epoch:
                self._mesh.abort()
                return
