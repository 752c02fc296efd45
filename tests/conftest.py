"""Fixtures of all tests. The cluster is one for the whole run: each test gets it whole again."""

from __future__ import annotations

import glob
import os

# One thread a process: test files run side by side. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

if TYPE_CHECKING:
    from tests.support.cluster import Cluster


def see_gpus_from_another_one() -> None:
    """Where there are several GPUs, each process of a run begins with another one. Before tests ask for them."""
    worker, gpus = os.environ.get("PYTEST_XDIST_WORKER", ""), len(glob.glob("/dev/nvidia[0-9]*"))
    if worker and gpus > 1:
        first = int(worker.removeprefix("gw"))
        order = [str((first + index) % gpus) for index in range(gpus)]
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", ",".join(order))


see_gpus_from_another_one()


# What takes long to start is shared by these: one process runs all files of a group. What runs longest or waits most
# is started first, so that no process is left with it alone at the end.
GROUPS = {
    "the cluster": ("tests/chaos/", "tests/integration/test_end_to_end.py"),
    "commands": ("tests/integration/test_cli_up.py",),
    "ranks": (
        "tests/unit/dataplane/engine/test_mesh.py",
        "tests/unit/dataplane/models/test_traps.py",
        "tests/unit/dataplane/models/test_meshes.py",
        "tests/unit/dataplane/parallel/",
    ),
    "the engine": ("tests/unit/dataplane/engine/test_engine.py",),
    "workers": ("tests/integration/test_worker.py",),
}


def group_of(nodeid: str) -> str:
    """The group of a test; a file of no group is one of its own."""
    return next((name for name, paths in GROUPS.items() if nodeid.startswith(paths)), nodeid.partition("::")[0])


class GroupScheduling(LoadScopeScheduling):
    """Hands whole groups to the processes of a run."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> GroupScheduling | None:
    return GroupScheduling(config, log) if config.getvalue("dist") == "loadscope" else None


NAMED = ("matrix", "chaos")
"""What takes long runs only where the marker expression names it."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [name for name in NAMED if name not in config.option.markexpr]
    others = [item for item in items if any(item.get_closest_marker(name) is not None for name in left_out)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    order = {name: place for place, name in enumerate(GROUPS)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    """Two control planes, two workers of one rank, a real etcd, a small real model (PERDURE_TEST_MODEL: another)."""
    # Here, for they import torch: the process that hands out tests would begin seconds later.
    from tests.support.cluster import Cluster
    from tests.support.models import tiny_model

    folder: Path = tmp_path_factory.mktemp("cluster")
    # large enough that a step takes some milliseconds, so that a kill meets streams in flight
    shape = {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 1024, "max_position_embeddings": 8192}
    given = os.environ.get("PERDURE_TEST_MODEL")
    model = Path(given) if given else tiny_model(folder / "model", "llama", **shape)
    cluster = Cluster(folder, model, controlplanes=2, workers=2)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


@pytest_asyncio.fixture(loop_scope="session")
async def cluster(running_cluster: Cluster) -> Cluster:
    """The cluster, healed of what an earlier test did to it."""
    for daemon in running_cluster.daemons():
        if not daemon.running:
            daemon.start()
    await running_cluster.wait_ready()
    return running_cluster
