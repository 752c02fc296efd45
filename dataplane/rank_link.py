"""The daemon's end of a rank's Unix stream: frames in and out, nothing decided."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Protocol, cast

import msgspec

from dataplane.frames import FRAME_BYTES_MAX, LENGTH_BYTES, DaemonFrame, RankFrame, decode_rank_frame, encode

_CREDENTIALS = struct.Struct("iii")


class LinkOwner(Protocol):
    """Who hears of a link; all calls come from the event loop."""

    def link_said(self, link: RankLink, frame: RankFrame) -> None: ...

    def link_lost(self, link: RankLink) -> None: ...

    def link_broke_protocol(self, link: RankLink, text: str) -> None: ...


class RankLink(asyncio.Protocol):
    """One connection. `pid` is the kernel's word on who is at the other end."""

    def __init__(self, owner: LinkOwner) -> None:
        self._owner = owner
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self.pid = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        peer: socket.socket = transport.get_extra_info("socket")
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid = _CREDENTIALS.unpack(credentials)[0]

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        while (end := self._frame_end(start)) is not None:
            body = bytes(self._buffer[start + LENGTH_BYTES : end])
            start = end
            try:
                frame = decode_rank_frame(body)
            except msgspec.DecodeError as error:
                self._refuse(f"unreadable frame: {error}")
                return
            self._owner.link_said(self, frame)
        del self._buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._owner.link_lost(self)

    def send(self, frame: DaemonFrame) -> None:
        """Queue the frame. Unread frames are bounded by what the daemon admits. A lost link takes nothing."""
        if self._transport is not None:
            self._transport.write(encode(frame))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _frame_end(self, start: int) -> int | None:
        """Where the frame that begins at `start` ends, if all of it is here."""
        if len(self._buffer) < start + LENGTH_BYTES:
            return None
        length = int.from_bytes(self._buffer[start : start + LENGTH_BYTES], "little")
        if length > FRAME_BYTES_MAX:
            self._refuse(f"frame of {length} bytes")
            return None
        end = start + LENGTH_BYTES + length
        return end if len(self._buffer) >= end else None

    def _refuse(self, text: str) -> None:
        self._buffer.clear()
        self._owner.link_broke_protocol(self, text)
        self.close()
