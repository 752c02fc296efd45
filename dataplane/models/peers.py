"""Copies weights from other ranks that hold them (shelf.py), each in a thread of its own, while files are read."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import defaultdict

import structlog
import torch

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
from dataplane.models.pieces import Box, overlap
from dataplane.models.work_list import Slice, WorkList

CONNECT_S = 1.0

_log = structlog.get_logger()


class PeerReader:
    """One source. It takes slices from the back of the list until it is stopped, or fails and is heard of no more."""

    def __init__(
        self, address: str, content: str, aliases: dict[str, str], work: WorkList, device: torch.device
    ) -> None:
        """`address`: host:port. `content`: what the weights are made of. `aliases`: other names of tied tensors."""
        self._address = address
        self._content = content
        self._aliases = aliases
        self._work = work
        self._place = work.place()
        self._device = device
        self._socket: socket.socket | None = None
        self._offers: dict[str, list[Offer]] = defaultdict(list)
        # What was copied from here.
        self.bytes = 0
        self._thread = threading.Thread(target=self._run, name="peer", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Have done with it: what it has under way is given back. Returns once it touches nothing any more."""
        self._work.stop(self._place)
        connection = self._socket
        if connection is None:
            # Not connected yet: it will see that it is too late before it takes anything.
            return
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        host, _, port = self._address.rpartition(":")
        try:
            with socket.create_connection((host, int(port)), CONNECT_S) as connection:
                self._socket = connection
                self._read(Wire(connection))
        except (OSError, ValueError, Broken) as error:
            if not self._place.stopped.is_set():
                _log.info("weights_source_left", address=self._address, text=str(error))

    def _read(self, wire: Wire) -> None:
        wire.send(Open(self._content))
        answer = wire.receive(Offers, Refused)
        if isinstance(answer, Refused):
            raise Broken(answer.text)
        for offer in answer.offers:
            self._offers[offer.source].append(offer)
        staging = Staging(self._device)
        while (number := self._work.take_last(self._place, self._overlap)) is not None:
            done = False
            try:
                done = self._copy(wire, self._work[number], staging)
            finally:
                if not done:
                    self._work.give_back(number)
            self.bytes += self._work.finish(number)

    def _copy(self, wire: Wire, item: Slice, staging: Staging) -> bool:
        """Fill the slice. Raises Broken."""
        source = item.piece.source if item.piece.source in self._offers else self._aliases[item.piece.source]
        wire.send(Ask(Offer(source, item.piece.at, type_name(item.local))))
        answer = wire.receive(Given, NotHeld)
        if isinstance(answer, NotHeld):
            raise Broken("it holds this no longer")
        if answer.bytes != item.bytes:
            raise Broken(f"{answer.bytes} bytes for {item.bytes} of {source}")
        wire.fill(staging.memory(item.piece.at, item.local.dtype))
        with torch.no_grad():
            staging.copy_in(item.target, item.piece.at)
        return True

    def _overlap(self, item: Slice) -> Box | None:
        """What the peer has of a slice, in the type that is wanted."""
        piece = item.piece
        offers = self._offers.get(piece.source) or self._offers.get(self._aliases.get(piece.source, ""), ())
        boxes = (overlap(piece.at, offer.at) for offer in offers if offer.dtype == type_name(item.local))
        return next((box for box in boxes if box is not None), None)
