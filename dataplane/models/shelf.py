"""What a rank holds of a model's whole tensors, served to other ranks while steps go on.

Weights do not change while they are here. Nobody waits for whoever copies them: a slice is copied into memory of its
conversation under a lock that is held for a few milliseconds, and leaves from there.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections import defaultdict

import structlog
import torch
from torch import Tensor

from dataplane.models.exchange import (
    Ask,
    Broken,
    Given,
    NotHeld,
    Offer,
    Offers,
    Open,
    Refused,
    Staging,
    Wire,
    type_name,
)
from dataplane.models.fitted import Fitted
from dataplane.models.pieces import Piece, overlap
from dataplane.models.weights import tensors_of
from dataplane.models.work_list import PORTION_BYTES

CONVERSATIONS_MAX = 16
IDLE_S = 30.0
"""How long a conversation may have nothing to say: the other side waits for its disk, say."""

_log = structlog.get_logger()


class Shelf:
    """The boxes of whole tensors that a fitted model's tensors hold.

    It does not keep them alive: a tensor that has been replaced by another form of itself is not held here.
    """

    def __init__(self, content: str, fitted: Fitted) -> None:
        """Make it before tied names share tensors. `content`: what the weights are made of."""
        self.content = content
        self._held: dict[str, list[tuple[Piece, weakref.ref[Tensor]]]] = defaultdict(list)
        for tensor, pieces in tensors_of(fitted):
            for piece in pieces:
                self._held[piece.source].append((piece, weakref.ref(tensor)))

    def offers(self) -> tuple[Offer, ...]:
        """All that is here."""
        return tuple(
            Offer(source, piece.at, type_name(tensor))
            for source, held in self._held.items()
            for piece, reference in held
            if (tensor := reference()) is not None
        )

    def find(self, wanted: Offer) -> Tensor | None:
        """The cells that hold a box."""
        for piece, reference in self._held.get(wanted.source, ()):
            tensor = reference()
            if tensor is None or type_name(tensor) != wanted.dtype or len(piece.at) != len(wanted.at):
                continue
            if overlap(piece.at, wanted.at) == wanted.at:
                for dim, (start, stop) in enumerate(piece.within(wanted.at).to):
                    tensor = tensor.narrow(dim, start, stop - start)
                return tensor
        return None


class ShelfServer:
    """Serves the shelf that is shown, on a port of its own, from threads of its own."""

    def __init__(self, host: str, device: torch.device) -> None:
        """Raises OSError where nothing can listen on `host`."""
        self._device = device
        self._shelf: Shelf | None = None
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(CONVERSATIONS_MAX)
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="weights", daemon=True).start()

    def show(self, shelf: Shelf | None) -> None:
        """Serve this from now on, and nothing else; None: nothing. When it returns no copy is under way any more."""
        with self._lock:
            self._shelf = shelf

    def close(self) -> None:
        self.show(None)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self._slots.acquire(blocking=False):
                threading.Thread(target=self._converse, args=(connection,), name="weights", daemon=True).start()
            else:
                connection.close()

    def _converse(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._serve(Wire(connection))
        except Broken as error:
            _log.debug("weights_conversation_over", text=str(error))
        finally:
            self._slots.release()

    def _serve(self, wire: Wire) -> None:
        opened = wire.receive(Open)
        shelf = self._shelf
        if shelf is None or shelf.content != opened.content:
            wire.send(Refused("other weights are held here" if shelf else "no weights are held here"))
            return
        wire.send(Offers(shelf.offers()))
        staging = Staging(self._device)
        while True:
            values = self._copy(shelf, wire.receive(Ask, wait_s=IDLE_S).offer, staging)
            if values is None:
                wire.send(NotHeld())
            else:
                wire.send(Given(len(values)), values)

    def _copy(self, shelf: Shelf, wanted: Offer, staging: Staging) -> memoryview | None:
        with self._lock, torch.no_grad():
            tensor = shelf.find(wanted) if self._shelf is shelf else None
            if tensor is None or tensor.nbytes > PORTION_BYTES:
                return None
            return staging.copy_out(tensor, wanted.at)
