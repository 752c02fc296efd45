"""The cluster's configuration: one YAML file, checked whole before anything starts.

`ClusterConfig.load` reads a file, `ClusterConfig.from_flags` only flags; both raise ConfigError with every problem
found, each with its line or flag and its reason. Times are in seconds.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from controlplane.config_checks import cross_checks
from controlplane.config_source import ConfigError, Loc, Overrides, Problem, Source
from controlplane.runtime.ids import DeploymentId
from controlplane.runtime.messages.common import ParallelDegrees, ReplicaSpec
from controlplane.runtime.records import DeploymentRecord
from controlplane.runtime.timing import Timings, derive_timings

DEMO_MODEL = "gemma-3-270m"
"""The model path that stands for the Gemma 3 270M of the extra `demo`."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
# etcd's keys and replicas carry it.
DeploymentName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Degree = Annotated[int, Field(ge=1, le=4096)]


def _device_name(value: object) -> object:
    # A bare number is a CUDA index, as in CUDA_VISIBLE_DEVICES.
    return f"cuda:{value}" if isinstance(value, int) and not isinstance(value, bool) else value


DeviceName = Annotated[str, BeforeValidator(_device_name), Field(pattern=r"^(cpu|cuda):[0-9]+$")]


class Section(BaseModel):
    """Base of all sections: unknown keys and values of another type are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class NodeConfig(Section):
    """A host that runs one worker daemon."""

    # Defaults to the host, with a number where a host has several nodes.
    name: Name | None = None
    host: Annotated[str, Field(min_length=1)]
    # The first is the worker daemon's gRPC port; none: the daemon takes a free one.
    ports: list[Port] = []
    devices: Annotated[list[DeviceName], Field(min_length=1)]


class ControlPlaneConfig(Section):
    """One control-plane process: its gRPC port and its HTTP port."""

    name: Name | None = None
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Port = 7700
    http_port: Port = 8000


class EtcdConfig(Section):
    """How to reach etcd. Without endpoints `perdure up` starts one."""

    endpoints: list[str] = []
    username: str = ""
    # A file, so that no secret stands in this one.
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


class ClusterSection(Section):
    name: Name = "local"
    nodes: list[NodeConfig] = []
    controlplanes: list[ControlPlaneConfig] = []
    etcd: EtcdConfig = EtcdConfig()


class ParallelismSection(Section):
    """Degrees of parallelism. A replica is tensor × pipeline ranks; experts lie across its tensor ranks."""

    tensor_parallel_size: Degree = 1
    pipeline_parallel_size: Degree = 1
    # Replicas; left out: as many as the devices hold beside the spares.
    data_parallel_size: Degree | None = None
    expert_parallel_size: Degree = 1


class ModelSection(Section):
    # A folder in Hugging Face form, a .gguf file, a hub name, or DEMO_MODEL.
    path: Annotated[str, Field(min_length=1)] = DEMO_MODEL
    # The name clients ask for; left out: the last part of the path.
    name: str | None = None
    # Names the desired state in etcd: a new model under an old name takes the old one's place.
    deployment: DeploymentName = "main"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # auto: exact where that costs nothing, on CPUs.
    numerics: Literal["auto", "exact", "fast"] = "auto"
    kv_cache_dtype: Literal["auto", "fp8_e4m3"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    trust_remote_code: bool = False
    disable_cuda_graph: bool = False
    mem_fraction_static: Annotated[float, Field(gt=0, le=1)] = 0.85
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    max_sequences: Annotated[int, Field(ge=1, le=65536)] = 64
    max_batch_tokens: Annotated[int, Field(ge=16)] = 2048
    # 0: the model's own limit.
    max_model_tokens: Annotated[int, Field(ge=0)] = 0
    # 0: sized by mem_fraction_static.
    kv_cache_tokens: Annotated[int, Field(ge=0)] = 0
    # A CPU rank's share of the cores; 0: the host's cores divided by the ranks of all its nodes.
    cpu_threads: Annotated[int, Field(ge=0)] = 0
    enable_prefix_cache: bool = True
    # Prepare the next step while one runs; auto: on GPUs.
    overlap: Literal["auto", "on", "off"] = "auto"


class CommunicationSection(Section):
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    # The longest a collective may be stuck; the derived time must not exceed it.
    timeout: Annotated[float, Field(gt=0)] | None = None
    # The coordinator gives each life of a group a rendezvous of its own, so only "auto" has an effect.
    init_method: Annotated[str, Field(pattern=r"^(auto|env://|tcp://.+)$")] = "auto"


class FaultToleranceSection(Section):
    enable: bool = True
    # Training steps between two checkpoints; 0: none. Serving reads weights from the model's folder.
    checkpoint_interval: Annotated[int, Field(ge=0)] = 0
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    recovery_strategy: Literal["checkpoint_restart", "elastic_scaling"] = "checkpoint_restart"
    # What becomes of a node that is several times slower than its equals for a while.
    slow_nodes: Literal["report", "drain"] = "report"
    # Free devices that keep weights ready for a replica that loses ranks.
    spares: Annotated[int, Field(ge=0, le=64)] = 0
    failure_timeout: float = 3.0
    heartbeat_interval: float = 0.5


class MonitoringSection(Section):
    enable: bool = True
    # First port for the worker daemons' /metrics, counted up on a host with several nodes. Gateways have theirs
    # on their HTTP port.
    metrics_port: Port | None = None
    # The longest time between two looks at a worker's health; heartbeats must not be rarer.
    health_check_interval: Annotated[float, Field(gt=0)] | None = None


class ClusterConfig(Section):
    """The whole file."""

    cluster: ClusterSection = ClusterSection()
    parallelism: ParallelismSection = ParallelismSection()
    model: ModelSection = ModelSection()
    communication: CommunicationSection = CommunicationSection()
    fault_tolerance: FaultToleranceSection = FaultToleranceSection()
    monitoring: MonitoringSection = MonitoringSection()

    @classmethod
    def load(cls, path: str | Path, overrides: Overrides | None = None) -> ClusterConfig:
        """The configuration in a YAML file, flags winning over it. Raises ConfigError with every problem."""
        return _validate(Source.read(Path(path), overrides or {}))

    @classmethod
    def load_all(cls, path: str | Path) -> list[ClusterConfig]:
        """One configuration for each document of a YAML file, each with a deployment of its own; one that says nothing
        describes none. Raises ConfigError."""
        sources = [source for source in Source.read_all(Path(path), {}) if source.data]
        if not sources:
            raise ConfigError([Problem(str(path), "", "describes no deployment")])
        configs = [_validate(source) for source in sources]
        problems = [
            source.problem(loc, f"{name(config)!r} stands in another document, too")
            for loc, name in _NAMES.items()
            for index, (source, config) in enumerate(zip(sources, configs, strict=True))
            if name(config) in map(name, configs[:index])
        ]
        if problems:
            raise ConfigError(problems)
        return configs

    @classmethod
    def from_flags(cls, overrides: Overrides | None = None) -> ClusterConfig:
        """The configuration that flags alone give. Raises ConfigError with every problem."""
        return _validate(Source.empty(overrides or {}))

    @property
    def ranks_per_replica(self) -> int:
        return self.parallelism.tensor_parallel_size * self.parallelism.pipeline_parallel_size

    @property
    def replicas(self) -> int:
        """How many replicas to run: data_parallel_size, or as many as the devices hold beside the spares."""
        if self.parallelism.data_parallel_size is not None:
            return self.parallelism.data_parallel_size
        devices = sum(len(node.devices) for node in self.cluster.nodes)
        return max(1, (devices - self.fault_tolerance.spares) // self.ranks_per_replica)

    @property
    def model_name(self) -> str:
        """The name under which clients ask for the model."""
        return self.model.name or Path(self.model.path).name or self.model.path

    def node_names(self) -> tuple[str, ...]:
        """One name a node, in order: its own, or its host's, numbered where a host has several."""
        hosts = [node.host for node in self.cluster.nodes]
        return tuple(
            node.name or (node.host if hosts.count(node.host) == 1 else f"{node.host}-{hosts[:index].count(node.host)}")
            for index, node in enumerate(self.cluster.nodes)
        )

    def metrics_ports(self) -> tuple[int | None, ...]:
        """One port a node for its daemon's /metrics, in order; None where none is wanted."""
        first, hosts = self.monitoring.metrics_port, [node.host for node in self.cluster.nodes]
        if first is None or not self.monitoring.enable:
            return (None,) * len(hosts)
        return tuple(first + hosts[:index].count(host) for index, host in enumerate(hosts))

    def timings(self) -> Timings:
        """All times of the cluster, derived from failure_timeout and heartbeat_interval."""
        return derive_timings(self.fault_tolerance.failure_timeout, self.fault_tolerance.heartbeat_interval)

    def replica_spec(self) -> ReplicaSpec:
        """What every rank of a replica must agree on."""
        model, degrees = self.model, self.parallelism
        return ReplicaSpec(
            deployment=DeploymentId(self.model.deployment),
            model_path=model.path,
            dtype=model.dtype,
            numerics=model.numerics,
            load_format=model.load_format,
            degrees=ParallelDegrees(
                tensor=degrees.tensor_parallel_size,
                pipeline=degrees.pipeline_parallel_size,
                expert=degrees.expert_parallel_size,
            ),
            backend=self.communication.backend,
            trust_remote_code=model.trust_remote_code,
            disable_cuda_graph=model.disable_cuda_graph,
            mem_fraction_static=model.mem_fraction_static,
            block_tokens=model.block_tokens,
            max_sequences=model.max_sequences,
            max_batch_tokens=model.max_batch_tokens,
            max_model_tokens=model.max_model_tokens,
            kv_cache_tokens=model.kv_cache_tokens,
            cpu_threads=model.cpu_threads,
            enable_prefix_cache=model.enable_prefix_cache,
            overlap=model.overlap,
            kv_cache_dtype=model.kv_cache_dtype,
        )

    def deployment(self) -> DeploymentRecord:
        """The desired state that this file describes."""
        recovery = self.fault_tolerance
        return DeploymentRecord(
            deployment=DeploymentId(self.model.deployment),
            model=self.model_name,
            spec=self.replica_spec(),
            replicas=self.replicas,
            recovery_strategy=recovery.recovery_strategy,
            max_retries=recovery.max_retries if recovery.enable else 0,
            slow_nodes=recovery.slow_nodes,
            spares=recovery.spares if recovery.enable else 0,
        )

    def with_etcd(self, endpoints: list[str]) -> ClusterConfig:
        """The same configuration with etcd at `endpoints`."""
        etcd = self.cluster.etcd.model_copy(update={"endpoints": endpoints})
        return self.model_copy(update={"cluster": self.cluster.model_copy(update={"etcd": etcd})})

    def with_model(self, path: Path, name: str) -> ClusterConfig:
        """The same configuration with the model's folder found; clients go on to ask for `name`."""
        model = self.model.model_copy(update={"path": str(path), "name": name})
        return self.model_copy(update={"model": model})

    def to_yaml(self) -> str:
        """A file that loads to an equal configuration."""
        return yaml.safe_dump(self.model_dump(exclude_defaults=True), sort_keys=False)


# What two deployments cannot share.
_NAMES: dict[Loc, Callable[[ClusterConfig], str]] = {
    ("model", "deployment"): lambda config: config.model.deployment,
    ("model", "name"): lambda config: config.model_name,
}


def _validate(source: Source) -> ClusterConfig:
    try:
        config = ClusterConfig.model_validate(source.data)
    except ValidationError as error:
        raise ConfigError([_schema_problem(source, detail) for detail in error.errors()]) from error
    problems = [source.problem(loc, text) for loc, text in cross_checks(config)]
    if problems:
        raise ConfigError(problems)
    return config


def _schema_problem(source: Source, detail: ErrorDetails) -> Problem:
    loc: Loc = tuple(detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return source.problem(loc, "is not a known key" + _did_you_mean(loc))
        case "missing":
            return source.problem(loc, "is missing")
        case "string_pattern_mismatch":
            return source.problem(loc, f"{detail['input']!r} does not have the form {detail['ctx']['pattern']}")  # pyright: ignore[reportTypedDictNotRequiredAccess]
        case _:
            text = detail["msg"].replace("Input should", "must", 1)
            return source.problem(loc, f"{text}, not {_brief(detail['input'])}")


def _did_you_mean(loc: Loc) -> str:
    known = _known_keys(loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f" (known: {', '.join(known)})"


def _known_keys(loc: Loc) -> list[str]:
    """The keys of the section at `loc`."""
    section: Any = ClusterConfig
    for part in loc:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        if typing.get_origin(section) is list:
            section = typing.get_args(section)[0]
    return list(section.model_fields)


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
