"""Whole runs in virtual time: the server's real `Rounds` and `Control`, the peers' real `Session`,
`Follow`, `Pushes` and `ServerSearch`, joined by a network that a seed controls.

    python -m tests.simulation --seeds 100000        many schedules
    python -m tests.simulation --seed 123 --verbose  one of them, message by message
    python -m tests.simulation --shards --only late+small   several shards, and these kinds in all

A seed makes a schedule: settings, how many workers and how slow, what the network is like, and the
faults: processes (the server, too) that are killed and started again, stopped and continued, or
there twice; a server that is started again on another port; connections that are cut or held;
publications that are lost, or written over in shared memory; gradients that are not finite. In
some schedules workers bring samples of their own; in some their loops step several pairs of a
model and its optimizer. At some time faults stop. From then on the run
must reach its end, and whatever happened before, the promises of the design hold. At each message
is checked that

* replicas by one name (lineage) hold one model, and the log has no gap (`book`);
* a sample is in each bucket at most once, and the ledger says what is really in the sums;
* a gradient goes only into the update of the model that it was made from;
* no closed step that a process within reach holds is lost with a server, and none comes back;
* what is kept is bounded (`server`);

and at the end that all samples are accounted for, that nothing waits without end, that every
process ended by itself at the log's last step, and that nobody was sent away without a reason. The
server's process ends, too, as soon as it may: then nobody is answered any more.
"""

from __future__ import annotations

import argparse
import math
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import msgspec

from paramserver.protocol import messages as wire
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.departures import LEFT, SILENT
from paramserver.rounds.ledger import UNREAD, Ledger
from paramserver.rounds.rules import Rules
from paramserver.rounds.shards import Shards
from paramserver.rounds.states import REPLICA
from paramserver.server.control import Control
from paramserver.server.spread import Spread
from workers.link.session import Session

from .book import Broken, samples_of
from .liar import Liar
from .mix import ONLY, Mix, only
from .network import DOWN, UP, Line, Network, World
from .peer import (
    DEADLINE_S,
    HELLO_EVERY_S,
    UNANSWERED,
    Client,
    Habits,
    Observer,
    Shipping,
)
from .server import LIAR, TICK_S, Server
from .shard import Shard
from .worker import Worker

SILENCE_S = 4.0  # heartbeat_timeout
IDLE_S = 50.0
HANG_S, HANG_IDLE_S = 300.0, 200.0  # several in turn may be waited for before this is over
ONE_BY_ONE = 0.5
"""Share of them in which workers make these one by one, and look around in between: they leave
their loop sooner now and then, or go on while an exchange is under way."""
PATIENCE_S, PATIENCE_FOR_A_SAMPLE_S = 400.0, 4.0
"""After the last fault; more than any chain of deadlines, so that only what hangs exceeds it."""

FAULTS = (
    *("kill",) * 4, *("stop",) * 2, *("cut",) * 4, *("hold",) * 2,
    *("kill the server",) * 3, "stall the server", "slow", "bad", "lossy", "leave", "pause", "twin",
)  # fmt: skip

SOONER, ON = "left its loop sooner", "went on during an exchange"
CARRIES, ENTERED = "late work is carried over", "late buckets that entered a round"
HARMLESS = {"slow", "bad", "leave", "pause", "finished", "left", SOONER, ON, CARRIES, ENTERED}
"""What happens in a schedule and kills no worker."""

SHARD_FAULTS = (
    *("kill a shard",) * 3, "stop a shard", "cut channels", "cut a shard's link", "hold channels",
)  # fmt: skip

NORMS = 0.3
"""Share of those with shards in which norms are judged, and bad gradients have huge ones."""

FIREWALLS = 0.15
"""Share of those with shards in which a host lets nobody in."""

MOMENTS = (
    *(None,) * 4, "before a close is noted", "before a close is told", "after a close is told",
)  # fmt: skip
"""When in its work a server is killed."""

FAIR = (
    "finished", "killed", "left", "rejected: worker id", "rejected: the run has ended",
    "the server is gone", "rejected: only the observer",
)  # fmt: skip
NOT_TO_BE_HAD = "the run's state did not arrive"
"""Five givers in a row were killed or left. No liar may bring that about where anybody else could
give; where it alone says that it holds the state, and has contributed, that state is lost."""
MISFIT = "the run's state does not fit"
"""Three states were none of its model. All honest peers have the same one."""
AS_THE_LIAR = f" ({LIAR})"
"""How a rejection ends for another data set than the liar's. The run's is that of the first workers
that are ready; a liar alone among them says what it likes, until somebody else has contributed."""
OF_ANOTHER_RUN = "rejected: this server runs"
NOBODY_THERE = (UNANSWERED, "the server has been silent")
TOO_LATE = ("the run has ended", "the run ended before it could join")
"""How processes may end: by themselves, by a fault, because another one has their id, or because
they came when the run was over."""


@dataclass(frozen=True)
class Parts(Shipping):
    """What is under test; a planted fault replaces one of them."""

    rounds: type[Rounds] = Rounds
    control: type[Control] = Control
    shards: type[Shards] = Shards
    spread: type[Spread] = Spread
    worker: type[Worker] = Worker
    observer: type[Observer] = Observer
    liar: type[Liar] = Liar


class Outcome:
    """What became of a schedule."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.failure: str | None = None
        self.seen: Counter[str] = Counter()
        self.events = 0


class Schedule:
    """One run with its faults; `run` carries it out. `tell` gets a line for all that happens.
    `sharded`: several shards average."""

    def __init__(
        self,
        seed: int,
        parts: Parts | None = None,
        tell: Callable[[str], None] | None = None,
        *,
        sharded: bool = False,
        mix: Mix | None = None,
    ) -> None:
        self.parts = parts or Parts()
        self.mix = mix = mix or Mix()
        self.outcome = Outcome(seed)
        self.world = world = World(seed, tell)
        rng = world.random
        self.net = Network(world, rng.choice((0.0005, 0.005, 0.03)), rng.choice((0.0, 0.02, 0.3)))
        self.net.repeats = rng.choice((0.0, 0.0, 0.05))
        workers = rng.choice((1, 2, 2, 3, 3, 4))
        self.rules = Rules(
            num_workers=rng.randint(1, workers),
            min_workers=rng.choice((1, 1, min(2, workers))),
            max_workers=workers + 1,
            timeout=rng.choice((None, 0.05, 0.5, 5.0)),
            quorum=rng.choice((0.0, 0.5, 0.5, 1.0)),
            heartbeat_timeout=SILENCE_S,
            join_timeout=rng.choice((1.0, 20.0)),
            idle_timeout=IDLE_S,
            deterministic=rng.random() < 0.25,
            epochs=rng.choice((1, 2, 2, 3)),
            observer=rng.random() < 0.7,
        )
        self.rules = msgspec.structs.replace(
            self.rules, shares="speed" if seed % mix.speed_every == mix.speed_every - 1 else "equal"
        )
        if seed % mix.local_every == mix.local_every - 1:
            local = Random(f"local {seed}")
            self.rules = msgspec.structs.replace(
                self.rules,
                local_steps=local.choice((2, 3, 8, "auto")),
                local_warmup_steps=local.choice((0, 0, 5)),
                deterministic=False,
            )
        self.lies = seed % mix.liars_every == mix.liars_every - 1
        if self.lies:
            self.rules = msgspec.structs.replace(
                self.rules,
                observer=True,
                deterministic=False,
                quorum=min(self.rules.quorum, 0.5),
            )
        own = Random(f"own {seed}")
        brings = own.randint(1, 20) if own.random() < mix.own and not self.lies else 0
        if brings:  # who is done leaves: one must be enough
            self.rules = msgspec.structs.replace(self.rules, min_workers=1)
            self.outcome.seen["own samples"] += 1
        sooner, one_by_one = 0.0, Random(f"sooner {seed}")
        if self.rules.local_steps != 1 and not brings and one_by_one.random() < ONE_BY_ONE:
            sooner = one_by_one.choice((0.0, 0.05, 0.3))
            overlap = one_by_one.random() < 0.5 or not sooner
            self.rules = msgspec.structs.replace(self.rules, overlap=overlap)
        self._plan_staleness(seed)
        hangs = self.rules.shares == "speed" and not (self.lies or sooner)
        hangs = (
            hangs and self.rules.min_workers == 1 and Random(f"hangs {seed}").random() < mix.hangs
        )
        if hangs:
            self.rules = msgspec.structs.replace(self.rules, idle_timeout=HANG_IDLE_S)
        if sharded:
            self._plan_shards(seed)
        buckets = rng.choice((1, 2, 3))
        pairs = self._plan_pairs(seed, buckets)
        self.server = Server(
            world,
            self.net,
            self.rules,
            partial(self.parts.rounds, make_shards=self.parts.shards),
            partial(self.parts.control, make_spread=self.parts.spread),
            buckets=buckets,
            history=rng.choice((1, 2, 5)),
            through_wire=seed % 8 == 0,
            shares=seed % 2 == 0,
            compares=self.lies or seed % 3 == 0,
            pairs=pairs,
        )
        self._moves = Random(f"moves {seed}")
        wall = Random(f"firewall {seed}")
        if sharded and wall.random() < FIREWALLS:
            self.server.firewall = f"10.0.0.{wall.randint(1, 3)}"
            self.outcome.seen["firewall"] += 1
        self.habits = Habits(
            samples=rng.randint(1, 40) * rng.choice((1,) * 20 + (10,)),
            batch_size=rng.randint(1, 6),
            compute_s=rng.choice((0.01, 0.1, 0.1, 0.4)),
            absent=rng.choice((0.0, 0.3, 0.6)),
            own=brings,
        )
        if mix.small:
            self.habits.samples = 1 + seed % 7
        if self.rules.shards != 1:  # it takes a while until there are any
            self.habits.samples *= 4
        if not brings:
            self._plan_broken_samples(seed)
        self.habits.sooner = sooner
        if self.rules.max_staleness:
            self.habits.stutters = Random(f"stutters {seed}").choice((0.0, 0.1, 0.3))
        self.lost = rng.choice((0.0, 0.02, 0.2))
        self.slots = range(0 if self.rules.observer else 1, workers + 1)
        self._given_up = False  # a run to which nobody came back in time was followed by another
        self.at: dict[int, Client] = {}  # the process at each place; 0 is the observer's
        self.alive: list[Client] = []  # these, and twins
        self._serial = 0
        self.server.look = self._look_for_observer
        self.server.lost, self.server.deserted = self._check_lost, self._check_deserted
        self.server.lives = lambda process: any(p.process == process for p in self.alive)
        self.server.leaves = self._check_goodbyes
        self.server.holds = self._check_held
        self.server.places = lambda route: getattr(self.net.routes.get(route), "address", "")
        self.server.put_off = lambda: world.after(1.0, self._start_server)
        world.say(f"seed {seed}: {self.rules}")
        world.say(f"{self.habits}, {self.server.buckets} buckets, history {self.server.limit}")
        for slot in self.slots:
            world.at(rng.choice((0.0, 0.0, rng.uniform(0.0, 5.0))), self._start, slot)
        self.calm_at = self._plan_shard_faults(seed, self._plan_faults())
        if self.lies:
            world.at(2.0 * random.Random(seed).random(), self._start_liar, seed, workers + 1)
        world.at(self.calm_at, self._calm)
        if hangs:
            self.habits.samples *= 10
            world.at(self.calm_at, self._look_for_hang)
        own = Random(-1 - seed)  # so that all else is as it would be without
        goes = own.random() < mix.homeward and not self.lies  # a liar would stay
        self.home_at = own.uniform(0.5, 8.0) if goes else math.inf
        if self.home_at < math.inf:
            world.at(self.home_at, self._go_home)

    def _plan_staleness(self, seed: int) -> None:
        """In some schedules late work is carried over."""
        rng = Random(f"staleness {seed}")
        carries = rng.random() < self.mix.late and self.rules.local_steps == 1
        if carries and not self.rules.deterministic:
            most, timeout = rng.choice((1, 1, 2, 3, 8)), rng.choice((None, None, 0.05, 0.5))
            self.rules = msgspec.structs.replace(self.rules, max_staleness=most, timeout=timeout)
            self.outcome.seen[CARRIES] += 1

    def _plan_shards(self, seed: int) -> None:
        wanted = Random(f"shards {seed}").choice((None, 2, 3, 4))
        judges = self.rules.local_steps == 1 and Random(f"norms {seed}").random() < NORMS
        ratio = 10.0 if judges else None
        self.rules = msgspec.structs.replace(
            self.rules, shards=wanted, max_norm_ratio=ratio, leaves_out="int8"
        )

    def _plan_shard_faults(self, seed: int, over: float) -> float:
        """Put faults of shards at random moments; returns when the last fault is over."""
        rng = Random(f"faults of shards {seed}")
        if self.rules.shards == 1:
            return over
        for _ in range(rng.choice((0, 1, 2, 3, 5))):
            start = rng.uniform(0.0, rng.choice((3.0, 8.0, 15.0)))
            seconds = rng.choice((0.05, 0.5, 2.0, 6.0)) * rng.uniform(0.5, 1.5)
            self.world.at(start, self._strike_shard, rng.choice(SHARD_FAULTS), rng, seconds)
            over = max(over, start + seconds + 0.001)
        if self.rules.max_norm_ratio is not None:
            norms = Random(f"bad numbers {seed}")
            start = norms.uniform(2.0, 10.0)
            self.world.at(start, self._strike, "bad", norms.choice(self.slots), 6.0)
            over = max(over, start + 6.001)
        rng = Random(f"machines {seed}")
        if rng.random() < self.mix.machines:
            for _ in range(rng.choice((1, 2, 3))):
                start = rng.uniform(0.0, rng.choice((3.0, 8.0, 15.0)))
                seconds = rng.choice((0.5, 3.0, 6.0, 15.0)) * rng.uniform(0.5, 1.5)
                late_s = rng.choice((0.0, 0.5, 6.0, 30.0)) * rng.random()
                self.world.at(start, self._stop_machine, rng, seconds, late_s)
                over = max(over, start + seconds + late_s + 0.001)
        return over

    def _stop_machine(self, rng: Random, seconds: float, late_s: float) -> None:
        """All processes of a machine stop, or only its shard does; one of them may come back later
        than the others by `late_s`, long after it was taken for dead."""
        shards = [s for s in self.server.shards.values() if s.alive]
        if not shards or self.server.ended_at is not None:
            return
        shard = rng.choice(shards)
        peers = [p for p in self.alive if p.address == shard.address] * (rng.random() < 0.8)
        self.world.say(f"FAULT the machine at {shard.address} stops for {seconds:.3f} s")
        self.outcome.seen["stop a machine" if peers else "stop a shard"] += 1
        back = self.world.now + seconds
        there: list[Client | Shard] = [shard, *peers]
        last = rng.choice(there)
        for process in there:
            process.stop()
            at = back + late_s * (process is last)
            if isinstance(process, Client):
                process.reachable_at = max(process.reachable_at, at)
            self.world.at(at, process.go_on)

    def _strike_shard(self, fault: str, rng: Random, seconds: float) -> None:
        shards = [s for s in self.server.shards.values() if s.alive]
        if not shards or self.server.ended_at is not None:
            return
        shard, world = rng.choice(shards), self.world
        world.say(f"FAULT {fault} {shard.number} for {seconds:.3f} s")
        self.outcome.seen[fault] += 1
        lanes = sorted(shard.net.lines, key=lambda line: line.number)
        if fault == "kill a shard":
            shard.kill()
        elif fault == "stop a shard":
            shard.stop()
            world.after(seconds, shard.go_on)
        elif fault == "cut a shard's link":
            shard.link.cut(seconds, rng.choice((0.0, 1.5 * SILENCE_S)))
        elif fault == "cut channels":
            for lane in lanes if rng.random() < 0.5 else rng.sample(lanes, min(1, len(lanes))):
                self._cut_channel(lane, rng)
        else:
            ways = rng.choice(((UP,), (DOWN,), (UP, DOWN)))
            for lane in lanes:
                lane.hold(world.now + seconds, ways)

    def _cut_channel(self, lane: Line, rng: Random) -> None:
        """Its peer notices that at once, or never."""
        lane.cut(math.inf, 0.0)
        if rng.random() < 0.5:
            return
        for peer in self.alive:
            for number, channel in list(peer.channels.items()):
                if channel.lane is lane:
                    peer._channel_lost(number, "it was cut")

    def _check_held(self, shard: Any, close: wire.Close, bucket: int) -> bool:
        """Is this average somewhere else than at its shard, on another host if a member that has
        all of the round is there? What the liar says of it nobody can know, and who has said that
        it has it may have died since."""
        rounds = self.server.rounds
        there = {p.welcome.session: p for p in self.alive if p.welcome is not None}
        if self.lies or any(session not in there for session in rounds._holders):
            return True
        holders = [
            p
            for session, p in there.items()
            if session in rounds.peers
            and p.follow is not None
            and p.follow._round == close.round
            and bucket in p.follow._got
        ]
        whole = set(close.contributors) - set(close.late)
        elsewhere = [
            p
            for session, p in there.items()
            if p.id in whole
            and session in rounds.peers
            and p.address != shard.address
            and rounds.peers[session].state == REPLICA
        ]
        if elsewhere:
            holders = [p for p in holders if p.address != shard.address]
        return bool(holders)

    def _plan_pairs(self, seed: int, buckets: int) -> tuple[wire.Pair, ...]:
        """In some schedules several pairs take turns: with how many of the buckets each."""
        rng = Random(f"pairs {seed}")
        if (
            rng.random() > self.mix.pairs
            or buckets == 1
            or self.lies
            or self.rules.local_steps != 1
        ):
            return ()
        if self.rules.max_staleness:
            return ()
        self.outcome.seen["pairs"] += 1
        counts = rng.choice({2: ((1, 1),), 3: ((1, 2), (2, 1), (1, 1, 1))}[buckets])
        return tuple((f"pair {n}", count) for n, count in enumerate(counts))

    def _plan_broken_samples(self, seed: int) -> None:
        """In some schedules workers die of a sample or two, or one cannot be read."""
        rng, epochs, samples = Random(f"samples {seed}"), self.rules.epochs, self.habits.samples
        found = [(rng.randrange(epochs), rng.randrange(samples)) for _ in range(3)]
        kind = rng.random()
        if kind < 0.1:
            self.habits.deadly = frozenset(found[: rng.choice((1, 1, 2))])
            self.habits.in_silence = rng.random() < 0.3
        elif kind < 0.2:
            self.habits.unreadable = frozenset(found[:1])

    # ------------------------------------------------------------------ processes

    def _start(self, slot: int) -> None:
        """Start the program where it does not run, as a person at that machine would."""
        before, server = self.at.get(slot), self.server
        if slot > 0 and self.world.now >= self.home_at:
            return
        if slot == 0 and (not server.alive or server.rounds.coming_back):
            return  # the server starts it, when it is time
        if server.rounds.ended is None and (before is None or not before.alive):
            self.at[slot] = self._process(slot)

    def _look_for_observer(self) -> bool:
        """As the server's program does, now and then: does an observer of this server run?"""
        observer, server = self.at.get(0), self.server
        if server.boots > 1 and 0 in self.slots and (observer is None or observer.abandoned):
            self.at[0] = self._process(0)
            return True
        ending = server.rounds.ending is not None and server.rounds.ended is None
        if observer is not None and not observer.alive and ending:
            self.at[0] = self._process(0)  # it died at this moment: workers hold the last step
            self.outcome.seen["observer started again at the end"] += 1
            return True
        return observer is not None and observer.alive

    def _start_server(self) -> None:
        self.server.restart(moves=self._moves.random() < self.mix.moves)

    def _process(self, slot: int) -> Client:
        self._serial += 1
        kind = self.parts.worker if slot else self.parts.observer
        peer = kind(
            self.world,
            self.net,
            self.server,
            self.parts,
            slot,
            self._serial,
            Habits(**{f: getattr(self.habits, f) for f in Habits.__struct_fields__}),
        )
        self.world.say(f"START {peer.name} (pid {self._serial})")
        peer.lost, peer.on_exit = self.lost, lambda why: self._exited(slot, peer)
        self.server.subscribers.append(peer.publish)
        self.alive.append(peer)
        return peer

    def _start_liar(self, seed: int, id: int) -> None:
        kind = self.parts.liar
        liar = kind(self.world, self.net, self.server, id, self.habits.samples, seed)
        self.server.subscribers.append(liar.publish)
        self.outcome.seen["liar"] += 1

    def _exited(self, slot: int, peer: Client) -> None:
        why = peer.exit
        self.server.subscribers.remove(peer.publish)
        self.alive.remove(peer)
        self.outcome.seen[why.split(":")[0]] += 1
        if isinstance(peer, Worker):
            self.outcome.seen[SOONER] += peer.left_sooner
            self.outcome.seen[ON] += peer.went_on
        fair = why.startswith(FAIR) or (why.startswith(OF_ANOTHER_RUN) and self._given_up)
        if why.startswith(NOT_TO_BE_HAD):
            fair |= not self.lies or self._only_liar_left(peer, Session.MISSED_MAX)
        if why.startswith(MISFIT):
            most = range(Session.MISFITS_MAX, Session.MISSED_MAX + 1)
            fair |= self.lies and any(self._only_liar_left(peer, n) for n in most)
        if why.startswith("rejected") and why.endswith(AS_THE_LIAR):
            closes = self.server.book.closes
            fair |= all(
                worker == self.rules.max_workers for c in closes for worker in c.contributors
            )
        fair |= why == UNANSWERED and self._has_lost_its_run(peer)
        late = why in TOO_LATE or (why == UNANSWERED and peer.run is None)
        late |= why.startswith(NOBODY_THERE) and self._may_have_missed_the_end(peer)
        if not fair and (self.server.ended_at is None or not late):
            raise Broken(f"{peer.name} was sent away although it did nothing wrong: {why}")
        done = why == "finished" and peer.role == "worker" and self.habits.own > 0
        if why == "finished" and not (done and peer.ended is None):
            self._check_last_step(peer)
        if why != "killed" and not done:
            self.world.after(self.world.random.uniform(0.5, 3.0), self._start, slot)

    def _may_have_missed_the_end(self, peer: Client) -> bool:
        """Was this one out of reach shortly before the end, or just started? The server says it for
        a few heartbeats, and does not wait for those whom it takes for gone, or cannot hear. What
        has come to a peer's sockets it must read."""
        well_since = max(peer.reachable_at, peer.born_at)
        away = well_since > (self.server.ended_at or math.inf) - 5 * SILENCE_S
        return not peer.has_end and (away or self._computes(peer, self.server.over_at or math.inf))

    def _check_goodbyes(self) -> None:
        """The server's process ends: whom it hears still was out of reach when the run ended, or a
        worker that computed; the observer has more time than an evaluation takes."""
        now, ended_at = self.world.now, self.server.ended_at or 0.0
        for peer in self.alive:
            known = None if peer.welcome is None else peer.welcome.session
            here = self.server.rounds.peers.get(known or "")
            busy_until = peer.busy_until if peer.role == "worker" else 0.0
            away = peer.stopped or max(peer.reachable_at, busy_until) > ended_at
            if here is not None and now - here.last_seen <= SILENCE_S and not away:
                raise Broken(f"the run has ended, but not for {peer.name}")

    def _only_liar_left(self, peer: Client, most: int) -> bool:
        """Was the liar asked for the snapshots that this one missed, `most` in a row, only where
        nobody else could give, as at the end? What others do not give counts, too, as without a
        liar. A snapshot that has just begun, or whose giver had shown nothing, was not missed."""
        gave = self.server.gave.get(peer.process, [])
        then = [*(one.missed for one in gave[1:]), most]
        missed = [one for one, now in zip(gave, then, strict=False) if now == one.missed + 1]
        last = missed[-most:]
        apt = all(one.only or one.giver.host != LIAR for one in last)
        return apt and [one.missed for one in last] == list(range(most))

    def _has_lost_its_run(self, peer: Client) -> bool:
        """Is this a peer of a run that was given up, or of none yet, whose id is taken at the
        server's new place? Nobody answers it where its server was."""
        if peer.run is None:
            return peer.turned_away
        return peer.run != self.server.run

    def _check_last_step(self, peer: Client) -> None:
        """Who took part to the end stands there, unless what it lacks cannot be had any more."""
        end, behind = self.server.rounds.ended, peer.session is not None and peer.session.behind
        if end is None or (peer.replica.step != end.step and not behind):
            raise Broken(f"{peer.name} finished at step {peer.replica.step}, the run has {end}")

    def _within_reach(self) -> list[Client]:
        """Whom a server that was started again can hear since it listens."""
        since, now = self.server.booted_at, self.world.now
        return [
            p
            for p in self.alive
            if not p.stopped and p.reachable_at <= since and not self._computes(p, now)
        ]

    def _computes(self, peer: Client, now: float) -> bool:
        """Has the server moved while this one computed? It does not hear its beats then: it is
        looked for only when the step is done and half a heartbeat timeout of silence has
        followed; who has just found it is on its way to it."""
        moved = peer.port != self.net.port or peer.found_at >= now - HELLO_EVERY_S
        return moved and peer.busy_until >= now - SILENCE_S / 2 - HELLO_EVERY_S

    def _check_lost(self, lineages: set[str]) -> None:
        """Closed steps did not survive: then nobody holds them who could have been asked."""
        self.outcome.seen["steps lost"] += len(lineages)
        for peer in self._within_reach():
            if peer.role == "worker" and peer.replica.lineage in lineages:
                raise Broken(f"{peer.name} holds step {peer.replica.step}, which was lost")

    def _check_deserted(self) -> None:
        """A new run begins: then nobody of the old one could have come back."""
        self.outcome.seen["run given up"] += 1
        self._given_up = True
        for peer in self._within_reach():
            if peer.role == "worker" and peer.run == self.server.run:
                raise Broken(f"a new run begins, although {peer.name} could have come back")

    def _check_skipped(self, ledger: Ledger | None) -> None:
        """What is skipped is named, and what is named was no good: where nothing else kills
        workers, only what they die of."""
        lost = ledger.lost if ledger is not None else []
        calm = HARMLESS.issuperset(self.outcome.seen)
        for range_ in lost:
            self.outcome.seen[f"ranges {range_.why}"] += 1
            samples = samples_of(range_.lease)
            unread = self.habits.unreadable | self.server.unread_by_liar
            broken = unread if range_.why == UNREAD else self.habits.deadly
            if (calm or range_.why == UNREAD) and not broken.intersection(samples):
                raise Broken(f"{range_} is skipped, and nothing is wrong with it")

    def _check_taking_part(self) -> None:
        """Who could come back has done so by now."""
        since = self.server.ended_at - 5 * SILENCE_S if self.server.ended_at else 0.0
        if self.calm_at < since:
            for peer in self.alive:
                known = peer.welcome and peer.welcome.session in self.server.rounds.peers
                well = max(peer.born_at, peer.busy_until if peer.busy_since < since else 0.0)
                if well < since and not known and not self._has_lost_its_run(peer):
                    raise Broken(f"{peer.name} lives, but is not known any more")

    def _go_home(self) -> None:
        """All who train have enough of it."""
        for peer in self.alive:
            if peer.role == "worker":
                peer.habits.leaves = 1.0

    def _look_for_hang(self) -> None:
        """All who have samples hang, as soon as somebody got none. Near the end of the run one
        would hang after the other."""
        rounds, ledger = self.server.rounds, self.server.rounds.ledger
        ready = {p.id for p in rounds.workers_ready()}
        spare = {w for w in ready if rounds.share_of(w) == 0}
        members = set() if rounds.round is None else set(rounds.round.members)
        if rounds.ended is not None or (ledger and 2 * ledger.counted > ledger.total):
            return
        if not self.server.alive or not spare or not members or spare & members:
            self.world.after(TICK_S, self._look_for_hang)
            return
        self.outcome.seen["hang"] += 1
        for peer in self.alive:
            if peer.role == "worker" and peer.id in members:
                self.world.say(f"{peer.name} hangs")
                peer.habits.hangs_s = HANG_S

    def _check_expected(self, end: wire.End) -> None:
        """A run in whose log there is nothing ends only when all who were expected have left. Of
        one that its server's death found so the log may be lost: who returns to it counts."""
        departures = self.server.rounds._ending.departures
        came, least = len(departures._took_part), self.rules.num_workers
        left = end.reason.startswith(("every worker has", "no worker has"))
        if left and not self.server.book.step and not departures._contributed and came < least:
            raise Broken(f"{least - came} workers were still to come when the run ended")

    def _others_wait_elsewhere(self, end: wire.End) -> bool:
        """Were workers too few for a round, because those that lack wait where a run that was given
        up had its server?"""
        ready = len(self.server.rounds.workers_ready())
        lost = sum(p.role == "worker" and self._has_lost_its_run(p) for p in self.alive)
        idle = end.reason.startswith("nothing happened")
        return idle and ready < self.rules.min_workers <= ready + lost

    def _liar_has_left(self, end: wire.End) -> bool:
        """Did the run end because all who took part had left, and the liar was one of them, as any
        worker may be? Something of it must have been in the log, or nothing of anybody: a run whose
        only worker leaves before its first step is over. Nobody is awaited who fell silent."""
        if not self.lies or not end.reason.startswith("every worker has"):
            return False
        server = self.server
        went = dict(server.rounds._ending.departures._went)
        liar = went.pop(self.rules.max_workers, None)
        alone = server.book.step == 0 and not went and self.rules.num_workers == 1
        counts = alone or self.rules.max_workers in server.contributed
        return liar is not None and counts and all(d.how != SILENT for d in went.values())

    def _liar_read_nothing(self, end: wire.End) -> bool:
        """Did the run end because the liar said that it cannot read samples? Where others were
        trained on, something of it must have been in the log: else only what it says is skipped."""
        server, ledger = self.server, self.server.rounds.ledger
        if not server.unread_by_liar or "could not be read" not in end.reason or ledger is None:
            return False
        nothing = not ledger.done + ledger.partly
        return nothing or self.rules.max_workers in server.contributed

    def _check_given_up(self, end: wire.End) -> None:
        """Nobody who was within reach held the state, and could give it, when that was decided: who
        hangs cannot. With the liar as its only worker, or as the one that said which data set it
        has, no run goes on."""
        decided_at = self.server.ending_since or self.world.now
        since = decided_at - 2 * SILENCE_S
        workers = [p for p in self.alive if p.role == "worker" and not self._has_lost_its_run(p)]
        known = self.server.rounds.data_set
        if self.lies and (not workers or (known is not None and known.whose.endswith(AS_THE_LIAR))):
            return
        for peer in self.alive:
            near = not peer.stopped and peer.reachable_at <= since
            near &= not (peer.busy_since <= since and decided_at < peer.busy_until)
            if end.reason.startswith("every worker has failed") and peer.role != "worker":
                continue  # it holds the state, but nobody is there to go on with it
            if near and self.server.rounds.knows(peer.replica.step, peer.replica.lineage):
                raise Broken(f"the run was given up, but could have gone on: {end.reason}")

    def _check_waits(self, end: wire.End) -> None:
        """A run that nobody can go on with does not wait until `idle_timeout`."""
        if not end.reason.startswith("nothing happened") or not self.server.rounds.started:
            return
        rounds, since = self.server.rounds, (self.server.ended_at or 0.0) - 6 * SILENCE_S
        went = rounds._ending.departures._went.values()
        workers = [p for p in rounds.peers.values() if p.role == "worker"]
        counts = not rounds._ending.departures.goes_on or self.server.contributed
        counts = counts and not rounds._ending.departures.to_come
        if went and not workers and counts and all(d.how == LEFT and d.at < since for d in went):
            raise Broken(f"every worker had left, and the run waited on: {end.reason}")
        waiting = [p for p in self.alive if p.role == "worker" and p.born_at < since]
        if self.calm_at < since and waiting and "nobody here" in end.reason:
            raise Broken(f"nobody could help {waiting[0].name}, which waited on: {end.reason}")

    def _calm(self) -> None:
        """No more faults; where a process is down it is started again."""
        self.world.say("CALM")
        self.net.repeats = self.lost = 0.0
        for peer in self.alive:
            peer.habits.bad = peer.habits.pauses = peer.habits.sooner = peer.lost = 0.0
            peer.habits.stutters = 0.0
            peer.habits.leaves = float(self.home_at < self.world.now)
            peer.habits.compute_s = self.habits.compute_s
            peer.go_on()
        for shard in self.server.shards.values():
            shard.go_on()
        if self.server.stalled:
            self.server.go_on()
        self.server.dies_at = None
        self.server.restart()
        for slot in self.slots:
            self._start(slot)

    # ------------------------------------------------------------------ faults

    def _plan_faults(self) -> float:
        """Put faults at random moments; returns when the last of them is over."""
        rng, over = self.world.random, 0.0
        window = rng.choice((1.0, 3.0, 8.0, 15.0))
        for _ in range(rng.choice((0, 1, 2, 3, 5, 8))):
            start = rng.uniform(0.0, window)
            seconds = rng.choice((0.05, 0.5, 2.0, 6.0, 12.0)) * rng.uniform(0.5, 1.5)
            self.world.at(start, self._strike, rng.choice(FAULTS), rng.choice(self.slots), seconds)
            over = max(over, start + seconds)
        if rng.random() < 0.05:
            self.world.at(rng.uniform(0.0, 10.0), self._stop_run)
        return over + 0.001

    def _strike(self, fault: str, slot: int, seconds: float) -> None:
        """One fault."""
        if self.server.ended_at is not None:
            return
        world, rng, peer = self.world, self.world.random, self.at.get(slot)
        world.say(f"FAULT {fault} at {slot} for {seconds:.3f} s")
        self.outcome.seen[fault] += 1
        if fault == "stall the server":
            self.server.stalled = True
            world.after(seconds, self.server.go_on)
        elif fault == "kill the server":
            self.server.dies_at = rng.choice(MOMENTS)
            if self.server.dies_at is None:
                self.server.kill()
            world.after(seconds, self._start_server)
        elif peer is None or not peer.alive:
            return
        elif fault == "kill":
            peer.kill()
            world.after(seconds, self._start, slot)
        elif fault == "stop":
            peer.stop()
            peer.reachable_at = max(peer.reachable_at, world.now + seconds)
            world.after(seconds, peer.go_on)
        elif fault == "cut":
            lines = list(peer.lines.values())
            noticed_s = rng.choice((0.0, 0.0, seconds, 1.5 * SILENCE_S))
            peer.reachable_at = max(peer.reachable_at, world.now + seconds)
            for line in lines if rng.random() < 0.5 else rng.sample(lines, min(1, len(lines))):
                line.cut(seconds, noticed_s)
        elif fault == "hold":
            ways = rng.choice(((UP,), (DOWN,), (UP, DOWN)))
            peer.reachable_at = max(peer.reachable_at, world.now + seconds)
            for line in peer.lines.values():
                line.hold(world.now + seconds, ways)
        elif fault == "twin":
            if slot > 0:  # the key keeps a second observer out
                self._process(slot)
        else:
            whose, name, value = {
                "slow": (peer.habits, "compute_s", rng.choice((1.5, 6.0))),
                "bad": (peer.habits, "bad", 0.5),
                "leave": (peer.habits, "leaves", 0.5),
                "pause": (peer.habits, "pauses", 0.5),
                "lossy": (peer, "lost", 0.7),
            }[fault]
            world.after(seconds, setattr, whose, name, getattr(whose, name))
            setattr(whose, name, value)

    def _stop_run(self) -> None:
        """Ctrl-C at the server."""
        self.outcome.seen["stopped in order"] += 1
        self.server.stop("stopped by Ctrl-C")

    # ------------------------------------------------------------------ the run

    def run(self) -> Outcome:
        """Let it all happen; what is broken is told in the outcome."""
        outcome = self.outcome
        try:
            self._run()
        except Broken as e:
            outcome.failure = f"at {self.world.now:.3f} s: {e}"
        except Exception:
            outcome.failure = f"at {self.world.now:.3f} s: {traceback.format_exc(limit=-3)}"
        outcome.events = self.world.events
        return outcome

    def _check_refused(self, end: wire.End) -> None:
        """Each of the last rounds had gradients, and there was really something wrong with all."""
        if not {"bad", "liar"} & set(self.outcome.seen):
            raise Broken(f"nobody's numbers were bad: {end.reason}")
        for close in self.server.book.closes[-self.rules.max_bad_rounds :]:
            if close.contributors or not close.late:
                raise Broken(f"round {close.round} was not one of bad gradients: {end.reason}")

    def _run(self) -> None:
        outcome, server, world = self.outcome, self.server, self.world
        patience_s = PATIENCE_S + PATIENCE_FOR_A_SAMPLE_S * self.rules.epochs * self.habits.samples
        if not world.run(lambda: server.ended_at is not None, self.calm_at + patience_s):
            raise Broken(f"the run does not end: {server.rounds.phase(world.now)}")
        end, ledger = server.rounds.ended, server.rounds.ledger
        assert end is not None
        self._check_expected(end)
        if end.error and end.reason.startswith("no sample could be trained on"):
            outcome.seen["all samples skipped"] += 1
            assert ledger is not None
            server.book.check_end(ledger)
        elif end.error:
            self._check_waits(end)
            if self.home_at < world.now:
                outcome.seen["all went home"] += 1
            elif "gradients that had to be refused" in end.reason:
                outcome.seen["only bad gradients"] += 1
                self._check_refused(end)
            elif self._liar_has_left(end):
                outcome.seen["the liar left, and nobody else was there"] += 1
            elif self._liar_read_nothing(end):
                outcome.seen["the liar could read nothing"] += 1
            elif self._others_wait_elsewhere(end):
                outcome.seen["too few, since others wait where a server was"] += 1
            else:
                outcome.seen["state lost with all its holders"] += 1
                self._check_given_up(end)
        elif ledger is not None and (ledger.finished or self.habits.own):
            server.book.check_end(ledger)
        elif self._liar_has_left(end):
            outcome.seen["the liar left, and nobody else was there"] += 1
        elif not outcome.seen["stopped in order"]:
            raise Broken(f"the run ended before its samples did: {end.reason}")
        self._check_skipped(ledger)
        self._check_taking_part()
        if server.book.step != end.step:
            raise Broken(f"{server.book.step} updates were closed, the end has {end.step}")
        limit = max(world.now, self.calm_at) + DEADLINE_S + 10 * SILENCE_S
        limit += HANG_S if outcome.seen["hang"] else 0.0
        if not world.run(lambda: not self.alive and server.over_at is not None, limit):
            left = ", ".join(p.name for p in self.alive)
            raise Broken(f"the run has ended, but not for {left or 'the server'}")
        closes = server.book.closes
        outcome.seen["rounds of local steps"] += sum(c.local_steps > 1 for c in closes)
        if self.rules.shares == "speed":
            outcome.seen["unequal shares"] += sum(
                len(set(c.contributors.values())) > 1 for c in closes
            )
        outcome.seen["steps"] += end.step
        outcome.seen["last steps kept"] += server.kept
        outcome.seen["void rounds"] += server.voids
        outcome.seen[ENTERED] += server.data.entered
        outcome.seen["snapshots"] += server.rounds._snapshots.number
        outcome.seen["averages of shards"] += server.averages_elsewhere
        outcome.seen["pushes in an outbox"] += server.shared_pushes
        outcome.seen["averages in a shard's ring"] += server.shared_averages
        outcome.seen["averages handed on"] += server.relayed_averages


def simulate(seed: int, parts: Parts | None = None, *, sharded: bool = False) -> Outcome:
    """Run the schedule of a seed."""
    return Schedule(seed, parts, sharded=sharded).run()


def main() -> int:
    """The command line; see the module's head."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation", description="Whole runs with faults, in virtual time."
    )
    parser.add_argument("--seeds", type=int, default=10_000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed of them")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--verbose", action="store_true", help="tell what happens")
    parser.add_argument("--shards", action="store_true", help="several shards in all schedules")
    parser.add_argument("--only", help=f"in all schedules, joined by +: {', '.join(ONLY)}")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    args = parser.parse_args()
    try:
        mix = only(args.only) if args.only else Mix()
    except ValueError as e:
        parser.error(f"--only: {e}")
    first, count = (args.first, args.seeds) if args.seed is None else (args.seed, 1)
    start, seen = time.perf_counter(), Counter[str]()
    done = failed = events = 0
    for seed in range(first, first + count):
        tell = print if args.verbose else None
        outcome = Schedule(seed, tell=tell, sharded=args.shards, mix=mix).run()
        done, events = done + 1, events + outcome.events
        seen.update(outcome.seen)
        if outcome.failure is not None:
            failed += 1
            print(f"seed {seed} failed {outcome.failure}")
            options = " --shards" * args.shards
            options += f" --only {args.only}" if args.only else ""
            replay = f"python -m tests.simulation --seed {seed} --verbose{options}"
            print(f"  replay: {replay}", flush=True)
            if not args.keep_going:
                break
    seconds = time.perf_counter() - start
    print(", ".join(f"{what} {n}" for what, n in sorted(seen.items())))
    print(
        f"{done} schedules, {failed} failed; {events} events in {seconds:.1f} s, "
        f"{60 * done / seconds:.0f} schedules a minute"
    )
    return 1 if failed else 0
