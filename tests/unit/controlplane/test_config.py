"""Each wrong configuration is refused with its file, line and reason; all problems at once."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from controlplane.config import ClusterConfig
from controlplane.config_source import ConfigError, Override

WHOLE = """\
cluster:
  name: lab
  nodes:
    - host: 10.0.0.1
      ports: [7800, 7801]
      devices: [cuda:0, cuda:1]
    - host: 10.0.0.2
      ports: [7800]
      devices: [0, 1]
parallelism:
  tensor_parallel_size: 2
  pipeline_parallel_size: 1
  data_parallel_size: 2
  expert_parallel_size: 2
model:
  path: /models/some-model
  dtype: bfloat16
  mem_fraction_static: 0.8
  trust_remote_code: false
communication:
  backend: nccl
  timeout: 30
  init_method: auto
fault_tolerance:
  enable: true
  checkpoint_interval: 100
  max_retries: 5
  recovery_strategy: elastic_scaling
  slow_nodes: drain
  spares: 2
  failure_timeout: 6
  heartbeat_interval: 1
monitoring:
  enable: true
  metrics_port: 9090
  health_check_interval: 10
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(dedent(text))
    return path


def problems(folder: Path, text: str) -> list[str]:
    """The problems of a file, without the folder's name."""
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.load(write(folder, text))
    return [str(problem).removeprefix(f"{folder}/") for problem in caught.value.problems]


def test_whole_file_becomes_a_deployment(tmp_path: Path) -> None:
    config = ClusterConfig.load(write(tmp_path, WHOLE))
    deployment = config.deployment()
    assert (deployment.model, deployment.replicas, deployment.max_retries) == ("some-model", 2, 5)
    assert (deployment.recovery_strategy, deployment.slow_nodes) == ("elastic_scaling", "drain")
    assert deployment.spares == 2
    assert (deployment.spec.degrees.tensor, deployment.spec.degrees.expert) == (2, 2)
    assert (deployment.spec.model_path, deployment.spec.dtype) == ("/models/some-model", "bfloat16")
    assert deployment.spec.backend == "nccl"
    assert config.timings().lease_ttl == 6
    assert config.node_names() == ("10.0.0.1", "10.0.0.2")
    assert config.cluster.nodes[1].devices == ["cuda:0", "cuda:1"]


def test_to_yaml_loads_to_an_equal_configuration(tmp_path: Path) -> None:
    config = ClusterConfig.load(write(tmp_path, WHOLE))
    assert ClusterConfig.load(write(tmp_path, config.to_yaml())) == config


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    config = ClusterConfig.load(write(tmp_path, ""))
    assert config == ClusterConfig.from_flags()
    assert (config.timings().failure_timeout, config.timings().heartbeat_interval) == (3.0, 0.5)


def test_replicas_fill_the_devices_unless_set(tmp_path: Path) -> None:
    nodes = "cluster: {nodes: [{host: a, devices: [0, 1, 2, 3]}, {host: b, devices: [0, 1, 2, 3]}]}\n"
    assert ClusterConfig.load(write(tmp_path, nodes + "parallelism: {tensor_parallel_size: 2}")).replicas == 4
    assert ClusterConfig.load(write(tmp_path, nodes + "parallelism: {data_parallel_size: 3}")).replicas == 3
    spares = "parallelism: {tensor_parallel_size: 2}\nfault_tolerance: {spares: 3}"
    assert ClusterConfig.load(write(tmp_path, nodes + spares)).replicas == 2


TWO = """
cluster: {nodes: [{host: a, devices: [0, 1]}, {host: b, devices: [0, 1]}]}
model: {path: /models/large, deployment: large}
parallelism: {tensor_parallel_size: 2, data_parallel_size: 1}
---
model: {path: /models/small, deployment: small}
parallelism: {data_parallel_size: 2}
"""


def test_a_file_may_hold_several_deployments(tmp_path: Path) -> None:
    records = [config.deployment() for config in ClusterConfig.load_all(write(tmp_path, TWO))]
    assert [(record.deployment, record.model, record.replicas) for record in records] == [
        ("large", "large", 1),
        ("small", "small", 2),
    ]
    assert [record.spec.degrees.tensor for record in records] == [2, 1]


def test_documents_without_content_describe_no_deployment(tmp_path: Path) -> None:
    """As `kubectl apply` sees it; the defaults' model in place of the one that is served is nobody's wish."""
    records = [config.deployment() for config in ClusterConfig.load_all(write(tmp_path, f"---\n# two\n{TWO}---\n"))]
    assert [record.deployment for record in records] == ["large", "small"]
    for nothing in ("", "# to be written\n", "---\n---\n", "{}"):
        with pytest.raises(ConfigError, match="describes no deployment"):
            ClusterConfig.load_all(write(tmp_path, nothing))


def test_where_one_is_wanted_several_are_refused(tmp_path: Path) -> None:
    assert problems(tmp_path, TWO) == [
        "cluster.yaml: holds 2 documents, one is wanted; `perdure ctl apply` takes several"
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "model: {path: /a/x}\n---\nmodel: {path: /a/y}",
            "cluster.yaml:3: model.deployment: 'main' stands in another document, too",
        ),
        (
            "model: {path: /a/x}\n---\nmodel: {path: /b/x, deployment: n}",
            "cluster.yaml:3: model.name: 'x' stands in another document, too",
        ),
        (
            "model: {path: /a/x}\n---\nmodel: {pat: /b/y}",
            "cluster.yaml:3: model.pat: is not a known key; did you mean 'path'?",
        ),
        ("model: {path: /a/x}\n---\n- y", "cluster.yaml:3: must hold a mapping of sections (cluster, model, …)"),
    ],
)
def test_what_is_wrong_in_a_later_document_is_named_with_its_line(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.load_all(write(tmp_path, text))
    assert [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems] == [found]


def test_disabled_fault_tolerance_means_no_retries_and_no_spares(tmp_path: Path) -> None:
    config = ClusterConfig.load(write(tmp_path, "fault_tolerance: {enable: false, max_retries: 7, spares: 1}"))
    assert (config.deployment().max_retries, config.deployment().spares) == (0, 0)


def test_nodes_of_one_host_are_numbered(tmp_path: Path) -> None:
    text = "cluster: {nodes: [{host: a, devices: [cpu:0]}, {host: a, devices: [cpu:0]}, {host: b, devices: [cpu:0]}]}"
    assert ClusterConfig.load(write(tmp_path, text)).node_names() == ("a-0", "a-1", "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "parallelism:\n  tensor_paralel_size: 2\n",
            "cluster.yaml:2: parallelism.tensor_paralel_size: is not a known key; did you mean 'tensor_parallel_size'?",
        ),
        (
            "paralelism: {}\n",
            "cluster.yaml:1: paralelism: is not a known key; did you mean 'parallelism'?",
        ),
        (
            "cluster:\n  nodes:\n    - host: a\n      devices: [cpu:0]\n      prots: [1]\n",
            "cluster.yaml:5: cluster.nodes[0].prots: is not a known key; did you mean 'ports'?",
        ),
        (
            "model:\n  dtype: bf16\n",
            "cluster.yaml:2: model.dtype: must be 'auto', 'float32', 'bfloat16' or 'float16', not 'bf16'",
        ),
        (
            "parallelism:\n\n  tensor_parallel_size: two\n",
            "cluster.yaml:3: parallelism.tensor_parallel_size: must be a valid integer, not 'two'",
        ),
        (
            "parallelism:\n  tensor_parallel_size: 0\n",
            "cluster.yaml:2: parallelism.tensor_parallel_size: must be greater than or equal to 1, not 0",
        ),
        (
            "cluster:\n  nodes:\n    - devices: [cpu:0]\n",
            "cluster.yaml:3: cluster.nodes[0].host: is missing",
        ),
        (
            "cluster:\n  nodes:\n    - {host: a, devices: [gpu0]}\n",
            "cluster.yaml:3: cluster.nodes[0].devices[0]: 'gpu0' does not have the form ^(cpu|cuda):[0-9]+$",
        ),
        (
            "cluster:\n  nodes:\n    - {host: a, devices: [cpu:0], ports: [70000]}\n",
            "cluster.yaml:3: cluster.nodes[0].ports[0]: must be less than or equal to 65535, not 70000",
        ),
        (
            "model: [1, 2]\n",
            "cluster.yaml:1: model: must be a valid dictionary or instance of ModelSection, not [1, 2]",
        ),
    ],
)
def test_wrong_value_is_named_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "cluster:\n  nodes: [{host: a, devices: [cpu:0, cpu:1]}]\n"
            "parallelism:\n  tensor_parallel_size: 2\n  pipeline_parallel_size: 2\n",
            "cluster.yaml:3: parallelism: tensor 2 × pipeline 2 × data 1 = 4 ranks, but the nodes have 2 devices",
        ),
        (
            "parallelism:\n  tensor_parallel_size: 4\n  expert_parallel_size: 3\n",
            "cluster.yaml:3: parallelism.expert_parallel_size: 3 does not divide tensor_parallel_size 4: "
            "experts lie across the tensor ranks of a stage",
        ),
        (
            "cluster:\n  nodes:\n    - {name: x, host: a, ports: [7800], devices: [cpu:0]}\n"
            "    - {name: y, host: a, ports: [7800], devices: [cpu:1]}\n",
            "cluster.yaml:4: cluster.nodes[1].ports[0]: a:7800 is already taken by cluster.nodes[0].ports[0]",
        ),
        (
            "monitoring: {metrics_port: 7799}\ncluster:\n  nodes:\n    - {host: a, devices: [cpu:0]}\n"
            "    - {host: a, ports: [7800], devices: [cpu:1]}\n",
            "cluster.yaml:1: monitoring.metrics_port[1]: a:7800 is already taken by cluster.nodes[1].ports[0]",
        ),
        (
            "cluster:\n  controlplanes:\n    - {host: a, port: 8000, http_port: 8000}\n",
            "cluster.yaml:3: cluster.controlplanes[0].http_port: a:8000 is already taken by "
            "cluster.controlplanes[0].port",
        ),
        (
            "cluster:\n  nodes:\n    - {name: x, host: a, devices: [cpu:0]}\n"
            "    - {name: x, host: b, devices: [cpu:0]}\n",
            "cluster.yaml:4: cluster.nodes[1]: is named 'x', as is cluster.nodes[0]",
        ),
        (
            "cluster:\n  nodes:\n    - {name: x, host: a, devices: [cuda:0]}\n    - {name: y, host: a, devices: [0]}\n",
            "cluster.yaml:4: cluster.nodes[1].devices: cuda:0 of a is cluster.nodes[0]'s",
        ),
        (
            "communication: {backend: nccl}\ncluster:\n  nodes: [{host: a, devices: [cpu:0]}]\n",
            "cluster.yaml:1: communication.backend: nccl needs cuda devices, but the nodes list only cpu devices",
        ),
        (
            "fault_tolerance:\n  heartbeat_interval: 1\n  failure_timeout: 3\n",
            "cluster.yaml:3: fault_tolerance.failure_timeout: failure_timeout (3 s) must be at least "
            "6 × heartbeat_interval (1 s)",
        ),
        (
            "communication:\n  timeout: 1\n",
            "cluster.yaml:2: communication.timeout: 1 s is less than the collective timeout that follows from "
            "failure_timeout (2.5 s): lower fault_tolerance.failure_timeout to at most 1.5 s",
        ),
        (
            "cluster:\n  etcd:\n    endpoints: [localhost]\n",
            "cluster.yaml:3: cluster.etcd.endpoints[0]: 'localhost' is not host:port",
        ),
    ],
)
def test_values_that_do_not_fit_each_other(tmp_path: Path, text: str, expected: str) -> None:
    assert problems(tmp_path, text) == [expected]


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    found = problems(tmp_path, "model:\n  dtype: x\n  pth: y\nmonitoring:\n  enable: 3\n")
    assert [problem.split(":")[1] for problem in found] == ["2", "3", "5"]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read: No such file or directory"):
        ClusterConfig.load(tmp_path / "nothing.yaml")
    assert problems(tmp_path, "model: [1\n")[0].startswith("cluster.yaml:2: is not YAML: ")
    assert problems(tmp_path, "- 1\n") == ["cluster.yaml:1: must hold a mapping of sections (cluster, model, …)"]
    assert problems(tmp_path, "model: {}\nmodel: {}\n") == ["cluster.yaml:2: model: stands here and on line 1"]
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read: is not UTF-8 text"):
        ClusterConfig.load(tmp_path / "binary.yaml")


def test_a_node_that_holds_itself_is_refused_not_followed(tmp_path: Path) -> None:
    assert problems(tmp_path, "model: &m\n  self: *m\n")[0].startswith("cluster.yaml:2: model.self: is not a known key")


def test_flags_win_and_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {dtype: float32}\n")
    dtype = ("model", "dtype")
    assert ClusterConfig.load(path, {dtype: Override("bfloat16", "--dtype")}).model.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"^--dtype: model\.dtype: must be 'auto'"):
        ClusterConfig.load(path, {dtype: Override("int3", "--dtype")})
    with pytest.raises(ConfigError, match=r"^--tp: parallelism\.tensor_parallel_size: must be greater"):
        ClusterConfig.from_flags({("parallelism", "tensor_parallel_size"): Override(0, "--tp")})


def test_a_deployments_name_is_one_that_the_leader_takes(tmp_path: Path) -> None:
    for name in ("Main", "a_b", "a.b", "-a", "a-", "a" * 64):
        (problem,) = problems(tmp_path, f"model: {{deployment: {name}}}")
        assert problem.startswith(f"cluster.yaml:1: model.deployment: '{name}' does not have the form ")
    assert ClusterConfig.load(write(tmp_path, f"model: {{deployment: {'a' * 61}-1}}")).model.deployment[-2:] == "-1"
