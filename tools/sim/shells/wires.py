"""gRPC in memory: channels, calls and servers with the behaviour of grpc.aio that shells rely on. Frames are really
encoded; they arrive in order, after a delay, and only while the reader has room; streams break and stall."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import grpc.aio

from tools.sim.kernel import Kernel
from tools.sim.shells.loop import LIFE, Life, LifeTask, VirtualLoop
from tools.sim.shells.pipe import EOF, Pipe

CONNECT_TRIES = 16
DELAY_S = (0.0001, 0.002)
PING_TIMEOUT_S = 1.5
"""A connection that carries nothing for so long is broken at both ends."""
REFUSED_S = 0.0005
TOLD_S = 0.001
"""How long a call has been over before its reader is told: until then writes fail with another error."""
NOTICED_S = 0.02
"""How soon a channel that nothing is sent on says that its peer is gone."""

Status = grpc.StatusCode


def failure(code: grpc.StatusCode, text: str) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), text, text)


class Call:
    """The client's end of one call."""

    def __init__(self, wires: Wires, address: str, path: str, codec: tuple[Any, Any], timeout: float | None) -> None:
        self.life = LIFE.get()
        self.address, self.path = address, path
        self.host = address.rpartition(":")[0]
        self.up, self.down = Pipe(wires, self.life.name, self.host), Pipe(wires, self.host, self.life.name)
        self.handler: LifeTask | None = None
        self._wires = wires
        self._encode, self._decode = codec
        self._connected = asyncio.Event()
        wires.calls[self] = None
        wires.kernel.after(REFUSED_S, self._connect, CONNECT_TRIES)
        if timeout is not None:
            wires.kernel.after(timeout, self.end, failure(Status.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _connect(self, tries: int) -> None:
        wires = self._wires
        if self.up.broken is not None:
            return
        server = wires.servers.get(self.address)
        if not self.life.alive:
            self.end(failure(Status.UNAVAILABLE, "this process is dead"))
        elif wires.is_cut(self.life.name, self.host) or wires.is_cut(self.host, self.life.name):
            if tries == 0:
                self.end(failure(Status.UNAVAILABLE, "no route"))
            else:
                wires.kernel.after(PING_TIMEOUT_S / CONNECT_TRIES, self._connect, tries - 1)
        elif server is None or not server.listening:
            self.end(failure(Status.UNAVAILABLE, f"connection to {self.address} refused"))
        else:
            server.take(self)
            self._connected.set()

    async def wait_for_connection(self) -> None:
        await self._connected.wait()
        if self.up.broken is not None:
            raise self.up.broken

    async def write(self, frame: Any) -> None:
        await self._connected.wait()
        if self.up.broken is not None:
            raise asyncio.InvalidStateError("the call has ended")
        await self.up.write(self._encode(frame))

    async def read(self) -> Any:
        await self._connected.wait()
        frame = await self.down.read()
        return frame if frame is EOF else self._decode(frame)

    async def done_writing(self) -> None:
        self.up.finish()

    def cancel(self) -> bool:
        """Over for both ends: whoever waits here is cancelled, and so is the handler, a moment later."""
        self.end(asyncio.CancelledError())
        return True

    def end(self, error: BaseException) -> None:
        """The call breaks with `error`. Whoever writes hears of it first, the reader a moment later, as the handler."""
        if self.up.broken is not None:
            return
        self.up.snap(error)
        if isinstance(error, asyncio.CancelledError):
            self.down.snap(error)
        else:
            self._wires.kernel.after(TOLD_S, self.down.snap, error)
        self._connected.set()
        self._wires.calls.pop(self, None)
        if self.handler is not None:
            self._wires.kernel.after(self._wires.delay(self.life.name, self.host), _cancel, self.handler)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while (frame := await self.read()) is not EOF:
            yield frame


def _cancel(handler: LifeTask) -> None:
    handler.cancel()


class Channel:
    """grpc.aio.Channel, as far as stubs and shells use it."""

    def __init__(self, wires: Wires, address: str) -> None:
        self._wires = wires
        self._address = address
        self._calls: list[Call] = []

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        for call in self._calls:
            call.cancel()

    def stream_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def begin(requests: Iterable[Any] = (), metadata: Any = None, timeout: float | None = None) -> Call:
            call = Call(self._wires, self._address, path, (request_serializer, response_deserializer), timeout)
            self._calls = [other for other in self._calls if other.up.broken is None]
            self._calls.append(call)
            for request in requests:
                call.up.push(request_serializer(request))
            return call

        return begin

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **options: Any) -> Any:
        begin = self.stream_stream(path, request_serializer, response_deserializer, **options)

        async def ask(request: Any, metadata: Any = None, timeout: float | None = None) -> Any:
            call: Call = begin((request,), metadata, timeout)
            try:
                return await call.read()
            finally:
                call.cancel()

        return ask

    # Kinds of calls that stubs mention and no shell makes.
    unary_stream = stream_unary = unary_unary

    # -------------------------------------------------------- connectivity, for whoever only watches a peer

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        up = self._wires.reaches(LIFE.get(), self._address)
        return grpc.ChannelConnectivity.READY if up else grpc.ChannelConnectivity.TRANSIENT_FAILURE

    async def wait_for_state_change(self, last: grpc.ChannelConnectivity) -> None:
        while self.get_state() is last:  # noqa: ASYNC110 - a channel that nothing is sent on notices late
            await asyncio.sleep(NOTICED_S)


class Context:
    """The servicer's view of a call."""

    def __init__(self, call: Call, encode: Callable[[Any], bytes]) -> None:
        self._call = call
        self._encode = encode

    def peer(self) -> str:
        return self._call.life.name

    async def write(self, frame: Any) -> None:
        await self._call.down.write(self._encode(frame))

    async def abort(self, code: grpc.StatusCode, details: str = "") -> None:
        self._call.down.finish(failure(code, details))
        raise grpc.aio.AbortError


class Server:
    """grpc.aio.Server, as far as shells use it."""

    def __init__(self, wires: Wires) -> None:
        self.listening = False
        self._wires = wires
        self._life = LIFE.get()
        self._address = ""
        self._methods: dict[str, Any] = {}
        self._handlers: set[LifeTask] = set()

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        pass

    def add_registered_method_handlers(self, service: str, methods: dict[str, Any]) -> None:
        self._methods |= {f"/{service}/{name}": method for name, method in methods.items()}

    def add_insecure_port(self, address: str) -> int:
        self._address = address
        self._wires.servers[address] = self
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        self.listening = True

    async def stop(self, grace: float | None) -> None:
        """Refuse what is new at once; what runs has `grace` seconds."""
        self.listening = False
        if self._handlers:
            await asyncio.wait(self._handlers, timeout=grace)
        for handler in list(self._handlers):
            handler.cancel()
        if self._handlers:
            await asyncio.wait(self._handlers)

    def take(self, call: Call) -> None:
        """A call arrives: its handler is a task of this process."""
        method = self._methods[call.path]
        token = LIFE.set(self._life)
        try:
            task: Any = self._wires.loop.create_task(self._handle(call, method))
        finally:
            LIFE.reset(token)
        call.handler = task
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _handle(self, call: Call, method: Any) -> None:
        context = Context(call, method.response_serializer)
        try:
            if method.unary_unary is not None:
                request = method.request_deserializer(await call.up.read())
                await context.write(await method.unary_unary(request, context))
            else:
                answers = method.stream_stream(_requests(call, method.request_deserializer), context)
                if inspect.isasyncgen(answers):
                    async for frame in answers:
                        await context.write(frame)
                else:
                    await answers
            call.down.finish()
        except grpc.aio.AbortError:
            pass
        except grpc.aio.AioRpcError:
            # Its client is gone.
            pass
        except asyncio.CancelledError:
            call.down.finish(failure(Status.CANCELLED, "the handler was cancelled"))
            raise


async def _requests(call: Call, decode: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    """As grpc.aio's: a client that breaks off looks like one that ended."""
    while True:
        try:
            frame = await call.up.read()
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as error:
            if error is call.up.broken:
                return
            raise
        if frame is EOF:
            return
        yield decode(frame)


class Wires:
    """Everything that connects the processes of one world."""

    def __init__(self, kernel: Kernel, loop: VirtualLoop) -> None:
        self.kernel = kernel
        self.loop = loop
        self.servers: dict[str, Server] = {}
        self.calls: dict[Call, None] = {}
        self.slow: dict[str, float] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        loop.refuses = self._refuses

    def channel(self, address: str, options: Any = None) -> Channel:
        """In place of grpc.aio.insecure_channel."""
        return Channel(self, address)

    def server(self, options: Any = None) -> Server:
        """In place of grpc.aio.server."""
        return Server(self)

    def delay(self, source: str, target: str) -> float:
        slow = max(self.slow.get(source, 0.0), self.slow.get(target, 0.0))
        return self.kernel.random.uniform(*DELAY_S) + slow * self.kernel.random.random()

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cuts

    def reaches(self, life: Life, address: str) -> bool:
        host = address.rpartition(":")[0]
        server = self.servers.get(address)
        cut = self.is_cut(life.name, host) or self.is_cut(host, life.name)
        return life.alive and server is not None and server.listening and not cut

    # ------------------------------------------------------------ faults

    def cut(self, one: str, other: str) -> None:
        """Both ways; a connection that stays cut breaks."""
        for pair in ((one, other), (other, one)):
            self._cuts[pair] = self._cuts.get(pair, 0) + 1
        self.kernel.after(PING_TIMEOUT_S, self._break_cut, one, other)

    def heal(self, one: str, other: str) -> None:
        for pair in ((one, other), (other, one)):
            left = self._cuts.pop(pair, 1) - 1
            if left:
                self._cuts[pair] = left
        self._flush()

    def _flush(self) -> None:
        for call in list(self.calls):
            call.up.flush()
            call.down.flush()

    def heal_all(self) -> None:
        self._cuts.clear()
        self.slow.clear()
        self._flush()

    def hurry(self, host: str) -> None:
        """It is slow no more."""
        self.slow.pop(host, None)

    def break_calls(self, host: str, other: str | None = None) -> None:
        """Every stream of the host (with `other`) breaks under living peers."""
        for call in list(self.calls):
            ends = {call.life.name, call.host}
            if host in ends and (other is None or other in ends):
                call.end(failure(Status.UNAVAILABLE, "connection reset"))

    def _break_cut(self, one: str, other: str) -> None:
        if self.is_cut(one, other):
            self.break_calls(one, other)

    def _refuses(self, host: str, port: int) -> bool:
        server = self.servers.get(f"{host}:{port}")
        return server is None or not server.listening
