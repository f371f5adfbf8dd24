"""What a replica does about each message, as scripts of messages and the actions that follow."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from test_follow import NONCE, Log, Standing

from paramserver.errors import RunLost, UserError
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import Ledger
from workers.link.actions import (
    Adopt,
    Apply,
    Begin,
    Closed,
    Compare,
    Give,
    Greet,
    Hear,
    Join,
    Joined,
    Missed,
    Probe,
    Say,
    Send,
    SendPiece,
    Silent,
    Take,
    TakePiece,
)
from workers.link.session import Session

TIMEOUT_S = 10.0
READY = wire.Ready(samples=100, batch_size=10)
GREET = wire.Greet(session_known=False)
AGAIN = wire.Greet(session_known=True, join=True)
RELINKED = wire.Greet(session_known=True)


class Peer:
    """A replica and its session, and a client that carries out what makes a state."""

    def __init__(self, role: str = "worker", **options: Any) -> None:
        self.log = Log()
        self.log.ledger = Ledger(100, 1).state()
        self.log.open()
        self.now = 0.0
        self.replica = Standing(0, "first")
        self.session = Session(self.replica, role, **options)
        assert self.greeted() == [Join()]

    def greeted(self, nonce: str = NONCE) -> list[Any]:
        return self.session.greeted(
            nonce, self.now, timeout_s=TIMEOUT_S, digest_steps=2, run="run-1"
        )

    def admitted(self, action: str, step: int = 0, missed: int = 0) -> list[Any]:
        admit = wire.Admit(action=action, step=step, lineage="", missed=missed)
        assert self.get(admit) == [Hear(admit)]
        return self.session.admitted(admit, self.now)

    def get(self, message: Any, payload: Any = None) -> list[Any]:
        """From the link."""
        return self.session.received(message, payload, self.now)

    def hear(self, message: Any, payload: Any = None) -> list[Any]:
        """From SUB."""
        self.session.held.append((message, payload))
        return self.session.next(self.now)

    def apply(self, close: wire.Close) -> list[Any]:
        self.replica.step, self.replica.lineage = close.step, close.lineage
        return self.session.applied(close, self.now)

    def follow(self, *messages: Any, hear: bool = True) -> list[Any]:
        """Carry out updates; what follows from the last one."""
        found: list[Any] = []
        for message in messages:
            found = self.hear(message) if hear else self.get(message)
            if isinstance(message, wire.Close):
                [apply] = found
                assert isinstance(apply, Apply)
                found = self.apply(apply.close)
        return found

    def fetch(self) -> Send:
        return Send(wire.Fetch(step=self.replica.step, lineage=self.replica.lineage))


@pytest.fixture
def peer() -> Peer:
    """A worker that follows."""
    peer = Peer()
    assert peer.admitted("follow") == [Joined()]
    return peer


def manifest(snapshot: int, step: int = 3) -> wire.Manifest:
    return wire.Manifest(
        snapshot=snapshot, step=step, lineage="third", tree="", tensors=(), piece_bytes=1
    )


# ------------------------------------------------------------------------------- following


def test_an_update_is_taken_applied_and_told(peer: Peer) -> None:
    first, second, close = peer.log.update()
    assert peer.hear(first, b"a") == [Take(first, b"a", first=True)]
    assert peer.hear(second, b"b") == [Take(second, b"b", first=False)]
    assert peer.hear(close) == [Apply(close, first=False)]
    assert peer.session.follow.step == 0, "the replica alone says where it stands"
    assert peer.apply(close) == [Closed(close)]
    assert peer.session.follow.step == 1


def test_an_end_under_a_server_that_has_not_let_it_in_ends_it(peer: Peer) -> None:
    """It would ask for the update that it lacks, and greet again, while nobody answers."""
    peer.log.update()
    end = msgspec.structs.replace(peer.log.end(), nonce="server-2", run="run-1")
    assert peer.hear(end) == [Say("the run ended at step 1, this replica at 0")]
    assert peer.session.ended == end and peer.session.left_behind


def test_digests_are_compared_now_and_then(peer: Peer) -> None:
    assert not any(isinstance(a, Compare) for a in peer.follow(*peer.log.update()))
    assert peer.follow(*peer.log.update())[0] == Compare(2)


def test_what_shows_a_gap_is_looked_at_again_after_the_fetch(peer: Peer) -> None:
    missed, late = peer.log.update(), peer.log.update()
    assert peer.hear(late[0], b"late") == [peer.fetch()]
    assert not peer.session.hears
    peer.follow(*missed, hear=False)
    assert peer.get(wire.Fetched(step=1)) == []
    assert peer.session.hears
    assert peer.session.next(0.0) == [Take(late[0], b"late", first=True)]


def test_an_average_that_was_written_over_shows_as_a_gap_at_its_close(peer: Peer) -> None:
    first, second, close = peer.log.update()
    peer.hear(first), peer.hear(second)
    peer.session.lost(first)
    assert peer.hear(close) == [peer.fetch()]


def test_an_average_that_does_not_fit_is_fetched_once_then_a_snapshot_is_taken(peer: Peer) -> None:
    """What the server keeps is wrong: to fetch it again would never end."""
    first, second, close = peer.log.update()
    peer.hear(first), peer.hear(second)
    assert peer.session.unfit(first, "too short") == []
    assert peer.hear(close) == [peer.fetch()]
    assert peer.get(first) == [Take(first, None, first=False)]
    said, join = peer.session.unfit(first, "too short")
    assert said == Say("update 1 cannot be used (too short): taking a snapshot")
    assert join == Join() and not peer.session.joined
    assert peer.replica.lineage not in peer.log.lineages, "else it would be told to fetch"
    assert peer.get(second) == peer.get(close) == peer.get(wire.Fetched(step=1)) == []
    assert peer.admitted("adopt", step=1) == []
    assert peer.session.takes(manifest(1), "room", 0, 0.0) == [Adopt("room", manifest(1))]


def test_before_it_is_admitted_it_neither_reads_sub_nor_fetches() -> None:
    peer = Peer()
    assert not peer.session.hears
    peer.log.update()
    for _ in range(2):
        assert peer.get(peer.log.pulse()) == []
    assert peer.get(peer.log.average(0)) == []


def test_a_log_that_does_not_continue_from_here_is_left_for_a_snapshot(peer: Peer) -> None:
    peer.replica.lineage = "another"
    *averages, close = peer.log.update()
    for average in averages:
        peer.hear(average)
    said, join = peer.hear(close)
    assert isinstance(said, Say) and "does not continue" in said.text and join == Join()


# ------------------------------------------------------------------------------- coming


def test_leases_are_asked_for_now_and_after_each_greeting(peer: Peer) -> None:
    assert peer.session.ready(READY) == [Send(READY)]
    assert peer.get(AGAIN) == [Join()] and not peer.session.joined
    assert peer.admitted("origin") == [Joined(), Send(READY)]
    peer.session.unready()
    peer.get(AGAIN)
    assert peer.admitted("origin") == [Joined()]


def test_who_is_behind_fetches(peer: Peer) -> None:
    peer.get(AGAIN)
    assert peer.admitted("follow", step=4) == [Joined(), peer.fetch()]


def test_greetings(peer: Peer) -> None:
    assert peer.get(GREET) == [Greet()]
    assert peer.get(RELINKED) == [Probe()]
    peer.log.update(), peer.hear(peer.log.average(1))
    assert peer.session.held
    peer.session.unknown()
    assert not peer.session.held
    assert peer.greeted("server-2") == [Join()] and peer.session.follow.nonce == "server-2"


def test_who_is_refused_in_the_middle_has_lost_the_run(peer: Peer) -> None:
    no = wire.Reject(reason="no", hint="why")
    with pytest.raises(UserError, match="no") as refused:
        peer.get(no)
    assert not isinstance(refused.value, RunLost)
    peer.session.took_part = True
    with pytest.raises(RunLost, match="no"):
        peer.get(no)


# ------------------------------------------------------------------------------- time


def test_a_silent_server_is_asked_then_greeted_anew(peer: Peer) -> None:
    assert peer.session.tick(TIMEOUT_S / 2) == []
    assert peer.session.tick(TIMEOUT_S) == [Silent(TIMEOUT_S), Probe()]
    assert peer.session.tick(3 * TIMEOUT_S + 1) == [Silent(3 * TIMEOUT_S + 1), Greet()]


def test_what_is_published_is_no_sign_of_life(peer: Peer) -> None:
    peer.now = TIMEOUT_S
    peer.hear(peer.log.pulse())
    assert peer.session.tick(TIMEOUT_S) == [Silent(TIMEOUT_S), Probe()]
    peer.get(peer.log.pulse())
    assert peer.session.tick(TIMEOUT_S) == []


def test_a_snapshot_of_which_nothing_comes_is_asked_for_anew() -> None:
    peer = Peer()
    peer.admitted("adopt")
    peer.session.takes(manifest(1), "room", 2, 0.0)
    peer.now = 2 * TIMEOUT_S + 1
    peer.session.follow.heard(peer.now)
    assert peer.session.tick(peer.now) == [Join()]
    assert peer.get(wire.Piece(snapshot=1, piece=0)) == []


# ------------------------------------------------------------------------------- snapshots


def test_a_snapshot_is_taken_piece_by_piece() -> None:
    peer, room = Peer(), object()
    assert peer.admitted("adopt") == []
    assert peer.get(manifest(7)) == [Begin(manifest(7))]
    pieces = Session.WANTS_IN_FLIGHT + 1
    wants = [Send(wire.Want(snapshot=7, piece=n)) for n in range(pieces)]
    assert peer.session.takes(manifest(7), room, pieces, 0.0) == wants[:-1]
    for n in range(pieces):
        assert peer.get(wire.Piece(snapshot=7, piece=n), b"x") == [TakePiece(room, 7, n, "", b"x")]
        more = peer.session.took(n, 0.0)
        assert more == ([wants[-1]] if n == 0 else [] if n < pieces - 1 else more)
        assert peer.get(wire.Piece(snapshot=7, piece=n)) == [], "it comes twice"
    assert more == [Adopt(room, manifest(7))]
    peer.replica.step, peer.replica.lineage = 3, "third"
    told = Send(wire.Adopted(snapshot=7, step=3, lineage="third"))
    assert peer.session.adopted(manifest(7)) == [told, Joined()]
    assert peer.session.joined


def test_a_snapshot_that_cannot_be_right_is_asked_for_again() -> None:
    peer = Peer()
    peer.admitted("adopt")
    abort = Send(wire.Abort(1, "too large"))
    assert peer.session.refuse(1, "too large") == [
        abort,
        Say("too large: asking for it again"),
        Join(),
    ]
    assert peer.get(wire.Abort(1, "an echo")) == []
    assert peer.get(wire.Abort(2, "the giver left")) == [Join()]
    with pytest.raises(UserError, match="did not arrive, tried 5 times: the giver left"):
        peer.admitted("adopt", missed=Session.MISSED_MAX)


def test_a_state_that_never_fits_is_the_fault_of_this_model() -> None:
    peer = Peer()
    for n in range(Session.MISFITS_MAX):
        peer.admitted("adopt", missed=n)
        peer.session.refuse(n, "it does not fit: w", misfit="w")
    with pytest.raises(UserError, match="does not fit this worker's model or optimizer: w"):
        peer.admitted("adopt", missed=Session.MISFITS_MAX)


def test_a_snapshot_is_given_where_the_giver_stands_at_its_step(peer: Peer) -> None:
    give = wire.Give(snapshot=4, step=0, lineage="first")
    want = wire.Want(snapshot=4, piece=2)
    refused = Send(wire.Abort(4, "it does not give this snapshot"))
    assert peer.get(want) == [refused]
    assert peer.get(give) == [Give(4)]
    source = object()
    peer.session.given_from(4, source)
    assert peer.session.gives and peer.get(want) == [SendPiece(source, 4, 2)]
    assert peer.get(wire.Abort(4, "the joiner left")) == [] and not peer.session.gives
    assert peer.get(want) == [refused]


def test_who_shall_give_a_later_step_gets_there_first(peer: Peer) -> None:
    updates = peer.log.update()
    give = wire.Give(snapshot=4, step=1, lineage=peer.log.lineages[1])
    assert peer.get(give) == [peer.fetch()]
    assert peer.follow(*updates, hear=False)[-1] == Give(4)
    earlier = msgspec.structs.replace(give, snapshot=5, step=0)
    assert peer.get(earlier) == [Send(wire.Abort(5, "it stands at step 1"))]


def test_a_worker_knows_that_a_round_is_open_without_it() -> None:
    peer = Peer()
    peer.admitted("origin")
    peer.hear(peer.log.open(leases={2: ((0, 0, 10),)}))
    assert not peer.session.without_samples(1), "it has not taken part yet"
    peer.session.took_part = True
    assert peer.session.without_samples(1) and not peer.session.without_samples(2)


# ------------------------------------------------------------------------------- the observer


def test_adrift_it_hears_of_closes_and_disturbs_nobody() -> None:
    peer = Peer("observer", drifts=True)
    assert peer.admitted("behind") == [] and peer.session.adrift
    *_, close = peer.log.update()
    assert peer.hear(close) == [Missed(close)]
    foreign = msgspec.structs.replace(close, nonce="another server")
    assert peer.hear(foreign) == []
    assert peer.get(AGAIN) == [], "it asks when it wants to"
    assert peer.session.catch_up() == [Join()] and peer.session.catch_up() == []


def test_an_answer_from_before_it_joined_does_not_leave_it_adrift() -> None:
    """Its fetch and its Join had crossed: first it hears that it is behind, then to adopt."""
    peer = Peer("observer", drifts=True)
    peer.admitted("behind")
    assert peer.admitted("adopt") == [] and not peer.session.adrift


def test_what_it_asked_later_and_gets_shows_that_it_is_not_adrift() -> None:
    """It had come further by the answer to an older fetch, when it heard that it was behind."""
    peer = Peer("observer", drifts=True)
    peer.admitted("behind")
    assert peer.get(wire.Fetched(step=2)) == [Join()] and not peer.session.adrift


def test_adrift_it_catches_up_at_the_end() -> None:
    peer = Peer("observer", drifts=True)
    peer.admitted("behind")
    peer.log.update()
    pulse = peer.log.pulse()
    assert peer.get(pulse) == [] and peer.session.adrift
    assert peer.get(msgspec.structs.replace(pulse, ending=True)) == [Join()]


def test_where_the_log_stands_as_far_as_one_adrift_it_joins_again() -> None:
    """What it had asked for came before the answer that it is behind, or a close was taken back.
    Others may wait for the state that only it has."""
    peer = Peer("observer", drifts=True)
    peer.apply(peer.log.update()[-1])
    peer.admitted("behind", step=1)
    pulse = peer.log.pulse()
    assert peer.hear(msgspec.structs.replace(pulse, nonce="another server")) == []
    assert peer.hear(pulse) == [Join()] and not peer.session.adrift


def test_who_does_not_drift_asks_for_a_snapshot() -> None:
    assert Peer("worker").admitted("behind") == [Join()]


def test_the_observer_tells_where_it_stands_once() -> None:
    peer = Peer("observer")
    peer.admitted("origin")
    ending = msgspec.structs.replace(peer.log.pulse(), ending=True)
    assert peer.get(ending) == [Send(wire.Stand(step=0))] and peer.session.at_last_step
    assert peer.hear(ending) == []
    kept = Send(wire.Stand(step=0, kept=True))
    assert peer.session.kept() == [kept]
    peer.get(AGAIN)
    peer.admitted("origin")
    assert peer.get(ending) == [kept], "a server that was started again must hear it"


# ------------------------------------------------------------------------------- the end


def test_the_end_comes_after_the_last_update(peer: Peer) -> None:
    updates = peer.log.update()
    end = peer.log.end()
    assert peer.get(end) == [peer.fetch()] and peer.session.ended is None
    peer.follow(*updates, hear=False)
    assert peer.session.ended == end and not peer.session.left_behind


def test_what_cannot_be_had_any_more_is_told_once(peer: Peer) -> None:
    peer.log.update()
    peer.get(peer.log.end())
    said = Say("the run ended at step 1, this replica at 0")
    assert peer.admitted("behind") == [said]
    assert peer.session.left_behind and peer.session.stay_behind() == []


# ------------------------------------------------------------------------------ averages of shards


def sharded(step: int, round: int, bucket: int, shard: int, nonce: str = NONCE) -> wire.Sharded:
    return wire.Sharded(
        nonce=nonce, round=round, step=step, bucket=bucket, shard=shard, number=bucket
    )


def held(peer: Peer, *messages: Any) -> Session:
    peer.session.held.extend((m, None) for m in messages)
    return peer.session


def test_averages_of_a_round_are_taken_in_the_order_in_which_their_numbers_come() -> None:
    peer = Peer()
    peer.admitted("origin")
    slow, fast, mine = sharded(1, 1, 0, 1), sharded(1, 1, 1, 2), peer.log.average(2)
    session = held(peer, slow, fast, mine)
    assert session.may_be_next == 3 and session.reads_on
    session.goes_first(1, "fast")
    assert session.next(0.0) == [Take(fast, "fast", True)]
    assert [m for m, _ in session.held] == [slow, mine]
    session.goes_first(1, "mine")
    assert session.next(0.0) == [Take(mine, "mine", False)]
    assert session.next(0.0) == [Take(slow, None, False)]


@pytest.mark.parametrize("between", [wire.Pulse, wire.Closing, wire.Close])
def test_what_is_no_average_waits_for_those_before_it(between: type[wire.Message]) -> None:
    peer = Peer()
    peer.admitted("origin")
    other: dict[type[wire.Message], wire.Message] = {
        wire.Pulse: peer.log.pulse(),
        wire.Closing: wire.Closing(nonce=NONCE, round=1, step=1, buckets=(0,)),
        wire.Close: peer.log.update()[-1],
    }
    session = held(peer, sharded(1, 1, 0, 1), other[between], sharded(1, 1, 1, 2))
    assert session.may_be_next == 1 and not session.reads_on
    session.held.popleft()
    assert session.may_be_next == 1 and not session.reads_on


def test_numbers_that_are_not_needed_are_not_waited_for() -> None:
    peer = Peer()
    peer.admitted("origin")
    session = peer.session
    assert session.wants(sharded(1, 5, 0, 1))
    assert not session.wants(sharded(1, 5, 0, 1, nonce="another server's"))
    assert not session.wants(sharded(2, 5, 0, 1))
    peer.hear(sharded(1, 5, 0, 1), "numbers")
    assert not session.wants(sharded(1, 5, 0, 1)), "it came twice"
    assert not session.wants(sharded(1, 4, 1, 1)), "round 4 was void"
    assert session.wants(sharded(1, 5, 1, 1)) and session.wants(sharded(1, 6, 0, 1))
    assert held(peer, sharded(1, 4, 1, 1), sharded(1, 5, 1, 2)).may_be_next == 1
