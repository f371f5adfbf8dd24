"""Thousands of whole runs with faults in virtual time, and proof that they would show a mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import planted
import pytest
from simulation import Parts, Schedule, simulate
from simulation.mix import only
from simulation.worker import Worker

from paramserver.protocol import messages as wire
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.effects import Effect, PassOn, Void
from paramserver.rounds.events import Event, Pushed, Relinked, Told
from paramserver.rounds.late import Carried
from paramserver.rounds.ledger import PARTLY, RETURNED, Ledger, OwnLedger, Suspect
from paramserver.rounds.recovery import NOTHING
from paramserver.rounds.roster import Peer
from paramserver.rounds.round import Member, Round
from paramserver.rounds.snapshots import Snapshot
from paramserver.server.control import Control
from workers.link import follow
from workers.link.actions import Action, Joined
from workers.link.connection import ServerSearch
from workers.link.follow import Follow
from workers.link.pushes import Pushes
from workers.link.session import Session
from workers.local_rounds import LocalRounds

CLONE = Path(__file__).resolve().parent.parent
SCHEDULES = 2000
BLOCK = 250
SEARCHED = 3000
"""Seeds in which a planted fault must show."""


@pytest.mark.parametrize(
    "first",
    [0, *(pytest.param(first, marks=pytest.mark.long) for first in range(BLOCK, SCHEDULES, BLOCK))],
)
def test_the_promises_hold_under_faults(first: int) -> None:
    failed = [o for seed in range(first, first + BLOCK) if (o := simulate(seed)).failure]
    told = "\n".join(f"python -m tests.simulation --seed {o.seed}: {o.failure}" for o in failed)
    assert not failed, told


def test_schedules_have_what_they_are_made_for() -> None:
    seen = sum((simulate(seed).seen for seed in range(350)), start=simulate(350).seen)
    faults = ("kill", "kill the server", "stop", "cut", "hold", "twin", "pause")
    for what in (
        *faults,
        "liar",
        "own samples",
        "pairs",
        "snapshots",
        "void rounds",
        "rounds of local steps",
        "left its loop sooner",
        "went on during an exchange",
        "unequal shares",
        "late work is carried over",
        "late buckets that entered a round",
        "steps",
        "steps lost",
        "run given up",
    ):
        assert seen[what] > 5, f"{what} hardly ever happens: {seen}"
    assert seen["steps"] > 500
    assert seen["ranges killed"] > 5 and seen["ranges unread"] > 5


def test_a_seed_replays_in_any_process() -> None:
    here: list[str] = []
    Schedule(7, tell=here.append).run()
    there = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seed", "7", "--verbose"],
        cwd=CLONE,
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert there[: len(here)] == here
    assert sum("Close(round=" in line for line in here) > 5
    assert "1 schedules, 0 failed" in there[-1]


def test_narrow_schedules_all_have_what_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from simulation import schedule

    made = [Schedule(seed, mix=only("late+small+honest+home")) for seed in range(8)]
    assert all(s.rules.max_staleness or s.rules.deterministic for s in made)
    assert all(s.habits.samples <= 70 and s.home_at < 10 and not s.lies for s in made)
    assert all(Schedule(seed, mix=only("liar+local")).lies for seed in range(8))
    words = ["--shards", "--only", "machines+small", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["simulation", *words])
    monkeypatch.setattr(schedule, "Parts", lambda: Parts(rounds=ForgetsLeases))
    assert schedule.main() == 1
    assert "--seed 3 --verbose --shards --only machines+small" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["simulation", "--only", "late+lame"])
    with pytest.raises(SystemExit):
        schedule.main()
    assert "'lame' is none of late, pairs," in capsys.readouterr().err


def test_a_failure_is_told_with_the_command_that_replays_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from simulation import schedule

    monkeypatch.setattr(schedule, "Parts", lambda: Parts(rounds=ForgetsLeases))
    monkeypatch.setattr(sys, "argv", ["simulation", "--seeds", "200"])
    assert schedule.main() == 1
    told = capsys.readouterr().out
    replay = re.search(r"seed (\d+) failed .*\n  replay: python -m tests.simulation (.*)", told)
    assert replay is not None
    monkeypatch.setattr(sys, "argv", ["simulation", *replay[2].split()])
    assert schedule.main() == 1
    assert f"seed {replay[1]} failed" in capsys.readouterr().out


# ------------------------------------------------------------------------------ planted faults
#
# Each is one small mistake of the kind that a later change might make.


class ForgetsLeases(Rounds):
    """The leases of a peer that is gone are not returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leases.take_back = lambda peer, current: peer.leases.clear()  # type: ignore[method-assign]


class TakesLatePushes(Rounds):
    """A gradient of an earlier round goes into the open one."""

    def refusal(self, session: str, push: wire.Push) -> str | None:
        if self.round is not None:
            push = msgspec.structs.replace(push, round=self.round.number)
        return super().refusal(session, push)


class CountsTwice(Rounds):
    """A bucket that comes twice is added twice."""

    def refusal(self, session: str, push: wire.Push) -> str | None:
        why = super().refusal(session, push)
        return None if why is not None and "came twice" in why else why

    def handle(self, event: Event, now: float) -> list[Effect]:
        if isinstance(event, Pushed) and self.round is not None:
            member = self.round.members.get(self.peers[event.session].id)
            if member is not None:  # else it brings late work
                member.added.discard(event.push.bucket)
        return super().handle(event, now)


class AdmitsEverybody(Rounds):
    """A fresh replica is told to follow, as if all began with the same weights."""

    def knows(self, step: int, lineage: str) -> bool:
        return step == 0 or super().knows(step, lineage)


class KeepsOldMembers(Rounds):
    """Who joins again in the middle of a round is still waited for."""

    def _take_out(self, peer: Peer, why: str, now: float) -> None:
        round_, self.round = self.round, None
        super()._take_out(peer, why, now)
        self.round = round_


class SaysNothingAfterACut(Rounds):
    """What was lost with a connection is not asked for again."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        return [] if isinstance(event, Relinked) else super().handle(event, now)


class AwaitsNobody(Rounds):
    """A server that was started again goes on with whoever greets first."""

    def __init__(self, *args: Any, recovery: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, recovery=recovery and NOTHING, **kwargs)


class ForgetsTheLedger(Rounds):
    """A server that was started again begins its epochs anew."""

    def _become_origin(self, peer: Peer, message: wire.Join) -> bool:
        return super()._become_origin(peer, msgspec.structs.replace(message, ledger=None))


class EndsBeforeItIsKept(Rounds):
    """The run ends when the observer holds the last step; that it is on disk is taken for sure."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Told(message=wire.Stand(step=step)):
                event = Told(event.session, wire.Stand(step, kept=True))
        return super().handle(event, now)


class AwaitsNoOtherObserver(Rounds):
    """The end does not wait for an observer that was started again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        awaits, end = self._ending.awaits_observer, self._ending
        end.awaits_observer = lambda *a: self.observer is not None and awaits(*a)  # type: ignore[method-assign]


class WaitsForNobody(Rounds):
    """Nobody is left, and the run waits on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ending.nobody_left_until = lambda *_: None  # type: ignore[method-assign]


class WaitsForALostState(Rounds):
    """Nobody holds what those who have joined wait for, and they wait on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ending._look_for_holder = lambda *_: None  # type: ignore[method-assign]


class WaitsForTheOverdue(Rounds):
    """A round waits for its members as long as they beat, whoever else is there."""

    def _look_for_the_overdue(self, now: float) -> None:
        pass


class WaitsForTheEmpty(Rounds):
    """Who holds a lease and never pushes is waited for in every round."""

    def _judge(self, peer: Peer, member: Member, now: float, **more: Any) -> None:
        member.timed_out = False
        super()._judge(peer, member, now, **more)


class SparesNobodyForThoseWhoHang(Rounds):
    """Who is so slow that it gets no samples gets none where those who have them hang."""

    def _could_take_part(self, current: Round, now: float) -> list[Peer]:
        could = super()._could_take_part(current, now)
        return [p for p in could if self._leases.share_of(p.id) != 0]


class EndsBeforeOthersCame(Rounds):
    """Who comes first, alone, and leaves before the first update ends the run of the others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ending.departures._expected = 0


class BlamesTheNextLease(Rounds):
    """Who fell silent while it was late is taken to have died of a lease that it never saw."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leases._may_compute_still = lambda *_: None  # type: ignore[method-assign]


class GivesWithoutEnd(Rounds):
    """Who joins again and again gets a snapshot each time, before the rounds of others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._snapshots.may_take = lambda now, in_vain: ("observer", "worker")  # type: ignore[method-assign]


class AsksTheSameForEver(Rounds):
    """Who gave nothing is asked again, although others could give or it has proven nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._snapshots._gave_nothing = lambda *_: False  # type: ignore[method-assign]


class BelievesAdopted(Rounds):
    """Who says that it holds a snapshot holds it."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event, self.snapshot:
            case Told(message=wire.Adopted() as m), Snapshot() as snap:
                if (snap.number, snap.joiner) == (m.snapshot, event.session):
                    snap.pieces = len(snap.delivered)
        return super().handle(event, now)


class PassesEverythingOn(Rounds):
    """Any part of a snapshot goes on, and counts as progress."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event, self.snapshot:
            case Told(session=told, message=wire.Want() as want), Snapshot(joiner=joiner) as snap:
                if told == joiner:
                    snap.progress_at = now
                    return [PassOn(snap.giver, want)]
        return super().handle(event, now)


class ComparesAnySteps(Rounds):
    """Digests of different steps are compared with each other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        digests = self._divergence.digests
        report = digests.report
        digests.report = lambda step, *more: report(0, *more)  # type: ignore[method-assign]


class CountsWhatWasNotComputed(Rounds):
    """Who stops sooner in a round of local steps is taken to have worked off its whole lease."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leases.stops_sooner = lambda *_: None  # type: ignore[method-assign]


class BlamesNoLeaseAhead(Rounds):
    """Who dies while its last steps are exchanged died of nothing that it computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leases.computed_by = lambda peer, now: now and now.computed_by(peer)  # type: ignore[method-assign]


class CarriesWhatIsPartlyThere(Rounds):
    """Who is late is carried although buckets of it are averaged: the rest enters a later round."""

    def _goes_on_without(self, current: Round, member: Member, now: float) -> None:
        got, member.got = member.got, set()
        super()._goes_on_without(current, member, now)
        member.got = got

    def _push_late(self, peer: Peer, carried: Carried, *more: Any) -> bool:
        carried._buckets = 1  # it is taken for complete
        return super()._push_late(peer, carried, *more)


class HandsOutWhatIsCarried(Rounds):
    """The lease of who is late comes back, as if nothing of it were awaited."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        carry = self._leases.carry

        def returns(current: Round, peer: Peer, now: float) -> None:
            carry(current, peer, now)
            assert self.ledger is not None and peer.carried is not None
            if not self._leases.own:
                self.ledger._put_back(peer.carried.lease)

        self._leases.carry = returns  # type: ignore[method-assign]


class CarriesForEver(Rounds):
    """However old a gradient is, it enters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leases.drop_old = lambda step: None  # type: ignore[method-assign]


class EntersAtAnyTime(Rounds):
    """A late gradient enters a round of which buckets are averaged: its part in them is lost."""

    def _let_in(self, now: float) -> bool:
        finished = set() if self.round is None else set(self.round.finished)
        if self.round is not None:
            self.round.finished.clear()
        entered = super()._let_in(now)
        if self.round is not None:
            self.round.finished |= finished
        return entered


class EntersOneByOne(Rounds):
    """Of several late gradients the first may complete the round: the others are lost."""

    def _let_in(self, now: float) -> bool:
        if (current := self.round) is not None:
            current.let_in = lambda entering, now: [  # type: ignore[method-assign]
                effect
                for worker, its in entering.items()
                for effect in Round.let_in(current, {worker: its}, now)
            ]
        return super()._let_in(now)


class WeighsLateWorkFully(Rounds):
    """What a gradient weighs does not depend on its age."""

    def _let_in(self, now: float) -> bool:
        for peer in self.peers.values():
            if peer.carried is not None and self.round is not None:
                peer.carried.made_at = self.round.step - 1
        return super()._let_in(now)


class CarriesForTheDead(Rounds):
    """Who is gone keeps the lease of what it would have brought late."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leases.take_back = self._leases.take_back_new  # type: ignore[method-assign]


class AwaitsWhatIsVoid(Follow):
    """A worker waits for what becomes of its late gradient, whatever lease it has got since."""

    def _late(self, worker: int) -> wire.CarriedOver | None:
        return self._carried.get(worker)


class KeepsLinks(Control):
    """The link of a peer that is gone stays bound to its session."""

    def _forget_peer(self, session: str) -> None:
        links = dict(self.links)
        super()._forget_peer(session)
        self.links = links


class BindsTheFirstLinkOnly(Control):
    """A peer whose link was cut is not answered on the next one."""

    def _probe(self, route: bytes, probe: wire.Probe, now: float) -> None:
        if self.routes.get(probe.session, route) == route:
            super()._probe(route, probe, now)


class FetchesWithoutLooking(Control):
    """Who asks for updates gets what there is, whether they follow what it holds or not."""

    def _fetch(self, session: str, fetch: wire.Fetch, now: float) -> None:
        for update in self._data.fetch(fetch.step):
            self._send_update(self.routes[session], update)
        self._send(session, wire.Fetched(self.rounds.step, open=self.rounds.open_message()))


class KeepsWhatIsOverwritten(Control):
    """Where void rounds have written over every update in the ring, none counts as gone."""

    def _forget_overwritten(self, now: float) -> None:
        if self._data.reaches_back_to() is not None:
            super()._forget_overwritten(now)


class KeepsVoidSums(Control):
    """What was summed in a void round stays."""

    def _carry_out(self, effects: list[Effect], *more: Any) -> None:
        super()._carry_out([e for e in effects if not isinstance(e, Void)], *more)


class AsksNobodyForItsSecret(Control):
    """A link is bound to whatever session its probe names."""

    def _is_from(self, message: wire.Probe | wire.Beat) -> bool:
        return True


class AppliesTwice(Follow):
    """After a fetch, an update that also came over SUB is applied again."""

    def close(self, m: wire.Close) -> follow.Effect:
        return follow.Apply(m) if m.step == self.step else super().close(m)


class KeepsVoidAverages(Follow):
    """What was taken of a void round stays."""

    def average(self, m: wire.Average) -> follow.Effect:
        effect = super().average(m)
        return follow.Take(m) if isinstance(effect, follow.Take) else effect


class KnowsOneServerOnly(Follow):
    """The end of its run under a server that was started again is another run's."""

    def ended(self, m: wire.End) -> follow.Effect:
        return super().ended(msgspec.structs.replace(m, run=""))


class JumpsGaps(Follow):
    """A close is applied though an average before it was lost."""

    def close(self, m: wire.Close) -> follow.Effect:
        if m.step == self.step + 1:
            return follow.Apply(m)
        return super().close(m)


class IgnoresPulses(Follow):
    """Only a later message shows that one was lost; after the last one none comes."""

    def pulse(self, m: wire.Pulse, now: float) -> follow.Effect:
        effect = super().pulse(m, now)
        return follow.NOTHING if isinstance(effect, follow.Gap) else effect


class Listens(Session):
    """SUB counts as a sign of life, although the link may be dead."""

    def _published(self, message: Any, payload: Any, now: float) -> list[Action] | None:
        self.follow.heard(now)
        return super()._published(message, payload, now)


class CountsTheWelcomed(Session):
    """Once welcomed, a peer counts as one who holds the run, whatever it began with."""

    def greeted(self, nonce: str, now: float, **more: Any) -> list[Action]:
        return [Joined(), *super().greeted(nonce, now, **more)]


class KeepsWhatIsLost(Session):
    """An average that was written over in the ring counts as taken."""

    def lost(self, average: wire.Average) -> None:
        pass


class WaitsForAverages(Pushes):
    """A push waits until the average before it has come, however long that takes."""

    def due(self, now: float) -> list[tuple[wire.Push, list[Any]]]:
        self._pacer._moved_at = now
        return super().due(now)


class LooksNowhere(ServerSearch):
    """A server that has moved is waited for where it was."""

    def found(self, now: float) -> bool:
        return False


class GoesOnWithAnyLease(LocalRounds):
    """Steps that were made ahead are pushed for whatever lease the next round brings."""

    def is_open(self) -> bool:
        follow = self._client.follow
        if self.under_way is not None and follow is not None:
            found = follow.lease(self._worker, self.under_way)
            self.ahead = self.ahead if found is None else found[1]
        return super().is_open()


class LooksForNoEnd(Worker):
    """It greets again whatever lies in its sockets, the run's end, too."""

    def _look_for_end(self) -> None:
        pass


def test_what_is_planted_takes_what_the_methods_that_it_replaces_take() -> None:
    assert not planted.misfits(sys.modules[__name__])


@pytest.mark.long
@pytest.mark.parametrize(
    ("parts", "symptom", "first"),
    [
        (Parts(rounds=ForgetsLeases), "could have gone on|the ledger keeps", 8),
        (Parts(rounds=TakesLatePushes), "a gradient of another model|late or not", 4),
        (
            Parts(rounds=CountsTwice),
            "pushed and taken, but is not in|a sum of .* is divided by",
            43,
        ),
        (Parts(rounds=AdmitsEverybody), "another model", 0),
        (Parts(rounds=KeepsOldMembers), "KeyError|could have gone on", 8),
        (Parts(rounds=SaysNothingAfterACut), "does not end|could have gone on", 132),
        (Parts(rounds=AwaitsNobody), "holds step .*, which was lost", 102),
        (Parts(rounds=ForgetsTheLedger), "twice in bucket|samples done", 12),
        (Parts(session=CountsTheWelcomed), "of another log|another model than the log", 252),
        (Parts(rounds=EndsBeforeItIsKept), "is on no disk", 0),
        (Parts(rounds=AwaitsNoOtherObserver), "is on no disk", 698),
        (Parts(rounds=WaitsForNobody), "every worker had left, and the run waited on", 112),
        (Parts(rounds=WaitsForALostState), "nobody could help", 37),
        (Parts(rounds=WaitsForTheEmpty), "in a row waited for|could have gone on", 29),
        (Parts(rounds=WaitsForTheOverdue), "could have gone on", 6467),
        (Parts(rounds=SparesNobodyForThoseWhoHang), "could have gone on", 29),
        (Parts(rounds=EndsBeforeOthersCame), "were still to come", 2250),
        (Parts(rounds=BlamesTheNextLease), "nothing is wrong with it", 43202),
        (Parts(rounds=GivesWithoutEnd), "two snapshots in a row", 12),
        (Parts(rounds=AsksTheSameForEver), "did not arrive|could have gone on", 501523),
        (Parts(rounds=BelievesAdopted), "without all its pieces", 39),
        (Parts(rounds=PassesEverythingOn), "passed on twice|could have gone on|not to be had", 3),
        (Parts(rounds=ComparesAnySteps), "was found wrong, and is right", 3),
        (Parts(rounds=CountsWhatWasNotComputed), "samples of worker . weigh", 174),
        (Parts(rounds=BlamesNoLeaseAhead), "does not end", 8917),
        (Parts(local=GoesOnWithAnyLease), "counted wait to be leased again", 1714),
        (Parts(rounds=CarriesWhatIsPartlyThere), "samples partly", 35),
        (Parts(rounds=HandsOutWhatIsCarried), "sums do not agree", 14),
        (Parts(rounds=CarriesForEver), "is older than", 61),
        (Parts(rounds=EntersAtAnyTime), "is divided by", 61),
        (Parts(rounds=EntersOneByOne), "3 samples done, 2 are in every bucket", 90004546),
        (Parts(rounds=WeighsLateWorkFully), "samples of worker . weigh", 54),
        (Parts(rounds=CarriesForTheDead), "could have gone on|payloads are kept", 519),
        (Parts(follow=AwaitsWhatIsVoid), "could have gone on", 241),
        (Parts(control=KeepsLinks), "links are kept", 0),
        (Parts(control=BindsTheFirstLinkOnly), "has ended, but not for|does not end", 3168),
        (Parts(control=FetchesWithoutLooking), "has ended, but not for", 3),
        (Parts(control=KeepsVoidSums), "a sum of .* is divided by|payloads are kept", 3945),
        (Parts(control=KeepsWhatIsOverwritten), "lineages are kept", 82),
        (Parts(control=AsksNobodyForItsSecret), "KeyError|are kept", 23),
        (Parts(follow=AppliesTwice), "another model than the log", 1),
        (Parts(follow=KeepsVoidAverages), "another model than the log", 36),
        (Parts(follow=JumpsGaps), "another model than the log", 7),
        (Parts(follow=KnowsOneServerOnly), "sent away although", 501714),
        (Parts(follow=IgnoresPulses), "could have gone on|not for", 40),
        (Parts(session=Listens), "could have gone on|lives|but not for", 690),
        (Parts(session=KeepsWhatIsLost), "another model than the log", 138),
        (Parts(pushes=WaitsForAverages), "could have gone on|does not end", 40),
        (Parts(worker=LooksForNoEnd), "sent away although", 221),
        (Parts(search=LooksNowhere), "was lost|could have come back|sent away", 8),
    ],
    ids=planted.name,
)
def test_a_planted_fault_is_found(parts: Parts, symptom: str, first: int) -> None:
    planted.is_found(parts, symptom, first, SEARCHED)


@pytest.mark.long
def test_a_ledger_that_returns_what_was_partly_used_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settle = Ledger.settle
    monkeypatch.setattr(
        Ledger,
        "settle",
        lambda self, lease, how, *more: settle(
            self, lease, RETURNED if how == PARTLY else how, *more
        ),
    )
    failures = (simulate(seed).failure for seed in range(SEARCHED))
    failure = next(filter(None, failures), None)
    assert failure is not None and "samples" in failure


@pytest.mark.long
def test_a_lease_that_kills_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "died", lambda self, lease, **how: None)
    failures = (simulate(seed).failure for seed in (9, *range(SEARCHED)))
    failure = next(filter(None, failures), None)
    assert failure is not None and "does not end" in failure


@pytest.mark.long
def test_a_ledger_that_skips_what_is_only_beside_what_kills_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Suspect, "due", property(lambda self: True))
    failures = (simulate(seed).failure for seed in range(SEARCHED))
    failure = next(filter(None, failures), None)
    assert failure is not None and "nothing is wrong with it" in failure


@pytest.mark.long
def test_own_samples_that_are_counted_although_they_are_in_no_update_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def settle(self: OwnLedger, lease: wire.Lease, how: str, *more: Any) -> None:
        self._leased.add(lease)
        Ledger.settle(self, lease, PARTLY if how == RETURNED else how)

    monkeypatch.setattr(OwnLedger, "settle", settle)
    failures = (simulate(seed).failure for seed in range(SEARCHED))
    failure = next(filter(None, failures), None)
    assert failure is not None and "samples partly" in failure


@pytest.mark.long
def test_a_lease_that_is_done_with_the_first_of_its_rounds_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begins = Ledger.begin

    def begin(self: Ledger, lease: wire.Lease, unread: Sequence[int] = ()) -> None:
        begins(self, lease, unread)
        self.done += self._begun.pop()[1]

    def finish(self: Ledger, lease: wire.Lease, how: str) -> None:
        self._leased.discard(lease)

    monkeypatch.setattr(Ledger, "begin", begin)
    monkeypatch.setattr(Ledger, "finish", finish)
    failures = (simulate(seed).failure for seed in range(SEARCHED))
    failure = next(filter(None, failures), None)
    assert failure is not None and "samples done" in failure


@pytest.mark.long
def test_who_enters_in_the_middle_of_a_lease_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's lease goes on then: what an update has a part of is handed out no more, and the
    others' steps are for leases that they have not."""
    monkeypatch.setattr(Rounds, "_going_on", lambda self: [])
    failures = (simulate(seed).failure for seed in range(SEARCHED))
    failure = next(filter(None, failures), None)
    assert failure is not None


def test_the_schedule_of_a_seed_is_the_same_with_other_parts() -> None:
    """Else a planted fault would be found in another schedule than the one it is shown in."""
    assert Schedule(5).rules == Schedule(5, Parts(follow=JumpsGaps)).rules
