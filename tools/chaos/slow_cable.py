"""A cable that takes its time: copies frames between two links of this network namespace, each a while later.

`python -m tools.chaos.slow_cable NEAR FAR MILLISECONDS`; prints a line once it copies. For kernels without netem, and
with those too: one way to delay that is the same everywhere.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

_ETH_P_ALL = 3
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_PACKET_IGNORE_OUTGOING = 23

FRAME_BYTES_MAX = 128 * 1024
"""Of a segment that the kernel has not cut yet, with its header."""


def main(near: str, far: str, delay_s: float) -> None:
    """Eternal."""
    ends = (_open(near), _open(far))
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    # (when it is due, where it goes, the frame), oldest first.
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    print("copying", flush=True)
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, (), (), wait_s)[0]:
            under_way.append((time.monotonic() + delay_s, other[end], end.recv(FRAME_BYTES_MAX)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, end, frame = under_way.popleft()
            _send(end, frame)


def _open(link: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    end.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    # Frames between namespaces are whole segments whose checksums nobody has computed: the header says so.
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    end.bind((link, 0))
    return end


def _send(end: socket.socket, frame: bytes) -> None:
    try:
        end.send(frame)
    except OSError:
        # A cable loses what it cannot carry.
        return


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) / 1000)
