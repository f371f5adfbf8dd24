"""Makes the status of a run (`paramserver.status.value`) from what the server knows.

`Overview` is told what happens, and asked for a status a few times a second. It decides nothing,
and keeps little: a thinned curve, the newest lines and events, and who has left. No clock: times
are passed in, `now` of the server's loop and `at` since 1970.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import msgspec

from paramserver.config.schema import flatten
from paramserver.net import jointoken
from paramserver.output.thinned import Thinned
from paramserver.protocol import messages as wire
from paramserver.rounds import states
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.ledger import Ledger
from paramserver.rounds.roster import Peer
from paramserver.rounds.round import Round
from paramserver.rounds.times import Sums, Took
from paramserver.server.traffic import Traffic
from paramserver.settings import BUCKET_SIZES, Settings
from paramserver.status.diagnosis import Told, diagnose
from paramserver.status.value import (
    EVALUATIONS_MAX,
    EVENTS_MAX,
    LINE_CHARS,
    LINES_KEPT,
    LINES_MAX,
    LOSSES_MAX,
    METRICS_MAX,
    OBSERVER,
    ROUNDS_KEPT,
    SERVER,
    SETTINGS_MAX,
    THIS_MACHINE,
    TIMES_MAX,
    WARNINGS_MAX,
    Evaluation,
    Event,
    EventKind,
    Link,
    LogLine,
    Machine,
    RoundTimes,
    Samples,
    State,
    Status,
    Times,
    finite,
)
from paramserver.words import shown

RATE_S = 3.0  # over which rates are means
GONE_S = 300.0  # for which those that left stay in the list
GONE_MAX = 64
ADDRESSES_MAX = 4096
SILENT_S = 3.0
LATE_S = 0.5  # after the quorum: who has pushed nothing by then is called late
UNSEEN = {
    "host_ip", "hosts", "port", "join", "id", "allow", "run_dir", "plain", "resume", "wandb",
    "dataset.root", "page", "page_port", "page_ip",
}  # fmt: skip
"""Settings that say nothing about the training: secrets, addresses, paths and accounts."""


@dataclass(frozen=True)
class Totals:
    """What the run came to, those who were started again before included."""

    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    loss: float | None = None
    tallies: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    """By worker: rounds, samples, late rounds."""


@dataclass(frozen=True)
class Mark:
    """How it stood at some time, for rates since then."""

    now: float
    totals: Totals
    samples: Mapping[int, int]
    """By worker."""
    bytes_of: Mapping[str, tuple[int, int]]
    """By session: bytes that came from it, and that went to it."""

    def rate(self, now: float, newer: int, older: int) -> float | None:
        """How much more a second; None where no time has passed."""
        seconds = now - self.now
        return max(0, newer - older) / seconds if seconds > 0 else None


class Mean(NamedTuple):
    """Of neighbouring steps; `step` is the last of them."""

    step: int
    total: float
    steps: int

    def with_next(self, later: Mean) -> Mean:
        return Mean(later.step, self.total + later.total, self.steps + later.steps)


class Overview:
    """The status of one run; see the module's docstring. `host` is the server's machine, `kind_of`
    says by what kind of interface it reaches an address ("" where that is not known); `keep` gets
    each new line of the log and each new event, for a server that goes on with the run."""

    def __init__(
        self,
        settings: Settings,
        run: str,
        folder: str,
        host: str,
        kind_of: Callable[[str], str] = lambda address: "",
        trial: int = 1,
        keep: Callable[[LogLine | Event], None] = lambda entry: None,
    ) -> None:
        self._settings, self._trial = settings, trial
        self._keep = keep
        self._kind_of = kind_of
        self._kinds: dict[str, str] = {}  # by address
        self._run, self._folder, self._host = run, folder, host
        self._a_step = 0  # samples of a step, where workers that are ready have told it
        self._changed = changed_settings(settings)
        self._losses: Thinned[Mean] = Thinned(LOSSES_MAX, Mean.with_next)
        self._evaluations: Thinned[Evaluation] = Thinned(EVALUATIONS_MAX, lambda _, newer: newer)
        self.lines: deque[LogLine] = deque(maxlen=LINES_KEPT)
        """The newest of the log, for the report; a status has fewer."""
        self._warnings: deque[LogLine] = deque(maxlen=WARNINGS_MAX)
        self._events: deque[Event] = deque(maxlen=EVENTS_MAX)
        self._gone: dict[int, tuple[Machine, float]] = {}  # workers by id, and since when
        self._here: dict[str, Machine] = {}  # by session, as last seen
        self._replicas: set[str] = set()  # sessions that were seen to hold the state
        self._marks: deque[Mark] = deque()
        self._minute: tuple[int, dict[int, Sums]] = (-1, {})
        self._took: Took | None = None  # the newest round of which times were made
        self._rounds: deque[RoundTimes] = deque(maxlen=ROUNDS_KEPT)
        self._ended = False

    # ------------------------------------------------------------------ what happens

    def closed(self, step: int, loss: float | None) -> None:
        if loss is not None and math.isfinite(loss):
            self._losses.add(Mean(step, loss, 1))

    def evaluated(self, step: int, loss: float | None, metrics: Mapping[str, float | None]) -> None:
        values = dict(list(metrics.items())[:METRICS_MAX])
        self._evaluations.add(Evaluation(step=max(0, step), loss=loss, metrics=values))

    def said(self, text: str, at: float, *, warning: bool = False) -> None:
        line = LogLine(at=at, text=jointoken.hidden(text), warning=warning)
        self.recall(line)
        self._keep(line)

    def event(
        self, kind: EventKind, step: int, at: float, text: str = "", machine: int | None = None
    ) -> None:
        event = Event(kind=kind, step=step, at=at, text=text, machine=machine)
        self.recall(event)
        self._keep(event)

    def recall(self, entry: LogLine | Event) -> None:
        """Take in a line or an event that was kept, perhaps by a server before this one."""
        if isinstance(entry, Event):
            self._events.append(entry)
            return
        self.lines.append(entry)
        if entry.warning:
            self._warnings.append(entry)

    # ------------------------------------------------------------------ the status

    def status(
        self,
        rounds: Rounds,
        totals: Totals,
        traffic: Traffic,
        own: wire.Vitals | None,
        late: str,
        now: float,
        at: float,
    ) -> Status:
        """The status as of now. `own`: the server's vitals; `late`: why the newest round closed
        without a member."""
        settings, ledger = self._settings, rounds.ledger
        before = self._mark(rounds, totals, traffic, now)
        if int(now) != self._minute[0]:
            self._minute = int(now), rounds.clocks.minute(now)
        machines = self._machines(rounds, totals, traffic, own, before, now)
        self._note_changes(rounds, machines, now, at)
        links = tuple(self._link(rounds, m, s, traffic) for s, m in machines.items() if m.id)
        here = [*machines.values(), *(machine for machine, _ in self._gone.values())]
        steps_per_s = before.rate(now, totals.steps, before.totals.steps)
        left = self._steps_left(rounds)
        doing, phase = rounds.doing(now), rounds.phase(now)
        trains = doing == wire.Phase.TRAINING
        end, ending = rounds.ended, rounds.ending
        local_steps = settings.local_steps
        if not isinstance(local_steps, int):  # auto
            local_steps = 1 if rounds.round is None else rounds.round.local_steps
        told = Told(
            trains=trains,
            phase=phase,
            codec=settings.codec,
            local_steps=local_steps,
            by_speed=settings.shares == "speed",
        )
        step, server = rounds.optimizer_steps, machines[""]
        return Status(
            run=self._run,
            made_at=at,
            folder=self._folder,
            trial=self._trial,
            runs=settings.runs,
            more=end is not None and end.more,
            model=str(settings.model.get("type", "")),
            phase=phase,
            doing=doing,
            end="" if end is None else end.reason,
            error=end.error if end is not None else ending is not None and ending[1],
            trains=trains,
            late=late,
            averaging="" if end is not None else rounds.shards.sentence,
            seconds=max(0.0, totals.seconds),
            step=step,
            total_steps=None if left is None else step + left,
            epoch=None if left is None or ledger is None else _epoch(ledger),
            num_epochs=settings.num_epochs,
            local_steps=local_steps,
            steps_per_s=steps_per_s,
            samples_per_s=before.rate(now, totals.samples, before.totals.samples),
            eta_s=finite(left / steps_per_s, 1e9) if left is not None and steps_per_s else None,
            loss=totals.loss,
            learning_rate=finite(rounds.clocks.learning_rate),
            losses=tuple((mean.step, mean.total / mean.steps) for mean in self._losses.items),
            evaluations=tuple(self._evaluations.items),
            sent_bytes=totals.sent_bytes,
            received_bytes=totals.received_bytes,
            sent_bytes_per_s=server.sent_bytes_per_s,
            received_bytes_per_s=server.received_bytes_per_s,
            machines=tuple(sorted(here, key=lambda m: (m.id < 0 or m.id > 0, m.id))),
            links=links,
            rounds=self._newest_rounds(rounds),
            samples=_samples(ledger, rounds),
            events=tuple(self._events),
            warnings=tuple(self._warnings),
            lines=tuple(self.lines)[-LINES_MAX:],
            settings=self._changed,
            diagnosis=diagnose(here, links, told),
        )

    def _steps_left(self, rounds: Rounds) -> int | None:
        """An estimate; None where the number of samples is not known."""
        ledger = rounds.ledger
        if ledger is None or not ledger.samples:
            return None
        # A loop of one's own has its own batch size. Who leaves at the end takes nothing back.
        asked = sum(p.ready.batch_size for p in rounds.workers_ready() if p.ready is not None)
        if asked and rounds.ending is None and rounds.ended is None:
            self._a_step = asked
        return -(-(ledger.total - ledger.counted) // (self._a_step or self._settings.batch_size))

    # ------------------------------------------------------------------ machines

    def _machines(
        self,
        rounds: Rounds,
        totals: Totals,
        traffic: Traffic,
        own: wire.Vitals | None,
        before: Mark,
        now: float,
    ) -> dict[str, Machine]:
        """By session; the server's is empty."""
        found = {
            "": Machine(
                id=SERVER,
                host=self._host,
                state=State.TRAINING if rounds.round is not None else State.IDLE,
                sent_bytes=totals.sent_bytes,
                received_bytes=totals.received_bytes,
                sent_bytes_per_s=before.rate(now, totals.sent_bytes, before.totals.sent_bytes)
                or 0.0,
                received_bytes_per_s=before.rate(
                    now, totals.received_bytes, before.totals.received_bytes
                )
                or 0.0,
                **_vitals(own),
            )
        }
        by_speed = self._settings.shares == "speed"
        for session, peer in rounds.peers.items():
            came, went = traffic.bytes_of(session)
            came_before, went_before = before.bytes_of.get(session, (came, went))
            trouble = _trouble(peer, rounds.round, now)
            minute = self._minute[1].get(peer.id) if peer.role == "worker" else None
            contributed, samples, late = totals.tallies.get(peer.id, (0, 0, 0))
            worker = peer.role == "worker"
            found[session] = Machine(
                id=peer.id if worker else OBSERVER,
                host=peer.host,
                kind="" if peer.join is None else peer.join.kind,
                device="" if peer.join is None else peer.join.device,
                state=self._state(peer, rounds, trouble, now),
                trouble=trouble or (rounds.disagreement.trouble(peer.id) if worker else ""),
                last_seen_s=max(0.0, now - peer.last_seen),
                share=rounds.share_of(peer.id) if worker and by_speed else None,
                samples_per_s=before.rate(now, samples, before.samples.get(peer.id, 0))
                if worker
                else None,
                samples=samples if worker else 0,
                rounds=contributed if worker else 0,
                late_rounds=late if worker else 0,
                minute=Times() if minute is None else _times(minute.parts),
                minute_rounds=0 if minute is None else minute.rounds,
                minute_late=0 if minute is None else minute.late,
                sent_bytes=came,
                received_bytes=went,
                sent_bytes_per_s=before.rate(now, came, came_before) or 0.0,
                received_bytes_per_s=before.rate(now, went, went_before) or 0.0,
                **_vitals(traffic.vitals.get(session)),
            )
        return found

    def _state(self, peer: Peer, rounds: Rounds, trouble: str, now: float) -> State:
        snapshot = rounds.snapshot
        if now - peer.last_seen > SILENT_S:
            return State.SILENT
        if peer.state == states.ADOPTING:
            return State.SNAPSHOT
        if snapshot is not None and peer.session in (snapshot.giver, snapshot.joiner):
            return State.SNAPSHOT
        if peer.state != states.REPLICA or (peer.role == "worker" and peer.ready is None):
            return State.JOINING
        member = None if rounds.round is None else rounds.round.member_of(peer)
        if peer.role != "worker" or rounds.round is None:
            return State.IDLE
        newest = rounds.clocks.newest[-1].parts.get(peer.id) if rounds.clocks.newest else None
        if trouble or peer.carried is not None or (member is not None and member.out is not None):
            return State.LATE
        if newest is not None and newest.late > 0:
            return State.LATE
        return State.IDLE if member is None else State.TRAINING

    def _note_changes(
        self, rounds: Rounds, machines: Mapping[str, Machine], now: float, at: float
    ) -> None:
        """Events: who came, who went, who took a snapshot."""
        step = rounds.optimizer_steps
        for session, peer in rounds.peers.items():
            if peer.state != states.REPLICA or session in self._replicas:
                continue
            self._replicas.add(session)
            machine = machines[session]
            if peer.given_by and rounds.log_begun:
                text = f"{machine.name} took a snapshot"
                self.event(EventKind.SNAPSHOT, step, at, text, machine.id)
            if peer.role == "worker":
                self.event(EventKind.JOINED, step, at, f"{machine.name} is here", machine.id)
        self._replicas = {s for s in self._replicas if s in rounds.peers}
        for session, machine in self._here.items():
            if session not in machines and machine.role == "worker":
                if rounds.ended is None:
                    self.event(EventKind.GONE, step, at, f"{machine.name} is gone", machine.id)
                if len(self._gone) < GONE_MAX:
                    self._gone[machine.id] = _gone(machine), now
        here = {machine.id for machine in machines.values()}
        for id, (_, since) in list(self._gone.items()):
            if now - since > GONE_S or id in here:
                del self._gone[id]
        self._here = dict(machines)
        if rounds.ended is not None and not self._ended:
            self._ended = True
            self.event(EventKind.ENDED, step, at, rounds.ended.reason)

    def _mark(self, rounds: Rounds, totals: Totals, traffic: Traffic, now: float) -> Mark:
        """Note how it stands now, and return how it stood some seconds ago."""
        bytes_of = {session: traffic.bytes_of(session) for session in rounds.peers}
        samples = {worker: counts[1] for worker, counts in totals.tallies.items()}
        self._marks.append(Mark(now, totals, samples, bytes_of))
        while len(self._marks) > 2 and now - self._marks[1].now > RATE_S:
            self._marks.popleft()
        return self._marks[0]

    def _link(self, rounds: Rounds, machine: Machine, session: str, traffic: Traffic) -> Link:
        address = traffic.addresses.get(session, "")
        measured = traffic.meter.rate(machine.id)
        if measured is None and address and machine.minute.cable > 0:
            # One bucket a round: both ways, in the time for which it was waited.
            share = machine.minute.cable / max(machine.minute.total, 1e-9)
            both = machine.sent_bytes_per_s + machine.received_bytes_per_s
            measured = both / max(share, 1e-3)
        return Link(
            machine=machine.id,
            address=address,
            kind=self._kind(address) if address else THIS_MACHINE,
            measured_bytes_per_s=finite(measured),
            expected_bytes_per_s=finite(traffic.expected.get(machine.id)),
        )

    def _kind(self, address: str) -> str:
        if address not in self._kinds:
            if len(self._kinds) >= ADDRESSES_MAX:
                self._kinds.clear()
            self._kinds[address] = self._kind_of(address)
        return self._kinds[address]

    # ------------------------------------------------------------------ times

    def _newest_rounds(self, rounds: Rounds) -> tuple[RoundTimes, ...]:
        newest = rounds.clocks.newest
        if newest and newest[-1] is not self._took:
            self._took = newest[-1]
            widest = max(len(took.parts) for took in newest)
            most = max(1, min(ROUNDS_KEPT, TIMES_MAX // max(1, widest)))
            self._rounds.clear()
            for took in list(newest)[-most:]:
                parts = {worker: _times(part) for worker, part in took.parts.items()}
                self._rounds.append(RoundTimes(took.step, round(took.seconds, 6), parts))
        return tuple(self._rounds)


def _gone(machine: Machine) -> Machine:
    """A machine that left, as it stays in the list."""
    return msgspec.structs.replace(
        machine,
        state=State.GONE,
        trouble="gone",
        share=None,
        samples_per_s=None,
        sent_bytes_per_s=0.0,
        received_bytes_per_s=0.0,
    )


def _times(parts: Collection[float]) -> Times:
    return Times(*(round(seconds, 6) for seconds in parts))


def _vitals(told: wire.Vitals | None) -> dict[str, Any]:
    """The fields of a machine that a peer tells of itself."""
    if told is None:
        return {}
    return {
        "memory_bytes": max(0, told.memory_bytes),
        "memory_free_bytes": max(0, told.free_bytes),
        "memory_total_bytes": max(0, told.total_bytes),
        "temperature_c": told.temperature_c
        if told.temperature_c is not None and -100 <= told.temperature_c <= 1000
        else None,
    }


def _epoch(ledger: Ledger) -> int:
    """The epoch that is being computed; 1 is the first."""
    return min(ledger.epochs, ledger.counted // ledger.samples + 1)


def _samples(ledger: Ledger | None, rounds: Rounds) -> Samples:
    if ledger is None:
        return Samples()
    leased = [lease for peer in rounds.peers.values() for lease in peer.leases if lease != wire.OWN]
    return Samples(
        of_epoch=ledger.samples,
        total=ledger.total if ledger.samples else 0,
        done=ledger.done,
        partly=ledger.partly,
        skipped=ledger.skipped,
        leased=sum(stop - start for _, start, stop in leased),
        returned=ledger.returned,
    )


def _trouble(peer: Peer, current: Round | None, now: float) -> str:
    silent = now - peer.last_seen
    if silent > SILENT_S:
        return f"silent for {silent:.1f} s"
    if peer.role != "worker":
        return ""
    if peer.ready is None:
        return "joining"
    if current is not None and current.quorum_at is not None and now - current.quorum_at > LATE_S:
        member = current.members.get(peer.id)
        if member is not None and member.out is None and len(member.got) == 0:
            return f"late {now - current.quorum_at:.1f} s"
    return ""


def changed_settings(settings: Settings) -> dict[str, str]:
    """The settings that are not the default, by name, as a person writes them."""
    usual, found = flatten(asdict(Settings())), dict[str, str]()
    left = replace(settings, bucket_mb=None, min_bucket_mb=None)
    unset = [left.with_bucket(linked=False), left.with_bucket(linked=True)]
    unset += [left.with_bucket(linked=True, **kind) for kind in ({"fast": True}, {"slow": True})]
    for name, value in flatten(asdict(settings)).items():
        if name in UNSEEN or name.partition(".")[0] in UNSEEN:
            continue
        if name in BUCKET_SIZES and any(value == getattr(each, name) for each in unset):
            continue  # what null means
        if value != usual.get(name):
            found[name] = shown(value, LINE_CHARS)
    return dict(list(found.items())[:SETTINGS_MAX])
