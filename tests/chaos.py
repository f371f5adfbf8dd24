"""Whole trainings of real processes that are killed, stopped, started again and disturbed.

    make chaos MINUTES=10 SEED=7      faults of every kind, ending in a table
    make chaos ARGS="shares=speed local_steps=8"    the same with further settings of the run
    make chaos ARGS=shards=3          shards beside workers 2 and 3 are killed and stopped, too
    make soak ROUNDS=100000           workers come and go; memory and descriptors must stay flat

As root on Linux each worker has a machine of its own (a network namespace), and cables are cut.
Elsewhere all are on one machine, where there are no shards.

The seed chooses which fault comes when; what the processes make of it is never twice the same.
Exit code 1 where a promise was broken: a closed step lost, samples applied twice or silently never,
a run that stands still, replicas that differ, memory that grows, something left behind.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
import psutil
import zmq
from strangers import bother
from whole import LOOPBACK, Program, Run, children, private_folders, shards_of

from benchmarks.network import Hosts, move_to
from paramserver.net.address import keys_of
from paramserver.net.jointoken import decode
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import Ledger, optimizer_steps
from paramserver.transport import sockets

STANDSTILL_S = 120.0
SHARED = Path("/dev/shm")
AVERAGING = "the server lets several average"
UNDISTURBED_S = 1800.0
SILENCE_S = 3  # heartbeat_timeout of the run
WORKERS = (1, 2, 3)
FAULTS = {
    "worker killed": 4,
    "worker stopped": 3,
    "worker asked to leave": 2,
    "server killed": 2,
    "server and worker killed": 2,
    "server stopped": 1,
    "observer killed": 1,
    "second worker of one id": 1,
    "stranger at the ports": 2,
}
CABLES = {"cable out": 3, "cable out in one direction": 3}  # where there are cables
SHARDS = {
    "shard killed": 3,
    "shard stopped": 3,
    "machine stopped": 2,
    "shard and a worker elsewhere killed": 2,
}  # where there are shards
SHARDS_CUT = "bucket_mb=0.02"  # so that each shard has some
OUT_S = (1.0, 3.0, 3.0, 15.0, 60.0)
COMING_AND_GOING = {"worker killed": 4, "worker stopped": 3, "worker asked to leave": 2}
HOSTS = ["mini1", "mini2", "mini3"]
OBSERVERS_KILLED = 2  # by one server; it gives up an observer that ends too often
ACCURACY_LOSS = 0.02
BASELINE_EPOCHS = 15
GROWTH, GROWTH_BYTES = 1.05, 16 * 2**20


class Broken(Exception):
    """A promise was not kept."""


def _stands(program: Program) -> str:
    """Its exit code, or the innermost frames of its main thread."""
    if (code := program.process.poll()) is not None:
        return f"ended with {code}"
    if not isinstance(program.process, forked.Process):
        return "runs"
    program.send(signal.SIGUSR1)
    with suppress(AssertionError):
        program.wait_for(r"File .* in <module>")
    main = program.output.rpartition("Current thread")[2]
    frames = re.findall(r'File "[^"]*?([^"/]+)", line (\d+) in (\S+)', main)
    return "runs in " + " < ".join(f"{file}:{line} {name}" for file, line, name in frames[:8])


@dataclass
class Tally:
    """The rows of the table."""

    faults: Counter[str] = field(default_factory=Counter)
    steps_lost: int = 0
    longest_pause_s: float = 0.0
    after: str = "the start"


class Watch(threading.Thread):
    """Reads the closes of a run, as a monitor may, and checks each one's ledger."""

    def __init__(self, port: int, host: str | None = None, token: str = "") -> None:
        """On another `host`, with the join `token` of the server there."""
        super().__init__(name="watch", daemon=True)
        joined = decode(token) if token else None
        self._address = joined.hosts[0] if joined else LOOPBACK
        self._keys = keys_of(joined) if joined else None
        self._host = host
        self.step = self.step_before = self.contributors = 0  # optimizer steps
        self.problem: str | None = None
        self.longest_s, self.before_longest = 0.0, "the start"
        self.fault = "the start"
        self._over = threading.Event()
        self._port = port
        self._closed = threading.Condition()
        self._count = 0

    def run(self) -> None:
        if self._host is not None:
            move_to(self._host)  # this thread, and those of its context
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sub = context.socket(zmq.SUB)
        sub.setsockopt(zmq.RECONNECT_IVL, 50)
        for kind in (
            wire.Average,
            wire.Shared,
            wire.Sealed,
            wire.Close,
        ):  # a close travels with averages
            sub.subscribe(wire.topic(kind))
        sockets.connect(sub, sockets.tcp(self._address, self._port + 1), self._keys)
        last: float | None = None
        while not self._over.is_set():
            if not sub.poll(100):
                continue
            for frames in wire.split(sub.recv_multipart()):
                message = wire.from_frames(frames)[0]
                if isinstance(message, wire.Close):
                    now = time.monotonic()
                    if last is not None and now - last > self.longest_s:
                        self.longest_s, self.before_longest = now - last, self.fault
                    last = now
                    self._look(message)
        context.destroy(linger=0)

    def _look(self, close: wire.Close) -> None:
        try:
            Ledger.from_state(close.ledger)
        except ValueError as e:
            self.problem = f"the ledger of step {close.step} cannot be right: {e}"
        with self._closed:
            self.step_before, self.step = self.step, optimizer_steps(close.ledger, close.step)
            self.contributors = len(close.contributors)
            self._count += 1
            self._closed.notify_all()

    def next_close(self) -> None:
        """Wait for one that is reported from now on."""
        with self._closed:
            seen = self._count
            if not self._closed.wait_for(lambda: self._count > seen + 1, STANDSTILL_S):
                raise Broken(f"no step was closed for {STANDSTILL_S:g} s after: {self.fault}")
        if self.problem is not None:
            raise Broken(self.problem)

    def until_all_take_part(self, count: int) -> None:
        """Wait for an update of this number of workers."""
        with self._closed:
            if not self._closed.wait_for(lambda: self.contributors >= count, STANDSTILL_S):
                raise Broken(f"not all workers came back within {STANDSTILL_S:g} s")

    def stop(self) -> None:
        self._over.set()
        self.join()


class Chaos:
    """One run, its programs, and what is done to them."""

    def __init__(
        self,
        run: Run,
        seed: int,
        faults: Mapping[str, int],
        settings: list[str],
        whom: Sequence[int] = WORKERS,
        hosts: Hosts | None = None,
    ) -> None:
        """`faults`, with their weights, happen to those in `whom`. With `hosts` the server and
        worker 1 share the first of HOSTS, and the others have one each."""
        self.run, self.random, self.hosts = run, random.Random(seed), hosts
        self.tally = Tally()
        self.folders: set[Path] = set()
        self.shards: set[psutil.Process] = set()  # all that were seen
        self.servers: list[Program] = []
        self._settings, self._token = settings, ""
        self._faults, self._whom = faults, whom
        self._observers_killed = 0
        self.began = time.monotonic()
        self.server = self._start_server()
        self.workers = {i: self._start_worker(i) for i in WORKERS}
        self.watch = Watch(run.port, hosts and hosts[HOSTS[0]], self._token)
        self.watch.start()

    def _start_server(self) -> Program:
        self._observers_killed = 0
        if self.hosts is None:
            server = self.run.server(*self._settings)
            server.wait_for("server at .* run folder")
        else:
            settings, keys = (*self._settings, self._address), str(self.run.folder / "keys")
            server = self.run.server(*settings, host=self.hosts[HOSTS[0]], XDG_CONFIG_HOME=keys)
            self._token = server.wait_for("other machines join with: ").rpartition("=")[2]
        self.folders |= private_folders(server)
        self.servers.append(server)
        return server

    def _start_worker(self, number: int) -> Program:
        if self.hosts is None:
            return self.run.worker(number)
        host = self.hosts[HOSTS[number - 1]]
        if number == 1:
            return self.run.worker(number, self._address, host=host)
        return self.run.worker(number, host=host, PARAMSERVER_JOIN=self._token)

    @property
    def _address(self) -> str:
        assert self.hosts is not None
        return f"host_ip={self.hosts.address(HOSTS[0])}"

    def say(self, text: str) -> None:
        seconds = int(time.monotonic() - self.began)
        step = f"step {self.watch.step:,}"
        print(f"{seconds // 60:3}:{seconds % 60:02}  {step:>14}  {text}", flush=True)

    def disturb(self, most_s: float) -> None:
        """Let it run for a while, do something to it, and see that it goes on."""
        self._pause(min(most_s, self.random.uniform(0.3, 3.0)))
        fault = self.random.choices(list(self._faults), list(self._faults.values()))[0]
        number = self.random.choice(self._whom)
        seconds = self.random.choice((0.1, 1.0, 5.0)) * self.random.uniform(0.5, 1.0)
        if fault in CABLES:
            number, seconds = self.random.choice(WORKERS[1:]), self.random.choice(OUT_S)
            seconds = min(seconds, most_s)
        if fault == "observer killed" and self._observers_killed == OBSERVERS_KILLED:
            return
        if fault in SHARDS and not self._look_for_shards():
            return
        self.tally.faults[fault] += 1
        self.watch.fault = f"{fault} ({number}, {seconds:.1f} s)"
        self.say(self.watch.fault)
        self._do(fault, number, seconds)
        self.watch.next_close()

    def standing(self) -> str:
        """What each program said last; in the end, a line each, whether it runs, and where."""
        programs = (self.server, *self.workers.values())
        said = [f"--- {program.name} said last:\n{program.newest}" for program in programs]
        stacks = [f"{program.name} {_stands(program)}" for program in programs]
        return "\n".join(said + stacks)

    def _look_for_shards(self) -> list[psutil.Process]:
        """Those that run now."""
        found = shards_of(self.workers.values())
        self.shards.update(found)
        return found

    def until_said(self, sentence: str) -> None:
        """Wait until the server has said it, now or before."""
        if not re.search(sentence, self.server.output):
            self.server.wait_for(sentence)

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def _do(self, fault: str, number: int, seconds: float) -> None:
        worker = self.workers[number]
        if "server" in fault and "killed" in fault:  # a replica has to hold the run meanwhile
            self.watch.until_all_take_part(len(WORKERS))
        match fault:
            case "worker killed":
                self._end(worker, signal.SIGKILL)
                self._pause(seconds)
                self.workers[number] = self._start_worker(number)
            case "worker asked to leave":
                self._end(worker, signal.SIGTERM)
                self._pause(seconds)
                self.workers[number] = self._start_worker(number)
            case "worker stopped":
                self._stop(worker, seconds)
            case "server stopped":
                self._stop(self.server, min(seconds, 2.0))
            case "server killed":
                self._kill_server(seconds)
            case "server and worker killed":
                worker.send(signal.SIGKILL)
                self._kill_server(seconds)
                worker.end()
                self.workers[number] = self._start_worker(number)
            case "observer killed":
                self._observers_killed += 1
                for child in children(self.server):
                    with suppress(psutil.Error):
                        child.kill()
            case "second worker of one id":
                twin = self._start_worker(number)
                if (code := twin.end()) != 2 or "is taken" not in twin.output:
                    raise Broken(f"a second worker {number} ended with {code}:\n{twin.output}")
            case "stranger at the ports":
                for port in (self.run.port, self.run.port + 1):
                    self._bother(port)
            case "shard killed" | "shard stopped" | "machine stopped":
                self._disturb_shard(fault, seconds)
            case "shard and a worker elsewhere killed":
                here = self._disturb_shard("shard killed", 0.0)
                number = next(n for n in WORKERS if n != here)
                self._end(self.workers[number], signal.SIGKILL)
                self._pause(seconds)
                self.workers[number] = self._start_worker(number)
            case "cable out" | "cable out in one direction":
                self._cut(HOSTS[number - 1], seconds, both=fault == "cable out")

    def _disturb_shard(self, fault: str, seconds: float) -> int:
        """Something happens to a shard, or to it and its worker, whose number is returned; a shard
        may be gone by now."""
        number = self.random.choice([n for n in WORKERS if shards_of([self.workers[n]])] or WORKERS)
        worker = self.workers[number]
        shards = shards_of([worker])
        for shard in shards:
            with suppress(psutil.NoSuchProcess):
                if fault == "shard killed":
                    shard.kill()
                else:
                    shard.suspend()
        if fault == "machine stopped":
            worker.send(signal.SIGSTOP)
        if fault != "shard killed":
            self._pause(seconds)
            worker.send(signal.SIGCONT)
            self._pause(self.random.choice((0.0, 0.0, 1.0)))
        for shard in shards:
            with suppress(psutil.NoSuchProcess):
                shard.resume()
        return number

    def _bother(self, port: int) -> None:
        if self.hosts is None:
            bother(port, self.random)
            return
        there, address = self.hosts[HOSTS[1]], self.hosts.address(HOSTS[0])

        def knock() -> None:
            move_to(there)
            bother(port, self.random, address)

        thread = threading.Thread(target=knock)
        thread.start()
        thread.join()

    def _cut(self, name: str, seconds: float, *, both: bool) -> None:
        assert self.hosts is not None
        leaving = both or self.random.random() < 0.5
        self.hosts.cut(name, leaving=leaving, arriving=both or not leaving)
        self._pause(seconds)
        self.hosts.mend(name)

    def _stop(self, program: Program, seconds: float) -> None:
        program.send(signal.SIGSTOP)
        self._pause(seconds)
        program.send(signal.SIGCONT)

    def _end(self, program: Program, number: signal.Signals) -> None:
        program.send(number)
        code, wanted = program.end(), {-number, 0, 1, 130, 143}
        if code not in wanted:
            raise Broken(f"{program.name} ended with {code}:\n{program.output}")

    def _kill_server(self, seconds: float) -> None:
        self.server.send(signal.SIGKILL)
        self.server.end()
        # Workers that pushed for the newest step stood at the one before: that one is held.
        held = self.watch.step_before
        self._pause(seconds)
        self.server = self._start_server()
        told = self.server.wait_for("the run goes on after step|nobody came back")
        went_on = re.search(r"after step (\d+)", told)
        if went_on is None:
            raise Broken(f"nobody came back to a killed server:\n{self.server.output}")
        self.tally.steps_lost += max(0, held - int(went_on[1]))

    def finish(self) -> None:
        """End the run in order."""
        self.say("no more faults: waiting until everybody takes part")
        self.watch.until_all_take_part(len(WORKERS))
        if "observer=false" not in self._settings:
            here = "the first state comes from the observer|the observer took a snapshot"
            self.until_said(here)
        self._look_for_shards()
        self.server.send(signal.SIGTERM)
        programs = [self.server, *self.workers.values()]
        codes = {p.name: p.end() for p in programs}
        self.watch.stop()
        self.tally.longest_pause_s = self.watch.longest_s
        self.tally.after = self.watch.before_longest
        if set(codes.values()) != {0}:
            output = "\n\n".join(p.output for p in programs if p.process.returncode)
            raise Broken(f"not everybody ended in order: {codes}\n{output}")
        if left := [str(f) for f in self.folders if f.exists()]:
            raise Broken(f"left behind: {', '.join(left)}")
        _, living = psutil.wait_procs(self.shards, STANDSTILL_S)
        left = [str(f) for p in self.shards for f in SHARED.glob(f"paramserver-{p.pid}-*")]
        if living or left:
            raise Broken(f"left behind of shards: {[p.pid for p in living]}, {', '.join(left)}")


def judge(
    tally: Tally, summary: dict[str, Any], lines: list[dict[str, Any]], alone: float | None
) -> tuple[list[tuple[str, str]], list[str]]:
    """The table's rows, and which promises were broken."""
    counted = {how: summary[f"samples_{how}"] for how in ("done", "partly", "skipped")}
    in_log = sum(line["samples"] for line in lines)
    numbers = [line.get("update", line["step"]) for line in lines]  # local steps: many in an update
    missing = summary["updates"] - len(set(numbers))
    applied = counted["done"] + counted["partly"]
    twice = max(0, in_log - applied)
    never = max(0, applied - in_log) if not missing else 0
    accuracy = summary.get("val_accuracy")
    broken = []
    if tally.steps_lost:
        broken.append(f"{tally.steps_lost} closed steps were lost")
    if twice or len(lines) != len(set(numbers)):
        broken.append(f"{twice} samples, or a step, were applied twice")
    if never:
        broken.append(f"{never} samples are in no update")
    if not summary["replicas_equal"]:
        broken.append(f"replicas differ: {summary['digests']}")
    if alone is not None and (accuracy is None or accuracy < alone - ACCURACY_LOSS):
        broken.append(f"accuracy {accuracy}, undisturbed {alone}")
    rows = [(f"fault: {what}", str(n)) for what, n in sorted(tally.faults.items())]
    rows += [
        ("steps", f"{summary['steps']:,}"),
        ("updates", f"{summary['updates']:,}"),
        ("steps lost", str(tally.steps_lost)),
        ("samples done", f"{counted['done']:,}"),
        ("samples applied twice", str(twice)),
        ("samples silently never", str(never)),
        ("samples partly", str(counted["partly"])),
        ("samples skipped", str(counted["skipped"])),
        ("longest pause", f"{tally.longest_pause_s:.1f} s after: {tally.after}"),
        ("replicas equal", "yes" if summary["replicas_equal"] else "NO"),
    ]
    if accuracy is not None:
        beside = "" if alone is None else f", undisturbed {100 * alone:.2f} %"
        rows.append(("accuracy", f"{100 * accuracy:.2f} %{beside}"))
    return rows, broken


def undisturbed(samples: int, more: Sequence[str] = ()) -> float:
    """The accuracy of an undisturbed run with the same settings, over about as many samples."""
    epochs = max(1, min(BASELINE_EPOCHS, round(samples / 4000)))
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, Run(Path(folder)) as run:
        settings = [f"num_epochs={epochs}", "num_workers=3", "eval_steps=0", "batch_size=16"]
        programs = [run.server(*settings, *more), *(run.worker(i) for i in WORKERS)]
        for program in programs:
            program.process.wait(UNDISTURBED_S)
        return float(run.summary()["val_accuracy"])


def chaos(seconds: float, seed: int, *, compare: bool, more: Sequence[str] = ()) -> int:
    """Faults of every kind for so long, in a run with `more` settings; the exit code."""
    settings = [
        "num_workers=3", "batch_size=16", "num_epochs=1000000", "timeout=0.5", "eval_steps=0",
        f"heartbeat_timeout={SILENCE_S}", "checkpoint_steps=200", "digest_steps=100", *more,
    ]  # fmt: skip
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        cables = sys.platform == "linux" and os.geteuid() == 0
        hosts = stack.enter_context(Hosts(HOSTS)) if cables else None
        run = stack.enter_context(Run(Path(folder)))
        print(f"machines of their own, with cables: {'yes' if cables else 'no, that takes root'}")
        shards = cables and any(s.startswith("shards=") and s != "shards=1" for s in more)
        faults = FAULTS | (CABLES if cables else {}) | (SHARDS if shards else {})
        settings += [SHARDS_CUT] if shards else []
        monkey = Chaos(run, seed, faults, settings, hosts=hosts)
        try:
            monkey.watch.next_close()
            if shards:
                monkey.until_said(AVERAGING)
            until = time.monotonic() + seconds
            while (left := until - time.monotonic()) > 0:
                monkey.disturb(left)
            monkey.finish()
        except (Broken, AssertionError) as e:
            raise Broken(f"{monkey.standing()}\n{e}") from e
        summary, lines = run.summary(), run.steps()
        if len(run.runs) != 1:
            raise Broken(f"{len(run.runs)} run folders for one run")
    alone = undisturbed(summary["samples"], more) if compare else None
    rows, broken = judge(monkey.tally, summary, lines, alone)
    return tell(rows, broken)


@dataclass
class Sizes:
    """What processes hold, over time: resident bytes and descriptors."""

    memory: dict[str, list[int]] = field(default_factory=dict)
    descriptors: dict[str, list[int]] = field(default_factory=dict)

    def look(self, programs: Sequence[Program]) -> None:
        for program in programs:
            process = psutil.Process(program.process.pid)
            memory = process.memory_full_info().uss
            self.memory.setdefault(program.name, []).append(memory)
            self.descriptors.setdefault(program.name, []).append(process.num_fds())

    def judge(self) -> tuple[list[tuple[str, str]], list[str]]:
        """The last quarter beside the second one: what starting took is over by then."""
        rows, broken = [], []
        for what, series, allowed in (
            ("memory of", self.memory, lambda n: GROWTH * n + GROWTH_BYTES),
            ("descriptors of", self.descriptors, lambda n: n + 4),
        ):
            for name, values in series.items():
                quarter = max(1, len(values) // 4)
                before = statistics.median(values[quarter : 2 * quarter] or values)
                after = statistics.median(values[-quarter:])
                unit, scale = (" MiB", 2**20) if series is self.memory else ("", 1)
                told = f"{before / scale:,.1f}{unit}, then {after / scale:,.1f}{unit}"
                rows.append((f"{what} {name}", told))
                if after > allowed(before):
                    broken.append(f"{what} {name} grows: {told}")
        return rows, broken


def soak(rounds: int, seed: int) -> int:
    """Workers come and go until this number of rounds is closed; returns the exit code. Worker 1
    stays."""
    settings = [
        "num_workers=3", "batch_size=4", "model.hidden=4", "num_epochs=1000000", "timeout=0.5",
        f"heartbeat_timeout={SILENCE_S}", "observer=false", "history_mb=8",
    ]  # fmt: skip
    sizes, told = Sizes(), 0.0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, Run(Path(folder)) as run:
        monkey = Chaos(run, seed, COMING_AND_GOING, settings, WORKERS[1:])
        monkey.watch.next_close()
        while monkey.watch.step < rounds:
            for _ in range(5):
                monkey._pause(1.0)
                sizes.look([monkey.server, monkey.workers[1]])
            monkey.disturb(1.0)
            if time.monotonic() - told > 30:
                told = time.monotonic()
                rows, _ = sizes.judge()
                monkey.say("; ".join(": ".join(row) for row in rows))
        monkey.finish()
        summary, lines = run.summary(), run.steps()
    rows, broken = judge(monkey.tally, summary, lines, None)
    more, grown = sizes.judge()
    return tell(rows + more, broken + grown)


def tell(rows: list[tuple[str, str]], broken: list[str]) -> int:
    width = max(len(name) for name, _ in rows)
    print()
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    for promise in broken:
        print(f"BROKEN: {promise}")
    print("every promise was kept" if not broken else f"{len(broken)} promises were broken")
    return 1 if broken else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the module's head."""
    parser = argparse.ArgumentParser(prog="make chaos", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="how long faults go on")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--soak", type=int, metavar="ROUNDS", help="the soak, instead")
    parser.add_argument("--no-compare", action="store_true", help="no undisturbed run afterwards")
    parser.add_argument("settings", nargs="*", help="of the run, local_steps=8 say")
    args = parser.parse_args(argv)
    print(f"seed {args.seed}", flush=True)
    try:
        if args.soak is not None:
            return soak(args.soak, args.seed)
        return chaos(60 * args.minutes, args.seed, compare=not args.no_compare, more=args.settings)
    except (Broken, AssertionError) as e:
        print(f"BROKEN: {e}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
