"""Servers at IPv6 addresses and at names, end to end: what a person gives as host_ip, or to join,
leads there, or is refused as what it is."""

from __future__ import annotations

import socket
import sys
from contextlib import closing
from pathlib import Path

import pytest
from whole import Run

from benchmarks.network import Hosts

SCRIPT = """
import sys

import torch
from torch.utils.data import TensorDataset

from paramserver import join

model = torch.nn.Linear(4, 2)
cluster = join(*sys.argv[1:])
model, optimizer = cluster.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
data = TensorDataset(torch.randn(32, 4), torch.zeros(32, dtype=torch.long))
for x, y in cluster.batches(data, batch_size=8):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
print(f"trained {cluster.step} steps with the server at {cluster.host}")
cluster.leave()
"""
SETTINGS = ("observer=false", "num_workers=1", "num_epochs=1", "page=false")


def has_ipv6() -> bool:
    try:
        with closing(socket.socket(socket.AF_INET6, socket.SOCK_STREAM)) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@pytest.mark.parametrize(
    ("host_ip", "dialled"),
    [
        pytest.param("::1", "::1", marks=needs_ipv6),
        pytest.param("[::1]", "[::1]", marks=needs_ipv6),
        pytest.param("::", "::1", marks=needs_ipv6),
        ("localhost", "localhost"),
    ],
)
def test_a_server_at_an_address_of_this_host(tmp_path: Path, host_ip: str, dialled: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    with Run(tmp_path) as run:
        keys = {"XDG_CONFIG_HOME": str(tmp_path)}
        server = run.server(f"host_ip={host_ip}", *SETTINGS, **keys)
        said = server.wait_for("server at")
        port = {"PARAMSERVER_PORT": str(run.port)}
        worker = run.start("the script", "train.py", dialled, **port, **keys)
        assert worker.end() == 0 and "trained 4 steps" in worker.output
        assert server.end() == 0
    if host_ip.strip("[]") == "::1":
        assert f"127.0.0.1:{run.port}, [::1]:{run.port}, run folder" in said


@needs_ipv6
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system finds an interface")
def test_an_address_of_one_cable_is_asked_for_its_interface(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("host_ip=fe80::1", *SETTINGS, XDG_CONFIG_HOME=str(tmp_path))
        assert server.end() == 2
    assert "fe80 addresses are of one cable or network each" in server.output
    assert "host_ip=fe80::1%eth0" in server.output


@pytest.mark.root
@needs_ipv6
@pytest.mark.parametrize("listens", ["the address", "::"])
def test_a_worker_on_another_machine_comes_by_ipv6(tmp_path: Path, listens: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    with Hosts(["mini1", "mini2"]) as hosts, Run(tmp_path) as run:
        address = hosts.give_ipv6("mini1")
        hosts.give_ipv6("mini2")
        here = f"host_ip={address if listens == 'the address' else '::'}"
        keys = {"XDG_CONFIG_HOME": str(tmp_path)}
        server = run.server(here, *SETTINGS, host=hosts["mini1"], **keys)
        token = server.wait_for("other machines join with: ").rpartition("=")[2]
        words = ["train.py"] if listens == "the address" else ["train.py", address]
        worker = run.start("the script", *words, host=hosts["mini2"], PARAMSERVER_JOIN=token)
        assert worker.end() == 0
        assert f"trained 4 steps with the server at {address}" in worker.output
        assert server.end() == 0
