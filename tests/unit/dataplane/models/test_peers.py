"""Weights from other ranks: the bits that files give, whatever the degrees of either side and the fate of a peer."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec
from dataplane.models import loading
from dataplane.models.exchange import Ask, Broken, Given, Offers, Open, Staging, Wire
from dataplane.models.fit import FittedModel, ModelLoad, begin_load
from dataplane.models.loading import FILES
from dataplane.models.shelf import ShelfServer
from dataplane.models.tensor_file import TensorReader
from dataplane.models.work_list import Place, WorkList
from dataplane.parallel.mesh import plan_mesh, world_size
from tests.support.attention import REFERENCE, register
from tests.support.models import FAMILIES, MOE_FAMILIES, tiny_model

CPU = torch.device("cpu")
HOST = "127.0.0.1"
PATIENCE_S = 30.0


def begin(path: Path, rank: int = 0, **fields: Any) -> ModelLoad:
    """The shard of one rank, without a group; `fields` are degrees, and "dtype"."""
    register()
    dtype = fields.pop("dtype", "auto")
    degrees = ParallelDegrees(**fields)
    spec = ReplicaSpec(deployment=DeploymentId("test"), model_path=str(path), dtype=dtype, degrees=degrees)
    return begin_load(spec, plan_mesh(degrees, rank), CPU, quiet, REFERENCE)


def quiet(stage: str, share: float) -> None:
    """No report."""


def load(path: Path, rank: int = 0, **fields: Any) -> FittedModel:
    return begin(path, rank, **fields).run(quiet)


def values(model: FittedModel) -> dict[str, Tensor]:
    return model.module.state_dict()


def assert_same_bits(got: FittedModel, wanted: FittedModel) -> None:
    ours, theirs = values(got), values(wanted)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@contextmanager
def replica(path: Path, **fields: Any) -> Iterator[list[str]]:
    """The addresses of all ranks of a replica that holds its weights."""
    degrees = ParallelDegrees(**{name: value for name, value in fields.items() if name != "dtype"})
    with ExitStack() as stack:
        addresses: list[str] = []
        for rank in range(world_size(degrees)):
            model = load(path, rank, **fields)
            stack.callback(lambda kept: None, model)
            server = stack.enter_context(closing(ShelfServer(HOST, CPU)))
            server.show(model.shelf)
            addresses.append(server.address)
        yield addresses


class Waiting:
    """Lets the reader of files begin only when all peers have done what they can."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peers: int) -> None:
        idle: set[int] = set()
        all_idle = threading.Event()
        following, read = WorkList._next, TensorReader.read

        def watch(work: WorkList, place: Place) -> int | None:
            number = following(work, place)
            (idle.add if number is None else idle.discard)(id(place))
            if len(idle) == peers:
                all_idle.set()
            return number

        def wait(reader: TensorReader, *arguments: Any) -> None:
            assert all_idle.wait(PATIENCE_S), "a peer never came to its end"
            read(reader, *arguments)

        monkeypatch.setattr(WorkList, "_next", watch)
        monkeypatch.setattr(TensorReader, "read", wait)


def size(model: FittedModel) -> int:
    """Bytes of its tensors, tied ones once."""
    return sum(tensor.nbytes for tensor in {tensor.data_ptr(): tensor for tensor in values(model).values()}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tensor_ranks_make_a_whole_model(family: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tp 2 → 1, experts spread over both: fused projections, merged experts, tied and padded vocabularies."""
    path = tiny_model(models, family)
    wanted = load(path)
    with replica(path, tensor=2, expert=2 if family in MOE_FAMILIES else 1) as addresses:
        Waiting(monkeypatch, 2)
        newcomer = begin(path)
        got = newcomer.run(quiet, addresses)
    assert_same_bits(got, wanted)
    by_peer = [newcomer.bytes_from[address] for address in addresses]
    assert min(by_peer) > 0
    # One slice was on its way from the files before the peers came.
    assert sum(by_peer) > 0.8 * size(wanted)
    assert sum(newcomer.bytes_from.values()) == size(wanted)


@pytest.mark.parametrize(
    ("family", "there", "here", "rank"),
    [
        ("llama", {"tensor": 2}, {"tensor": 2}, 1),
        ("llama", {"tensor": 4}, {"tensor": 2}, 0),
        ("llama", {}, {"tensor": 4}, 3),
        ("gemma3_text", {"pipeline": 2}, {}, 0),
        ("gemma3_text", {}, {"pipeline": 2}, 1),
        ("qwen3_moe", {"pipeline": 2, "tensor": 2}, {"tensor": 2, "expert": 2}, 1),
        ("gpt_oss", {"tensor": 4, "expert": 2}, {"tensor": 2}, 1),
        ("deepseek_v3", {"tensor": 2, "expert": 2, "dtype": "bfloat16"}, {"dtype": "bfloat16"}, 0),
    ],
)
def test_any_degrees_serve_any_others(
    family: str,
    there: dict[str, Any],
    here: dict[str, Any],
    rank: int,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny_model(models, family)
    wanted = load(path, rank, **here)
    with replica(path, **there) as addresses:
        Waiting(monkeypatch, len(addresses))
        newcomer = begin(path, rank, **here)
        assert_same_bits(newcomer.run(quiet, addresses), wanted)
    assert newcomer.bytes_from[FILES] < 0.3 * size(wanted)


def test_slices_larger_than_a_portion_are_cut(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(models, "mixtral")
    wanted = load(path)
    monkeypatch.setattr(loading, "PORTION_BYTES", 1000)
    with replica(path, tensor=2) as addresses:
        Waiting(monkeypatch, 2)
        newcomer = begin(path)
        assert_same_bits(newcomer.run(quiet, addresses), wanted)
    assert newcomer.bytes_from[FILES] <= 1000


def test_a_load_goes_on_where_it_was_interrupted(models: Path) -> None:
    path = tiny_model(models, "llama")
    seen: list[float] = []

    def interrupt(stage: str, share: float) -> None:
        seen.append(share)
        if len(seen) == 9:
            raise InterruptedError

    newcomer = begin(path)
    with pytest.raises(InterruptedError):
        newcomer.run(interrupt)
    assert 0 < seen[-1] < 1
    assert_same_bits(newcomer.run(quiet), load(path))
    assert newcomer.bytes_from == {FILES: size(load(path))}


def test_other_files_and_other_types_are_refused(models: Path, tmp_path: Path) -> None:
    path = tiny_model(models, "llama")
    with replica(path, dtype="bfloat16") as addresses, replica(tiny_model(models, "qwen3")) as others:
        newcomer = begin(path)
        assert_same_bits(newcomer.run(quiet, [*addresses, *others, f"{HOST}:1", "nowhere"]), load(path))
    assert [count for source, count in newcomer.bytes_from.items() if source != FILES] == [0, 0, 0, 0]


def test_what_is_withdrawn_is_not_held(models: Path) -> None:
    model = load(tiny_model(models, "llama"))
    with closing(ShelfServer(HOST, CPU)) as server:
        server.show(model.shelf)
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            wire = Wire(connection)
            wire.send(Open(model.shelf.content))
            offer = wire.receive(Offers).offers[0]
            wire.send(Ask(offer))
            wire.fill(memoryview(bytearray(wire.receive(Given).bytes)))
            server.show(None)
            wire.send(Ask(offer))
            with pytest.raises(Broken, match="NotHeld"):
                wire.receive(Given)


class BadPeer:
    """Serves a few slices well; of the next it sends a part, and then leaves, or says nothing more."""

    def __init__(self, model: FittedModel, *, stalls: bool) -> None:
        self._model = model
        self._stalls = stalls
        self.failed = threading.Event()
        self._over = threading.Event()
        self._listener = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._listener.close()
        self._thread.join(PATIENCE_S)

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            wire = Wire(connection)
            wire.receive(Open)
            wire.send(Offers(self._model.shelf.offers()))
            for number in range(4):
                wanted = wire.receive(Ask).offer
                tensor = self._model.shelf.find(wanted)
                assert tensor is not None
                body = Staging(CPU).copy_out(tensor, wanted.at)
                wire.send(Given(len(body)), body if number < 3 else body[: len(body) // 2])
            self.failed.set()
            if self._stalls:
                self._over.wait(PATIENCE_S)


@pytest.mark.parametrize("stalls", [False, True], ids=["dies", "stalls"])
def test_a_peer_that_fails_in_the_middle_costs_its_slice(
    stalls: bool, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(models, "llama")
    wanted = load(path)
    read = TensorReader.read
    with closing(BadPeer(wanted, stalls=stalls)) as peer:

        def wait(reader: TensorReader, *arguments: Any) -> None:
            assert peer.failed.wait(PATIENCE_S)
            read(reader, *arguments)

        monkeypatch.setattr(TensorReader, "read", wait)
        newcomer = begin(path)
        assert_same_bits(newcomer.run(quiet, [peer.address]), wanted)
    assert newcomer.bytes_from[peer.address] > 0
    assert sum(newcomer.bytes_from.values()) == size(wanted)


def test_the_same_files_under_another_time_are_other_weights(models: Path) -> None:
    path = tiny_model(models, "llama", rope_theta=5000.0)
    with replica(path) as addresses:
        os.utime(path / "model.safetensors", ns=(1, 1))
        newcomer = begin(path)
        newcomer.run(quiet, addresses)
    assert newcomer.bytes_from[addresses[0]] == 0
