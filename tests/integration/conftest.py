"""Fixtures of the tests against real servers."""

from tests.support.etcd import client, etcd, etcd_members, keys, own_etcd

__all__ = ["client", "etcd", "etcd_members", "keys", "own_etcd"]
