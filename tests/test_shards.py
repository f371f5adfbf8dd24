"""Shards beside the workers, each on a host of its own: whole runs over shaped cables."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from whole import DEADLINE_S, Program, Run, shards_of

from benchmarks.network import Hosts
from benchmarks.runs import Limits, Place, exchange
from paramserver.net import link_watch
from paramserver.net.link_watch import Chosen

GRADIENT_BYTES = 4 * 337_674
RATE = 20e6 / 8
"""Bytes a second that each cable carries."""
NAMES = ["mini1", "mini2", "mini3"]
LINES = 5  # of the server, during which bytes are counted
LOOKS = 5
SMALL = ["bucket_mb=0.01", "observer=false", "num_epochs=9999", "digest_steps=5"]


class Cluster:
    """A server beside worker 1, and two workers on hosts of their own."""

    def __init__(
        self,
        hosts: Hosts,
        run: Run,
        folder: Path,
        security: str,
        *more: str,
        far: str = "",
        paths: str = "",
    ) -> None:
        """`far`: a setting of the workers on hosts of their own. `paths`: what was measured."""
        self.run, self.hosts = run, hosts
        address = f"host_ip={hosts.address('mini1')}"
        keys = {"XDG_CONFIG_HOME": str(folder / "mini1")}
        measured = {link_watch.VARIABLE: paths} if paths else {}
        near, token = [f"security={security}"], dict[str, str]()
        self.server = run.server(
            *(address, "num_workers=3", *near, *SMALL, *more),
            host=hosts["mini1"],
            **keys,
            **measured,
        )
        if security == "curve":
            told = self.server.wait_for("other machines join with: ")
            token = {"PARAMSERVER_JOIN": told.rpartition("=")[2].strip()}
        others = ([] if token else [address, *near]) + ([far] if far else [])
        self._others, self._token = others, token
        self.workers = [run.worker(1, address, *near, host=hosts["mini1"], **keys)]
        for number in (2, 3):
            host = hosts[NAMES[number - 1]]
            self.workers.append(run.worker(number, *others, host=host, **token))

    def add(self, number: int, host: str) -> None:
        """Another worker on a host that has one."""
        self.workers.append(
            self.run.worker(number, *self._others, host=self.hosts[host], **self._token)
        )

    def end(self) -> None:
        """All end in order, with equal weights."""
        self.server.send(signal.SIGINT)
        programs = [self.server, *self.workers]
        assert [p.end() for p in programs] == [0] * len(programs)
        summary = self.run.summary()
        assert summary["replicas_equal"] and len(summary["digests"]) >= len(self.workers)


@contextmanager
def cluster(
    folder: Path, security: str, *more: str, far: str = "", rates: Sequence[float] = ()
) -> Iterator[Cluster]:
    """`rates`: what `make up` has measured of the paths of workers 2 and 3."""
    # A slow cable leaves the processors idle, which the processes of the shards need to begin.
    with Hosts(NAMES, rate="20mbit", burst="64kb") as hosts, Run(folder) as run:
        there = hosts.address(NAMES[0])
        paths = [
            Chosen(number, hosts.address(NAMES[number - 1]), there, rate)
            for number, rate in enumerate(rates, 2)
        ]
        told = link_watch.write(paths) if paths else ""
        yield Cluster(hosts, run, folder, security, *more, far=far, paths=told)


def forebears(shard: psutil.Process) -> set[int]:
    return {p.pid for p in shard.parents()}


def one_that_averages(there: Cluster) -> tuple[psutil.Process, Program]:
    """The one shard of this run, once it averages beside the server, and its worker."""
    there.server.wait_for("several average the gradients: 50 % itself, 50 % ")
    there.server.wait_for("training, step")
    [shard] = shards_of(there.workers)
    [owner] = [w for w in there.workers if w.process.pid in forebears(shard)]
    return shard, owner


def folder_of(shard: psutil.Process) -> Path:
    """Where the memory lies that this shard shares."""
    [folder] = {
        Path(m.path).parent
        for m in shard.memory_maps()
        if m.path.startswith("/dev/shm/paramserver-") and m.path.endswith("/ring")
    }
    return folder


def received(program: Program, interface: str) -> int:
    """Bytes that have come in at this interface of a program's host."""
    lines = Path(f"/proc/{program.process.pid}/net/dev").read_text().splitlines()
    [line] = [line for line in lines if line.strip().startswith(f"{interface}:")]
    return int(line.split()[1])


def bytes_of_a_step(there: Cluster, most: float) -> float:
    """That go through the loopbacks of the hosts without the server in each step: a shard may be at
    any of them. At most so many, as soon as a step lies behind in which a shard was new."""

    def look() -> tuple[int, int]:
        line = there.server.wait_for(r"training, step \d+")
        found = re.search(r"step (\d+)", line.replace(",", ""))
        assert found is not None
        return int(found[1]), sum(received(program, "lo") for program in there.workers[1:])

    for _ in range(LOOKS):
        (first, before), (last, after) = look(), look()
        found = (after - before) / (last - first)
        if found < most:
            break
    return found


def to_the_third(there: Cluster, at: Program, most: float) -> float:
    """The bytes that come over the cable of this program's host, in proportion to those that come
    in the same time to the third host, which has one replica: at most so many, as soon as the
    relays are found."""
    hosts = at, there.workers[2]
    for _ in range(LOOKS):
        before = [received(program, "eth0") for program in hosts]
        for _ in range(LINES):
            there.server.wait_for("training, step")
        came = [received(p, "eth0") - b for p, b in zip(hosts, before, strict=True)]
        found = came[0] / came[1]
        if found < most:
            break
    return found


@pytest.mark.root
@pytest.mark.parametrize("security", ["none", "curve"])
def test_shards_on_three_hosts_average_as_one_server_does(tmp_path: Path, security: str) -> None:
    with cluster(tmp_path, security, "shards=3") as there:
        there.server.wait_for("several average the gradients: 33 % itself, 33 % .*, 33 % ")
        for _ in range(3):
            there.server.wait_for("training, step")
        shards = shards_of(there.workers)
        assert len(shards) == 2
        folders = [folder_of(shard) for shard in shards]
        little = GRADIENT_BYTES / 10  # without shared memory it is two thirds of it
        assert bytes_of_a_step(there, little) < little
        there.end()
        assert not any(map(psutil.Process.is_running, shards))
        assert not any(map(Path.exists, folders))


@pytest.mark.root
@pytest.mark.long
def test_weights_have_the_same_bits_whoever_averages(tmp_path: Path) -> None:
    """A deterministic run on three hosts, with shards that come in its midst; and on one host."""
    short = ["deterministic=true", "dataset.name=digits", "num_epochs=1", "batch_size=32"]
    with cluster(tmp_path, "none", *short) as there:
        there.server.wait_for("several average the gradients: 33 % itself, 33 % .*, 33 % ")
        assert [p.end() for p in (there.server, *there.workers)] == [0, 0, 0, 0]
        shared = there.run.summary()
    here = tmp_path / "here"
    here.mkdir()
    with Run(here) as run:
        programs = [run.server("num_workers=3", *SMALL, *short)]
        programs += [run.worker(number) for number in (1, 2, 3)]
        assert [p.end() for p in programs] == [0, 0, 0, 0]
        alone = run.summary()
    assert (alone["steps"], alone["digests"]) == (shared["steps"], shared["digests"])


@pytest.mark.root
def test_a_worker_that_leaves_takes_nothing_with_it_that_others_lack() -> None:
    """The averages of the last step are still on their way to one host when the workers on the
    others, beside which they were made, are done with their own loops and leave."""
    names = ["host1", "host2", "host3"]
    with Hosts(names, rate="20mbit", burst="64kb") as hosts:
        hosts.throttle("host3", "4mbit", outwards=False)
        limits = Limits(DEADLINE_S, 1)
        try:
            exchange(limits, "1.35 MB", len(names), "float32", Place(hosts), shards=len(names))
        finally:
            multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.root
def test_where_memory_cannot_be_shared_a_shard_is_reached_through_its_socket(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path, "none", "shards=2", far="shared_memory=false") as there:
        there.server.wait_for("several average the gradients: 50 % itself, 50 % ")
        assert bytes_of_a_step(there, GRADIENT_BYTES / 2) > GRADIENT_BYTES / 2
        there.end()


@pytest.mark.root
def test_shares_follow_what_make_up_has_measured(tmp_path: Path) -> None:
    with cluster(tmp_path, "none", "shards=3", rates=[0.8 * RATE, 0.6 * RATE]) as there:
        measured = "several average the gradients: [^,]*, [^,]*, [^,]*, as their cables were"
        there.server.wait_for(measured)
        for _ in range(3):
            there.server.wait_for("training, step")
        there.end()


@pytest.mark.root
def test_a_shard_that_is_killed_costs_its_round_and_is_replaced(tmp_path: Path) -> None:
    with cluster(tmp_path, "none", "shards=2", "heartbeat_timeout=3") as there:
        first, _ = one_that_averages(there)
        folder = folder_of(first)
        os.kill(first.pid, signal.SIGKILL)
        there.server.wait_for(r"shard 1 on .* is gone: .*; others average its part")
        there.server.wait_for("carries shard 2")
        there.server.wait_for("several average the gradients: 50 % itself, 50 % ")
        little = GRADIENT_BYTES / 10
        assert bytes_of_a_step(there, little) < little
        assert not folder.exists(), "its memory is not left behind"
        there.end()


@pytest.mark.root
def test_what_topk_leaves_out_follows_a_bucket_whose_worker_leaves(tmp_path: Path) -> None:
    with cluster(tmp_path, "none", "shards=2", "codec_down=topk") as there:
        _, owner = one_that_averages(there)
        owner.send(signal.SIGINT)
        assert owner.end() == 0
        there.workers.remove(owner)
        there.server.wait_for("carries shard 2")
        there.server.wait_for("several average the gradients: 50 % itself, 50 % ")
        there.server.wait_for("training, step")
        there.end()
        assert "had left out" not in there.server.output, "nothing is lost"


@pytest.mark.root
def test_a_worker_that_is_killed_takes_its_shard_with_it(tmp_path: Path) -> None:
    with cluster(tmp_path, "none", "shards=2", "heartbeat_timeout=3") as there:
        shard, owner = one_that_averages(there)
        folder = folder_of(shard)
        owner.process.kill()
        shard.wait(DEADLINE_S)
        assert not folder.exists()
        there.server.wait_for("carries shard 2")
        there.server.wait_for("training, step")
        owner.end()
        there.workers.remove(owner)
        there.end()


@pytest.mark.root
@pytest.mark.parametrize(
    ("security", "far"), [("none", ""), ("curve", ""), ("none", "shared_memory=false")]
)
def test_what_others_average_crosses_the_cable_of_a_host_once(
    tmp_path: Path, security: str, far: str
) -> None:
    with cluster(tmp_path, security, "shards=3", "observer=true", far=far) as there:
        there.add(4, "mini2")
        there.server.wait_for(r"worker 4 \(.*\) took a snapshot")  # only then there are copies
        there.server.wait_for("several average the gradients: 33 % itself, 33 % .*, 33 % ")
        # To the third host: what three send for a third of the buckets, and two thirds of the
        # averages. To the server's the same, for two replicas there; without a relay 1.4 times.
        assert to_the_third(there, there.workers[0], 1.2) < 1.2
        # To the second: what two elsewhere send, and two thirds of the averages; 0.8, not 1.2.
        assert to_the_third(there, there.workers[1], 1.0) < 1.0
        there.end()


@pytest.mark.root
def test_who_hears_a_relay_that_is_killed_gets_its_own_copies(tmp_path: Path) -> None:
    with cluster(tmp_path, "none", "shards=3", "heartbeat_timeout=3") as there:
        there.add(4, "mini2")
        there.server.wait_for(r"worker 4 \(.*\) took a snapshot")
        there.server.wait_for("several average the gradients: 33 % itself, 33 % .*, 33 % ")
        assert to_the_third(there, there.workers[1], 1.0) < 1.0  # without a relay 1.2
        relay = there.workers.pop(1)
        relay.process.kill()
        there.server.wait_for("training, step")
        there.server.wait_for("training, step")
        relay.end()
        there.end()
