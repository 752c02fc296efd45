"""A rank's end of its Unix stream to the daemon: blocking frames."""

from __future__ import annotations

import selectors
import socket

from dataplane.frames import FRAME_BYTES_MAX, LENGTH_BYTES, DaemonFrame, Frame, decode_daemon_frame, encode

_READ_BYTES = 1 << 18


class DaemonGone(Exception):
    """The daemon closed its end, or broke the framing: there is nobody to work for."""


class DaemonLink:
    """Frames in and out. `send` blocks while the daemon does not read."""

    def __init__(self, socket_path: str) -> None:
        """Raises OSError if nobody listens at `socket_path`."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(socket_path)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._buffer = bytearray()

    def send(self, frame: Frame) -> None:
        """Raises DaemonGone."""
        try:
            self._socket.sendall(encode(frame))
        except OSError as error:
            raise DaemonGone(str(error)) from error

    def receive(self, wait_s: float | None) -> list[DaemonFrame]:
        """The frames that have come, after up to `wait_s` seconds for the first (None: no limit; 0: no wait).

        Raises DaemonGone.
        """
        frames: list[DaemonFrame] = []
        while self._selector.select(0 if frames else wait_s):
            self._read()
            frames += self._take()
            if not frames and wait_s == 0:
                break
        return frames

    def has_news(self) -> bool:
        """Whether `receive` would not wait."""
        return bool(self._selector.select(0))

    def close(self) -> None:
        self._selector.close()
        self._socket.close()

    def _read(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except OSError as error:
            raise DaemonGone(str(error)) from error
        if not data:
            raise DaemonGone("end of stream")
        self._buffer += data

    def _take(self) -> list[DaemonFrame]:
        frames: list[DaemonFrame] = []
        start = 0
        while len(self._buffer) >= start + LENGTH_BYTES:
            length = int.from_bytes(self._buffer[start : start + LENGTH_BYTES], "little")
            if length > FRAME_BYTES_MAX:
                raise DaemonGone(f"a frame of {length} bytes")
            end = start + LENGTH_BYTES + length
            if len(self._buffer) < end:
                break
            frames.append(decode_daemon_frame(bytes(self._buffer[start + LENGTH_BYTES : end])))
            start = end
        del self._buffer[:start]
        return frames
