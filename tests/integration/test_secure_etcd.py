"""A whole cluster on an etcd that demands certificates and a user, and what becomes of it when the password changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc.aio
import pytest
import trustme

from controlplane.runtime.etcd_server import EtcdTls
from protos.perdure.v1 import admin_pb2, admin_pb2_grpc
from tests.support.cluster import ROOT, Cluster, eventually
from tests.support.etcd import etcdctl, pem_files
from tests.support.models import tiny_model
from tests.support.streams import start_wave

pytestmark = [pytest.mark.cluster, pytest.mark.chaos]

PASSWORD = "secret"
WRONG = "invalid user ID or password"


async def test_certificates_and_a_password_that_changes(tmp_path: Path) -> None:
    authority, ca = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    server = pem_files(authority.issue_cert("127.0.0.1"), tmp_path / "server")
    cert, key = pem_files(authority.issue_cert("perdure"), tmp_path / "ours")
    password = tmp_path / "password"
    password.write_text(PASSWORD)
    known_by = {
        "ca_file": str(ca),
        "cert_file": str(cert),
        "key_file": str(key),
        "username": "root",
        "password_file": str(password),
    }
    tls = EtcdTls(ca, *server, clients_show_certificates=True)
    model = tiny_model(tmp_path, "llama", max_position_embeddings=1024)
    cluster = Cluster(tmp_path / "cluster", model, workers=1, tls=tls, etcd=known_by)

    def control(*arguments: str, given: str = "") -> None:
        etcdctl(cluster.etcd, f"--cacert={ca}", f"--cert={cert}", f"--key={key}", *arguments, given=given)

    def change_password(old: str, new: str) -> None:
        control(f"--user=root:{old}", "user", "passwd", "root", "--interactive=false", given=f"{new}\n")

    async def assert_serves() -> None:
        (stream,) = await start_wave(cluster.address(), cluster.url(), 1, 8).finish()
        assert stream.finish, stream.error

    await cluster.etcd.start()
    control("user", "add", "root", f"--new-user-password={PASSWORD}")
    control("user", "grant-role", "root", "root")
    control("auth", "enable")
    try:
        await cluster.start()
        await assert_serves()

        # Whoever is signed in goes on, until a write is refused and it has to sign in again.
        change_password(PASSWORD, "other")
        with pytest.raises(grpc.aio.AioRpcError, match=WRONG):
            await scale(cluster)
        assert WRONG in (await cluster.status())["limited"]["text"]
        await assert_serves()
        assert all(daemon.running for daemon in cluster.daemons())
        _assert_refused(cluster)

        change_password("other", PASSWORD)
        await eventually("changes are taken again", lambda: scale(cluster))
        assert "limited" not in await cluster.wait_ready()
        await assert_serves()
    finally:
        await cluster.stop()


async def scale(cluster: Cluster) -> bool:
    """To what it is: something is written all the same. Raises AioRpcError if not."""
    async with grpc.aio.insecure_channel(cluster.address()) as channel:
        stub = admin_pb2_grpc.AdminStub(channel)
        await stub.Scale(admin_pb2.ScaleRequest(deployment="main", replicas=1), timeout=10)
        return True


def _assert_refused(cluster: Cluster) -> None:
    """A daemon that starts now ends with one line that says why."""
    started = subprocess.run(
        [sys.executable, "-m", "dataplane", "--config", str(cluster.folder / "cluster.yaml"), "--node", "w0"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert started.returncode != 0
    assert WRONG in started.stderr
