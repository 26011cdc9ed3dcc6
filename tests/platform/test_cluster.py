"""What a client sets before it talks to a head."""

import json
import os

import pytest

from haltscale.platform import cluster

(SWITCH,) = cluster.LOOPBACK_ONLY


@pytest.mark.parametrize(
    ("address", "on_loopback"),
    [("", True), ("127.0.0.1:6379", True), ("localhost:6379", True), ("10.0.0.5:6379", False)],
)
def test_only_a_client_of_a_local_head_keeps_to_loopback(monkeypatch, home, address, on_loopback):
    """On a cluster of many nodes, a driver that took itself for 127.0.0.1 would be found by nobody."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop(SWITCH, None)
    if address:
        os.environ["RAY_ADDRESS"] = address
    cluster.prepare_client()
    assert (SWITCH in os.environ) is on_loopback


def test_a_head_that_is_gone_is_not_found(home):
    home.mkdir()
    (gone,) = cluster.free_ports(1)
    head = {"dashboard": f"http://127.0.0.1:{gone}", "gcs": f"127.0.0.1:{gone}", "temp_dir": "/tmp/x"}
    (home / "cluster.json").write_text(json.dumps(head))
    assert cluster.find_head() is None
