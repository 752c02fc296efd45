"""The TCP connections of a process group, so that a rank stuck in one of its exchanges can be freed.

gloo's own abort does not wake a receive that waits for a peer (torch 2.13: it waits for its timeout). Shutting the
connections down from another thread does, within milliseconds, and the process can form its next group at once.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable

_DESCRIPTORS = "/proc/self/fd"


def open_sockets() -> dict[str, int]:
    """This process's sockets: kernel identity → descriptor. Empty where the system does not list them."""
    found: dict[str, int] = {}
    try:
        names = os.listdir(_DESCRIPTORS)
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"{_DESCRIPTORS}/{name}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found[target] = int(name)
    return found


class Connections:
    """Own descriptors of the TCP connections that appeared since `before`, but for those of `port` (the store's)."""

    def __init__(self, before: Iterable[str], port: int) -> None:
        known = set(before)
        self._sockets: list[socket.socket] = []
        for identity, descriptor in open_sockets().items():
            if identity in known:
                continue
            try:
                # A descriptor of our own: the group may close its one, and its number be another file's by then.
                copied = socket.socket(fileno=os.dup(descriptor))
            except OSError:
                continue
            if _is_peer(copied, port):
                self._sockets.append(copied)
            else:
                copied.close()

    def shutdown(self) -> None:
        """End the connections: whoever waits on one of them, here or at its other end, gets an error now."""
        for item in self._sockets:
            try:
                item.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def close(self) -> None:
        """Give the descriptors back."""
        for item in self._sockets:
            item.close()
        self._sockets = []


def _is_peer(item: socket.socket, port: int) -> bool:
    if item.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        # A listening socket has no peer, and shutting it down would end the process.
        ports = (item.getsockname()[1], item.getpeername()[1])
    except OSError:
        return False
    return port not in ports
