"""A run on a Ray cluster: several nodes of a real Ray, on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from whole import DEADLINE_S, LOOPBACK, Program, Run

from paramserver import notify
from paramserver.errors import UserError
from paramserver.launch.ray import Node, _engine, pack, place
from paramserver.launch.ray_actor import Actor
from paramserver.settings import Settings

SMALL = ("dataset.name=digits", "model.hidden=16", "track_gradients=false", "digest_steps=0")
NODES = [Node("a", "10.0.0.1", "mini1"), Node("b", "10.0.0.2", "mini2")]


def test_workers_go_one_to_each_node_then_round_again() -> None:
    assert [node.name for node in place(NODES, 2)] == ["mini1", "mini2"]
    assert [node.name for node in place(NODES, 3)] == ["mini1", "mini2", "mini1"]
    assert [node.name for node in place(NODES, 1)] == ["mini1"]


def test_the_code_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk, there = tmp_path / "desk", tmp_path / "there"
    desk.mkdir()
    (desk / "ray_nets.py").write_text("import ray_layers\n")
    (desk / "ray_layers.py").write_text("")
    (desk / "film.mov").write_text("")
    monkeypatch.syspath_prepend(desk)
    pack(Settings(model={"type": "ray_nets:Net"}), there)
    assert {"paramserver", "workers", "ray_nets.py", "ray_layers.py"} <= {*os.listdir(there)}
    assert not (there / "film.mov").exists()
    assert (there / "paramserver/tensors/codec/float16.py").exists()
    assert not list(there.rglob("__pycache__"))


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError) as caught:
        _engine()
    assert "pip install 'ray>=2.40'" in caught.value.hint


def test_a_line_that_comes_while_others_are_told_is_told_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actor = Actor()
    actor._notify = Path("notify")
    actor._lines.append("first")

    def read(path: Path) -> notify.Notice:
        actor._lines.append("later")
        return notify.Notice()

    with monkeypatch.context() as patch:
        patch.setattr(notify, "read", read)
        born, seen, lines, _ = actor.said("", 0)
    assert (seen, lines) == (1, ["first"])
    assert actor.said(born, seen)[1:3] == (2, ["later"])


# ------------------------------------------------------------------------------------- a real Ray


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes, each as big as a small machine."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.40'")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", place)  # its sockets, whose names must be short
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            # Another address: as a machine of its own, for the launcher.
            cluster.add_node(**node, node_ip_address="127.0.0.2")
            cluster.wait_for_nodes()
            yield cluster.address
        finally:
            cluster.shutdown()


def programs(words: str) -> list[psutil.Process]:
    """The processes under Ray with these words in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "paramserver.launch.die_with_parent" in line and words in line:
            found.append(process)
    return found


@pytest.mark.timeout(300)  # many processes import torch
def test_a_run_whose_actors_are_killed(address: str, tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        ray = run.start(
            "the launcher", "-m", "paramserver.launch", "ray", *SMALL, f"port={run.port}",
            "num_epochs=10000", "heartbeat_timeout=3", "observer=false",
            RAY_ADDRESS=address,
        )  # fmt: skip
        placed = ray.wait_for("Ray: the server on")
        assert re.search(r"worker 1 on \S+, worker 2 on \S+$", placed)
        ray.wait_for(
            rf"server at {LOOPBACK}:{run.port}, \S+:{run.port}, run folder {tmp_path}/runs/"
        )
        ray.wait_for(r"step [1-9]")
        [second] = programs(f"workers id=2 port={run.port}")
        nodes = {node_of(p) for n in (1, 2) for p in programs(f"workers id={n} port={run.port}")}
        assert len(nodes) == 2  # one on each
        actor = second.parent()
        actor.kill()
        psutil.wait_procs([second], DEADLINE_S)
        assert not second.is_running()  # it went with its actor
        ray.wait_for("worker 2 died: Ray has started it again")
        ray.wait_for(r"worker 2 \(.*\) took a snapshot of step [1-9]")

        [server] = programs("paramserver.launch.die_with_parent paramserver cluster=")
        server.kill()
        ray.wait_for("the server died: Ray has started it again")
        ray.wait_for("this run has not ended: waiting for its replicas to come back")
        ray.wait_for(r"training, step [1-9]")

        ray.send(signal.SIGINT)
        ray.wait_for("ending the run in order")
        assert ray.end() == 0
        assert "stopped from outside (SIGTERM)" in ray.output and re.search(
            r"worker 2 +│", ray.output
        )
        assert json.loads((run.runs[-1] / "run.json").read_text())["ended"]
        steps = [line["step"] for line in run.steps()]
        assert steps == [*range(1, len(steps) + 1)]  # one run, nothing lost
        assert len(run.runs) == 1
    assert programs(f"port={run.port}") == [] and programs(str(tmp_path)) == []


def node_of(program: psutil.Process) -> int:
    """The raylet, one for each node, whose descendant it is."""
    return next(p.pid for p in program.parents() if p.name() == "raylet")


def test_a_mistake_is_told_with_code_2(address: str, tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        ray: Program = run.start(
            "the launcher", "-m", "paramserver.launch", "ray", "optimiser=SGD", RAY_ADDRESS=address
        )
        assert ray.end() == 2
        assert "did you mean `optimizer`?" in ray.output
