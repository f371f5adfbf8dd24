"""Whole runs in virtual time: real `Rounds` and `Follow` objects, joined by a link that a seed controls.

    python -m tests.simulation --seeds 100000        many schedules
    python -m tests.simulation --seed 123 --verbose  one of them, message by message

A seed makes a schedule: settings, how many workers and how slow, what the network is like, and the
faults: killed, stopped and restarted processes, cut and held connections, a server that stands still,
lost publications, gradients that are not finite. Faults stop at some time. From then on the run must
reach its end, and whatever happened, the promises of the design hold (see `tests.glue` for those that
are checked at each message):

* replicas at one step hold one model, and no closed step is lost;
* a sample is in each bucket once: done + partly + skipped = all, never twice, never left out;
* nothing waits without end, and nobody is sent away who did nothing wrong;
* what is kept is bounded.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from paramserver.rounds import Rounds, Rules
from workers.follow import Follow

from .book import Broken
from .network import DOWN, UP, Network, World
from .peer import Client, Habits, Observer, Worker
from .server import Server

QUIET_S = 4.0  # heartbeat_timeout
IDLE_S = 100.0
PATIENCE_S = 400.0
"""After the last fault; more than any chain of deadlines, so that only what hangs exceeds it."""
INNOCENT = (
    "rejected: worker id",
    "rejected: the run has ended",
    "the run has ended",
    "the run ended before it could join",
)
"""What a process may end with although it did nothing wrong: its id is taken, or it came too late."""


@dataclass(frozen=True)
class Parts:
    """What is under test; a planted fault replaces one of them."""

    rounds: type[Rounds] = Rounds
    follow: type[Follow] = Follow
    worker: type[Worker] = Worker
    observer: type[Observer] = Observer


class Outcome:
    """What became of a schedule."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.failure: str | None = None
        self.seen: Counter[str] = Counter()
        self.events = 0
        self.virtual_s = 0.0


class Schedule:
    """One run with its faults; `run` carries it out."""

    def __init__(
        self, seed: int, parts: Parts = Parts(), tell: Callable[[str], None] | None = None
    ) -> None:
        self.parts = parts
        self.outcome = Outcome(seed)
        self.world = world = World(seed, tell)
        rng = world.random
        self.net = Network(world, rng.choice((0.0005, 0.005, 0.03)), rng.choice((0, 0.02, 0.3)))
        self.net.repeats = rng.choice((0, 0, 0.05))
        workers = rng.choice((1, 2, 2, 3, 3, 4))
        rules = Rules(
            num_workers=rng.randint(1, workers),
            min_workers=rng.choice((1, 1, min(2, workers))),
            max_workers=workers + 1,
            timeout=rng.choice((None, 0.05, 0.5, 2.0)),
            quorum=rng.choice((0.0, 0.5, 0.5, 1.0)),
            heartbeat_timeout=QUIET_S,
            join_timeout=rng.choice((1.0, 20.0)),
            idle_timeout=IDLE_S,
            deterministic=rng.random() < 0.25,
            epochs=rng.choice((1, 2, 2, 3)),
            observer=rng.random() < 0.7,
        )
        self.server = Server(
            world,
            self.net,
            rules,
            parts.rounds,
            buckets=rng.choice((1, 2, 3)),
            history=rng.choice((1, 2, 5)),
            through_wire=seed % 8 == 0,
        )
        self.samples = rng.randint(1, 40)
        self.batch_size = rng.randint(1, 6)
        self.compute_s = rng.choice((0.01, 0.1, 0.1, 0.4))
        self.absent = rng.choice((0, 0, 0.3))
        self.lost = rng.choice((0, 0.02, 0.2))
        self.processes: dict[int, Client] = {}  # the newest of each slot; 0 is the observer
        self._serial = 0
        self._kept_down: set[int] = set()
        slots = range(0 if rules.observer else 1, workers + 1)
        for slot in slots:
            world.at(rng.choice((0.0, 0.0, rng.uniform(0, 5.0))), self._start, slot)
        self.calm_at = self._plan_faults(list(slots))
        world.at(self.calm_at, self._calm)
        if tell:
            world.say(f"seed {seed}: {rules}")
            world.say(
                f"{self.server.buckets} buckets, {self.samples} samples in batches of "
                f"{self.batch_size}, history of {self.server._limit}, calm at {self.calm_at:.3f}"
            )

    # ------------------------------------------------------------------ processes

    def _start(self, slot: int) -> None:
        """Start, or start again, the process of a slot: what a person at that machine does."""
        before = self.processes.get(slot)
        if self.server.rounds.ended or slot in self._kept_down or (before and before.alive):
            return
        self._serial += 1
        kind = self.parts.worker if slot else self.parts.observer
        self.world.say(f"START {'worker ' + str(slot) if slot else 'the observer'}")
        peer = kind(
            self.world, self.net, self.server, self.parts.follow, slot, self._serial, self._habits()
        )
        peer.lost, peer.on_exit = self.lost, lambda why: self._exited(slot, peer)
        self.server.publish.append(peer.publish)
        self.processes[slot] = peer

    def _habits(self) -> Habits:
        return Habits(self.samples, self.batch_size, self.compute_s, absent=self.absent)

    def _exited(self, slot: int, peer: Client) -> None:
        why = peer.exit
        self.server.publish.remove(peer.publish)
        if why in ("finished", "killed", "left") or why.startswith(INNOCENT):
            self.outcome.seen[why.split(":")[0]] += 1
        else:
            raise Broken(f"worker {slot} was sent away although it did nothing wrong: {why}")
        if why != "killed" or self.world.now >= self.calm_at:
            self.world.after(self.world.random.uniform(0.5, 3.0), self._start, slot)

    def _calm(self) -> None:
        """No more faults; whoever is down is started again."""
        self.world.say("CALM")
        self._kept_down.clear()
        self.net.repeats = 0.0
        for slot, peer in list(self.processes.items()):
            peer.habits, peer.lost = self._habits(), 0.0
            peer.go_on()
            self._start(slot)
        if self.server.stalled:
            self.server.go_on()

    # ------------------------------------------------------------------ faults

    def _plan_faults(self, slots: list[int]) -> float:
        """Put faults at random moments; returns when the last of them is over."""
        rng = self.world.random
        window = rng.choice((1.0, 3.0, 8.0, 15.0))
        over = 0.0
        for _ in range(rng.choice((0, 1, 2, 3, 5, 8))):
            start = rng.uniform(0.0, window)
            seconds = rng.choice((0.05, 0.5, 2.0, 6.0, 12.0)) * rng.uniform(0.5, 1.5)
            fault = rng.choice(FAULTS)
            self.world.at(start, self._strike, fault, rng.choice(slots), seconds)
            over = max(over, start + seconds)
        return over + 0.001

    def _strike(self, fault: str, slot: int, seconds: float) -> None:
        if self.server.ended_at is not None:
            return
        world, rng, peer = self.world, self.world.random, self.processes.get(slot)
        world.say(f"FAULT {fault} {slot} for {seconds:.3f} s")
        self.outcome.seen[fault] += 1
        if fault == "stall server":
            self.server.stalled = True
            world.after(seconds, self.server.go_on)
        elif peer is None or not peer.alive:
            return
        elif fault == "kill":
            peer.kill()
            world.after(seconds, self._start, slot)
        elif fault == "stop":
            peer.stop()
            world.after(seconds, peer.go_on)
        elif fault == "cut":
            noticed = rng.choice((0.0, 0.0, seconds, 1.5 * QUIET_S))
            lines = list(peer.lines.values())
            for line in lines if rng.random() < 0.5 else rng.sample(lines, min(1, len(lines))):
                line.cut(seconds, noticed)
        elif fault == "hold":
            ways = rng.choice(((UP,), (DOWN,), (UP, DOWN)))
            for line in peer.lines.values():
                line.hold(world.now + seconds, ways)
        else:
            whose, name, value = {
                "slow": (peer.habits, "compute_s", 1.5),
                "bad": (peer.habits, "bad", 0.5),
                "leave": (peer.habits, "leaves", 0.5),
                "lossy": (peer, "lost", 0.7),
            }[fault]
            world.after(seconds, setattr, whose, name, getattr(whose, name))
            setattr(whose, name, value)

    # ------------------------------------------------------------------ the run

    def run(self) -> Outcome:
        """Let it all happen; what is broken is told in the outcome."""
        outcome, server, world = self.outcome, self.server, self.world
        try:
            if not world.run(lambda: server.ended_at is not None, self.calm_at + PATIENCE_S):
                raise Broken(f"the run has not ended: {server.rounds.phase(world.now)}")
            end = server.rounds.ended
            assert end is not None
            if end.error:
                if self._could_go_on():
                    raise Broken(f"the run was given up: {end.reason}")
                outcome.seen["state lost with all its holders"] += 1
            else:
                assert server.rounds.ledger is not None
                server.book.check_end(server.rounds.ledger)
            alive = {p for p in self.processes.values() if p.alive}
            if not world.run(
                lambda: not any(p.alive for p in alive) and server.finished(),
                max(world.now, self.calm_at) + 10 * QUIET_S,
            ):
                left = ", ".join(p.name for p in alive if p.alive)
                raise Broken(f"the run has ended, but not for {left or 'the server'}")
            for peer in alive:
                if (
                    peer.exit == "finished"
                    and not peer._left_behind
                    and peer.replica.step != end.step
                ):
                    raise Broken(f"{peer.name} ended at step {peer.replica.step} of {end.step}")
            if server.book.step != end.step:
                raise Broken(f"{server.book.step} updates lead to step {end.step}")
            outcome.seen["steps"] += end.step
            outcome.seen["rounds"] += server.rounds._rounds
            outcome.seen["snapshots"] += server.rounds._snapshots
        except Exception as e:
            text = str(e) if isinstance(e, Broken) else traceback.format_exc(limit=-3)
            outcome.failure = f"at {world.now:.3f} s: {text}"
        outcome.events, outcome.virtual_s = world.events, world.now
        return outcome

    def _could_go_on(self) -> bool:
        """Is there a process from which the run could have gone on?"""
        r = self.server.rounds
        return any(
            p.alive and r.knows(p.replica.step, p.replica.lineage) for p in self.processes.values()
        )


FAULTS = (
    *("kill",) * 4, *("stop",) * 2, *("cut",) * 4, *("hold",) * 2,
    "stall server", "slow", "bad", "lossy", "leave",
)  # fmt: skip


def simulate(seed: int, parts: Parts = Parts()) -> Outcome:
    """Run the schedule of a seed."""
    return Schedule(seed, parts).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10_000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed of them")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--verbose", action="store_true", help="tell what happens")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.seeds)
    if args.seed is not None:
        seeds = range(args.seed, args.seed + 1)
    start, seen, failed = time.perf_counter(), Counter[str](), 0
    done = events = 0
    for seed in seeds:
        outcome = Schedule(seed, tell=print if args.verbose else None).run()
        done += 1
        events += outcome.events
        seen.update(outcome.seen)
        if outcome.failure:
            failed += 1
            print(
                f"seed {seed} {outcome.failure}\n  replay: python -m tests.simulation --seed {seed} --verbose"
            )
            if not args.keep_going:
                break
    seconds = time.perf_counter() - start
    print(", ".join(f"{what} {count}" for what, count in sorted(seen.items())))
    print(
        f"{done} schedules, {failed} failed, {events} events in {seconds:.1f} s: "
        f"{60 * done / seconds:.0f} schedules a minute"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
