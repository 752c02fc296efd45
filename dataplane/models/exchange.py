"""How one rank copies weights from another: messages over TCP, and the values between them as they lie in memory.

The one that copies opens with what its model is made of, and is told all that the other holds (`Offers`), or why it is
refused. Then it asks for boxes of whole tensors, one after another; each is answered by `Given` and the values, row by
row, or by `NotHeld`. A message is a 4-byte little-endian length and a msgspec MessagePack array.
"""

from __future__ import annotations

import socket
from typing import TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from dataplane.models.pieces import Box, size

ANSWER_S = 2.0
"""How long either side waits for the other's next bytes within a conversation."""

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
_LENGTH_BYTES = 4


class Message(msgspec.Struct, frozen=True, array_like=True):
    """Base of all messages."""


class Open(Message, frozen=True, tag=True):
    """`content` is what the weights were made of (fit.content)."""

    content: str


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """A box of the whole tensor `source`."""

    source: str
    at: Box
    # As torch names it, "bfloat16".
    dtype: str


class Offers(Message, frozen=True, tag=True):
    offers: tuple[Offer, ...]


class Refused(Message, frozen=True, tag=True):
    text: str


class Ask(Message, frozen=True, tag=True):
    """For a box inside one that was offered."""

    offer: Offer


class Given(Message, frozen=True, tag=True):
    """The values follow."""

    bytes: int


class NotHeld(Message, frozen=True, tag=True):
    """No longer."""


_M = TypeVar("_M", bound=Message)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Open | Offers | Refused | Ask | Given | NotHeld)


class Broken(Exception):
    """The other side left, stood still, or does not speak this."""


class Wire:
    """Blocking messages over one connection. All methods raise Broken."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.settimeout(ANSWER_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message, values: memoryview | None = None) -> None:
        body = _encoder.encode(message)
        try:
            self._socket.sendall(len(body).to_bytes(_LENGTH_BYTES, "little") + body)
            if values is not None:
                self._socket.sendall(values)
        except OSError as error:
            raise Broken(str(error)) from error

    def receive(self, *kinds: type[_M], wait_s: float = ANSWER_S) -> _M:
        """The next message, which must begin within `wait_s` and be one of `kinds`."""
        head = bytearray(_LENGTH_BYTES)
        self._socket.settimeout(wait_s)
        self.fill(memoryview(head))
        self._socket.settimeout(ANSWER_S)
        length = int.from_bytes(head, "little")
        if length > MESSAGE_BYTES_MAX:
            raise Broken(f"a message of {length} bytes")
        body = bytearray(length)
        self.fill(memoryview(body))
        try:
            message = _decoder.decode(body)
        except msgspec.DecodeError as error:
            raise Broken(f"an unreadable message: {error}") from error
        if not isinstance(message, kinds):
            raise Broken(f"{message} came when one of {kinds} was due")
        return message

    def fill(self, target: memoryview) -> None:
        """Receive as many bytes as `target` has."""
        done = 0
        while done < len(target):
            try:
                count = self._socket.recv_into(target[done:])
            except OSError as error:
                raise Broken(str(error) or type(error).__name__) from error
            if count == 0:
                raise Broken("the connection was closed")
            done += count


def type_name(tensor: Tensor) -> str:
    """A tensor's type as messages name it."""
    return str(tensor.dtype).removeprefix("torch.")


class Staging:
    """Host memory for one slice, and copies between it and tensors on a device.

    On a GPU it is pinned and the copies go over a stream of their own, beside the steps that are under way. On a CPU
    numpy copies: torch would start its threads in every thread that copies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._memory = torch.empty(0, dtype=torch.uint8)

    def memory(self, box: Box, dtype: torch.dtype) -> memoryview:
        """Bytes for the values of `box`, valid until the next call."""
        return memoryview(self._bytes(box, dtype).numpy())  # type: ignore[arg-type]

    def copy_out(self, source: Tensor, box: Box) -> memoryview:
        """The values of `source`, which has the shape of `box`."""
        staged = self._values(box, source.dtype)
        if self._stream is None:
            np.copyto(_words(staged), _words(source))
        else:
            with torch.cuda.stream(self._stream):
                staged.copy_(source, non_blocking=True)
            self._stream.synchronize()
        return self.memory(box, source.dtype)

    def copy_in(self, target: Tensor, box: Box) -> None:
        """Put what `memory` was filled with into `target`."""
        staged = self._values(box, target.dtype)
        if self._stream is None:
            np.copyto(_words(target), _words(staged))
        else:
            with torch.cuda.stream(self._stream):
                target.copy_(staged, non_blocking=True)
            self._stream.synchronize()

    def _values(self, box: Box, dtype: torch.dtype) -> Tensor:
        return self._bytes(box, dtype).view(dtype).view([stop - start for start, stop in box])

    def _bytes(self, box: Box, dtype: torch.dtype) -> Tensor:
        count = size(box) * dtype.itemsize
        if self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=torch.uint8, pin_memory=self._stream is not None)
        return self._memory[:count]


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _words(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory for numpy, which knows no bfloat16."""
    return tensor.detach().view(_WORDS[tensor.itemsize]).numpy()
