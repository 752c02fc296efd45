"""Hosts as network namespaces of one machine, joined by a bridge; what passes between any two of them can be lost.

All of it lies in namespaces of this process: the machine's own interfaces, rules and mounts are not touched, and
nothing is left when the process ends, however it ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from controlplane.runtime import die_with_parent

NAMESPACES = Path("/run/netns")
CLIENTS = "clients"
"""The host on which the clients are: this process's own namespace."""

PROGRAMS = ("ip", "nft", "nsenter", "mount")

_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_SUBNET = "10.77.0"
_BRIDGE = "perdure"
_TABLE = "table inet chaos { chain input { type filter hook input priority 0; }; }; flush chain inet chaos input"


class NetworkError(Exception):
    """This machine or this user cannot have hosts; the text says why."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What one host sends to another is lost, all or some of it."""

    sender: str
    receiver: str
    percent: int = 100


def enter_namespaces() -> None:
    """Move this thread, and all that it starts, into a network and a tree of mounts of its own. Raises NetworkError."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise NetworkError(f"hosts need {', '.join(missing)} (packages iproute2, nftables, util-linux, mount)")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0:
        problem = os.strerror(ctypes.get_errno())
        raise NetworkError(f"hosts are network namespaces, for which one has to be root here ({problem})")


class Network:
    """The hosts and their cables, in namespaces of their own. `start`, `add` each, and in the end `stop`."""

    def __init__(self) -> None:
        self._addresses = {CLIENTS: f"{_SUBNET}.1"}
        # How many faults lose the same at the same time.
        self._losses: Counter[Loss] = Counter()

    async def start(self) -> None:
        """Raises NetworkError."""
        await run("mount", "--make-rprivate", "/")
        await run("mkdir", "-p", str(NAMESPACES))
        await run("mount", "-t", "tmpfs", "none", str(NAMESPACES))
        await run("ip", "link", "set", "lo", "up")
        await run("ip", "link", "add", _BRIDGE, "type", "bridge")
        await run("ip", "address", "add", f"{self._addresses[CLIENTS]}/24", "dev", _BRIDGE)
        await run("ip", "link", "set", _BRIDGE, "up")

    async def stop(self) -> None:
        """Take all hosts and cables down, so that others can be put up."""
        for host in self.hosts:
            if host != CLIENTS:
                # With its namespace, once nobody runs there any more, goes the other end too.
                await run("ip", "link", "delete", _port(host))
                await run("ip", "netns", "delete", host)
        await run("ip", "link", "delete", _BRIDGE)
        await run("umount", str(NAMESPACES))

    async def add(self, host: str) -> str:
        """A new host; its address."""
        number = len(self._addresses) + 1
        address = f"{_SUBNET}.{number}"
        await run("ip", "netns", "add", host)
        await run("ip", "link", "add", _port(host), "type", "veth", "peer", "name", "eth0", "netns", host)
        await run("ip", "link", "set", _port(host), "master", _BRIDGE, "up")
        await run("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            await run("ip", "-n", host, "link", "set", link, "up")
        self._addresses[host] = address
        return address

    @property
    def hosts(self) -> list[str]:
        """All of them, the clients' too."""
        return list(self._addresses)

    def inside(self, host: str) -> list[str]:
        """What a command line begins with that runs on the host."""
        return ["nsenter", f"--net={NAMESPACES / host}", "--"] if host != CLIENTS else []

    @asynccontextmanager
    async def losing(self, losses: Sequence[Loss]) -> AsyncIterator[None]:
        """Meanwhile all this is lost; what several lose is lost until the last of them ends."""
        await self._change(losses, 1)
        try:
            yield
        finally:
            await self._change(losses, -1)

    @asynccontextmanager
    async def unplugged(self, host: str) -> AsyncIterator[None]:
        """Meanwhile its cable is out of the switch: its link is down too."""
        await run("ip", "link", "set", _port(host), "down")
        try:
            yield
        finally:
            await run("ip", "link", "set", _port(host), "up")

    @asynccontextmanager
    async def delayed(self, host: str, milliseconds: int) -> AsyncIterator[None]:
        """Meanwhile whatever leaves the host or comes there takes so much longer."""
        port, near, far = _port(host), _port(host, "s"), _port(host, "t")
        await run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        # Else this namespace, where the clients' address is, would answer on the port itself.
        await run("sh", "-c", f"echo 1 > /proc/sys/net/ipv4/conf/{port}/arp_ignore")
        for link in (near, far):
            await run("ip", "link", "set", link, "up")
        copying = await asyncio.create_subprocess_exec(
            *die_with_parent.command(
                [sys.executable, "-m", "tools.chaos.slow_cable", port, near, str(milliseconds)], signal.SIGKILL
            ),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert copying.stdout is not None
            await copying.stdout.readline()
            await run("ip", "link", "set", port, "nomaster")
            await run("ip", "link", "set", far, "master", _BRIDGE)
            yield
        finally:
            copying.kill()
            await copying.wait()
            await run("ip", "link", "delete", near)
            await run("ip", "link", "set", port, "master", _BRIDGE)

    async def _change(self, losses: Sequence[Loss], by: int) -> None:
        receivers: set[str] = set()
        for loss in losses:
            self._losses[loss] += by
            receivers.add(loss.receiver)
        self._losses = +self._losses
        await asyncio.gather(*(self._apply(receiver) for receiver in sorted(receivers)))

    async def _apply(self, receiver: str) -> None:
        """Lost at the receiver's: a sender's own rule would tell it so."""
        rules = [_TABLE]
        for loss in self._losses:
            if loss.receiver == receiver:
                chance = "" if loss.percent >= 100 else f"numgen random mod 100 < {loss.percent} "
                rules.append(f"add rule inet chaos input ip saddr {self._addresses[loss.sender]} {chance}drop")
        await run(*self.inside(receiver), "nft", "-f", "-", given="\n".join(rules) + "\n")


def _port(host: str, kind: str = "v") -> str:
    """The host's port at the switch; a link's name has 15 characters at most."""
    return f"{kind}-{host}"[:15]


async def run(*command: str, given: str = "") -> None:
    """Raises NetworkError with what the command said."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate(given.encode())
    if process.returncode:
        raise NetworkError(f"{' '.join(command)}: {output.decode(errors='replace').strip()}")
