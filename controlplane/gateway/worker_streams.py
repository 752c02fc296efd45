"""All streams of this gateway to worker daemons, one a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from controlplane.gateway.messages import WorkerKey
from controlplane.gateway.worker_stream import WorkerStream
from controlplane.runtime.actor import supervise
from controlplane.runtime.clock import Clock
from controlplane.runtime.ids import NodeId
from controlplane.runtime.messages.serve import ServeUp

MakeStream = Callable[[WorkerKey, NodeId], WorkerStream]


class WorkerStreams:
    """Starts a stream when it is wanted and ends it when nobody needs it. Its tasks live in the owner's group."""

    def __init__(self, make: MakeStream, tasks: asyncio.TaskGroup, clock: Clock) -> None:
        self._make = make
        self._tasks = tasks
        self._clock = clock
        self._running: dict[WorkerKey, tuple[WorkerStream, asyncio.Task[None]]] = {}

    def connect(self, worker: WorkerKey, node: NodeId) -> None:
        assert worker not in self._running
        stream = self._make(worker, node)
        task = self._tasks.create_task(supervise(f"serve {worker}", stream.run, self._clock), name=f"serve {worker}")
        self._running[worker] = (stream, task)

    def drop(self, worker: WorkerKey) -> None:
        _, task = self._running.pop(worker)
        task.cancel()

    def drop_all(self) -> None:
        """End every stream, for good."""
        for worker in list(self._running):
            self.drop(worker)

    def send(self, worker: WorkerKey, body: ServeUp) -> None:
        self._running[worker][0].send(body)

    def stream(self, worker: WorkerKey) -> WorkerStream | None:
        found = self._running.get(worker)
        return found[0] if found is not None else None

    @property
    def idle(self) -> bool:
        """No stream has anything left to send."""
        return all(stream.idle for stream, _ in self._running.values())

    def count_up(self) -> tuple[int, int]:
        """Streams that are up, and all."""
        return sum(stream.up for stream, _ in self._running.values()), len(self._running)
