"""The machines that conf/cluster.yaml names, in both spellings."""

from __future__ import annotations

from pathlib import Path

import pytest

from paramserver.config.loading import load
from paramserver.errors import UserError
from paramserver.fleet.processes import machines
from paramserver.net import hosts
from paramserver.net.hosts import Host

THREE = """
hosts:
  - {name: mini1, ssh: mini1, ip: 10.10.0.1, role: server}
  - {name: mini2, ssh: user@mini2.local, ip: 10.10.0.2}
  - {name: pi5, ssh: pi5, device: cpu}
"""


def loaded(tmp_path: Path, text: str, *arguments: str) -> tuple[Host, ...]:
    """The machines of a cluster file."""
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    settings = load([f"cluster={path}", *arguments], "server").settings
    return hosts.read(settings.hosts)


def test_a_list_of_machines(tmp_path: Path) -> None:
    assert loaded(tmp_path, THREE) == (
        Host("mini1", "mini1", ip="10.10.0.1", role="server"),
        Host("mini2", "user@mini2.local", ip="10.10.0.2", id=1),
        Host("pi5", "pi5", device="cpu", id=2),
    )


def test_the_short_spelling_says_the_same(tmp_path: Path) -> None:
    short = """
        server: mini1
        workers: [{name: mini2, ssh: user@mini2.local}, {name: pi5, device: cpu}]
        host_ip: {mini1: 10.10.0.1, mini2: 10.10.0.2}
        """
    assert loaded(tmp_path, short) == loaded(tmp_path, THREE)


def test_a_server_that_is_a_worker_too_is_both(tmp_path: Path) -> None:
    short = "server: mini1\nworkers: [mini1, mini2]\n"
    assert [(h.name, h.role, h.id) for h in loaded(tmp_path, short)] == [
        ("mini1", "both", 1),
        ("mini2", "worker", 2),
    ]


def test_addresses_may_stand_beside_the_list(tmp_path: Path) -> None:
    text = "hosts: [{name: a, role: both}, {name: b}]\nhost_ip: {b: 10.0.0.2}\n"
    assert [h.ip for h in loaded(tmp_path, text)] == [None, "10.0.0.2"]


def test_an_address_for_this_process_goes_beside_the_machines(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text(THREE)
    loaded = load([f"cluster={tmp_path / 'cluster.yaml'}", "host_ip=10.10.0.1"], "server")
    assert loaded.settings.host_ip == "10.10.0.1"
    assert loaded.settings.hosts is not None and len(loaded.settings.hosts) == 3


def test_numbers_that_are_given_are_left_out_of_the_rest() -> None:
    entries = [{"name": "a", "role": "both", "id": 2}, {"name": "b"}, {"name": "c"}]
    assert [host.id for host in hosts.read(entries)] == [2, 1, 3]


def test_several_workers_of_one_machine_have_numbers_in_a_row() -> None:
    entries = [
        {"name": "a", "role": "both", "workers": 2},
        {"name": "b", "id": 3},
        {"name": "c", "workers": 2},
        {"name": "d"},
    ]
    found = {h.name: [(p.name, p.id, p.rank) for p in h.processes] for h in hosts.read(entries)}
    assert found == {
        "a": [("worker-1", 1, 0), ("worker-2", 2, 1)],
        "b": [("worker", 3, 0)],
        "c": [("worker-1", 4, 0), ("worker-2", 5, 1)],
        "d": [("worker", 6, 0)],
    }
    first = hosts.read(entries)[0]
    assert [first.spoken(name) for name in ("worker-2", "server", "worker")] == [
        "worker 2", "server", "worker",
    ]  # fmt: skip


def test_machines_that_are_typed() -> None:
    file = [
        {"name": "mini1", "ip": "10.10.0.1", "role": "server"},
        {"name": "pi5", "device": "cpu"},
    ]
    assert hosts.choose("mini2:2, me@mini3.local", None) == [
        {"name": "mini2", "ssh": "mini2", "workers": 2, "role": "both"},
        {"name": "mini3.local", "ssh": "me@mini3.local"},
    ]
    assert hosts.choose("pi5,mini1", file) == [file[1], file[0]]  # as the file has them
    assert hosts.choose("pi5", file) == [file[1] | {"role": "both"}]
    for wrong in ("a:b", "a:0", "a:" + "9" * 5000, "@", "me@", ":2", ","):
        with pytest.raises(UserError, match="no machine"):
            hosts.choose(wrong, None)


def test_without_machines_there_are_none(tmp_path: Path) -> None:
    assert loaded(tmp_path, "port: 65432\n") == ()
    assert loaded(tmp_path, "hosts: []\n") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hosts: 7", "hosts must be a list"),
        ("hosts: [{name: a}]", "hosts has no server"),
        ("hosts: [{name: a, role: server}]", "hosts has no worker"),
        ("hosts: [{name: a, role: server}, {name: b, role: both}]", "has 2 servers: a, b"),
        ("hosts: [{name: a, role: both}, {name: a}]", "hosts names a twice"),
        ("hosts: [{name: a, role: both, id: 1}, {name: b, id: 1}]", "gives id 1 to two"),
        ("hosts: [{name: [a]}]", "hosts holds {name: [a]}"),
        ("hosts: [null]", "hosts holds null"),
        ("hosts: [{name: a, role: both, id: 65535, workers: 2}]", "a.id of the last of its 2"),
        ("server: [a]\nworkers: [b]", "hosts holds {name: [a]"),
        ("server: a\nworkers: [[b]]", "hosts holds {name: [b]"),
        ("hosts: [{ssh: a}]", "hosts holds {ssh: a}"),
        ("hosts: [{name: a, role: both, adress: 1.2.3.4}]", "a has an unknown `adress`"),
        ("hosts: [{name: a, role: boss}]", "a.role must be server, worker or both"),
        ("hosts: [{name: a, role: both, ip: mini1}]", "a.ip must be an address"),
        ("hosts: [{name: a, role: both, ssh: -oProxyCommand=x}]", "a.ssh must be what you type"),
        ("hosts: [{name: a, role: both, ssh: a b}]", "a.ssh must be what you type"),
        ("hosts: [{name: 'a;b', role: both}]", "a;b.name must be a plain word"),
        ("hosts: [{name: a, role: both, device: gpu}]", "a.device must be auto"),
        ("hosts: [{name: a, role: both, threads: 0}]", "a.threads must be 1"),
        ("hosts: [{name: a, role: both, restart: -1}]", "a.restart must be 0"),
        ("hosts: [{name: a, role: both, workers: 0}]", "a.workers must be 1 to 64"),
        ("hosts: [{name: a, role: both, workers: 2}, {name: b, id: 2}, {name: c, id: 2}]", "id 2"),
        ("hosts: [{name: a, role: both, id: one}]", "a.id must be a whole number"),
        ("hosts: [{name: a, role: both, folder: ../x}]", "a.folder must be below"),
        ("hosts: [{name: a, role: both, folder: '~other/x'}]", "a.folder must be below"),
        ("hosts: [{name: a, role: both, folder: /}]", "a.folder must be below"),
        ("server: a\nworkers: b", "`workers` must be a list"),
        ("workers: [b]", "there is `workers` and no `server`"),
        ("server: a\nhosts: [{name: a, role: both}]", "both `hosts` and `server`"),
        ("server: a\nworkers: [b]\nhost_ip: {c: 1.2.3.4}", "has an address for c"),
        ("host_ip: {c: 1.2.3.4}", "host_ip must be text"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        loaded(tmp_path, text)
    assert said in raised.value.problem
    assert "cluster.yaml" in raised.value.problem


def test_machines_that_are_named_twice_are_an_error() -> None:
    with pytest.raises(UserError, match="the machines are given twice: hosts=a and hosts=b"):
        machines(["hosts=a", "hosts=b"])
