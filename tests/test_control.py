"""`Control` with the real `Data`, in a time and with a transport of the test's own."""

from __future__ import annotations

import ast
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paramserver.protocol import messages as wire
from paramserver.rounds.coordinator import Rounds
from paramserver.rounds.recovery import NOTHING
from paramserver.rounds.rules import Rules
from paramserver.server import control
from paramserver.server.control import Control, Finished
from paramserver.server.data import Data
from paramserver.server.held import Came
from paramserver.server.history import Frames
from paramserver.server.server import Server
from paramserver.server.spread import Kept
from paramserver.settings import Settings

LAYOUT = wire.Layout((wire.Tensor("weight", (3,), "float32"),))
SILENCE_S = 10.0


class Told:
    """A transport that keeps what is sent, and a watcher that keeps what is said."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, Any]] = []
        self.published: list[Any] = []
        self.averages: list[list[float]] = []
        self.said: list[str] = []
        self.problems: list[str] = []
        self.closes: list[wire.Close] = []
        self.gone: set[bytes] = set()
        self.unread: dict[bytes, int] = {}
        self.sent_bytes, self.received_bytes = 5, 7

    def send(self, route: bytes, message: wire.Message, *buffers: Any) -> bool:
        self.sent.append((route, message))
        return route not in self.gone

    def send_kept(self, route: bytes, frames: Frames) -> bool:
        return self.send(route, wire.from_frames(frames)[0])

    def publish(self, message: wire.Message) -> None:
        self.published.append(message)

    def publish_update(self, averages: list[Finished], close: Frames | None) -> None:
        for average, frames in averages:
            self.published.append(average)
            mean = torch.frombuffer(frames[1], dtype=torch.float32) / average.scale
            self.averages.append(mean.tolist())
        if close is not None:
            self.published.append(wire.from_frames(close)[0])

    def costs(self, session: str) -> dict[str, float]:
        return {}

    def waiting(self, route: bytes) -> int:
        return self.unread.get(route, 0)

    def forget(self, route: bytes) -> None:
        self.unread.pop(route, None)

    def say(self, text: str, warning: bool = False) -> None:
        self.said.append(text)

    def problem(self, text: str) -> None:
        self.problems.append(text)

    def closing(self, control: Control, close: wire.Close) -> None:
        assert not any(isinstance(m, wire.Close) and m.step == close.step for m in self.published)

    def closed(self, control: Control, close: wire.Close) -> None:
        self.closes.append(close)

    def reported(self, control: Control, report: wire.Report) -> None: ...
    def looked(self, control: Control, now: float) -> None: ...


class Run:
    """Two workers that take part; `now` is the time. With `noted` the server was started again.
    With `shards` each worker is on a host of its own."""

    def __init__(
        self,
        workers: int = 2,
        noted: str | None = None,
        aggregate: str = "mean",
        shards: int | None = None,
        leaves_out: str = "",
    ) -> None:
        self.told, self.now = Told(), 100.0
        settings = Settings(observer=False, num_workers=workers, num_epochs=2, aggregate=aggregate)
        rules = Rules(
            num_workers=workers,
            heartbeat_timeout=SILENCE_S,
            timeout=1.0,
            epochs=2,
            observer=False,
            shards=shards,
            leaves_out=leaves_out,
        )
        self.rounds = Rounds(rules, "nonce", self.now, lambda layout: 1, recovery=noted)
        self.holds = None if noted is None else "run"
        names = iter(f"session-{n}" for n in range(1, 100))
        self.data = Data(settings, "nonce", None)
        self.control = Control(
            self.rounds,
            self.data,
            self.told,
            self.told,
            wire.Welcome(
                protocol=wire.PROTOCOL,
                run="run",
                nonce="nonce",
                session="",
                id=0,
                settings={},
                pub_port=1,
            ),
            observer_key="key",
            most_unread=1000,
            new_session=lambda: next(names),
        )
        for number in range(1, workers + 1):
            self.greet(number)
            if shards is not None:
                self.control.traffic.linked(f"session-{number}", f"10.0.0.{number}")
            self.hear(number, wire.Join(layout=LAYOUT, step=0, lineage=f"own {number}", device=""))
        for number in range(2, workers + 1):
            self.adopt(number)
        for number in range(1, workers + 1):
            self.hear(number, wire.Ready(samples=100, batch_size=4))

    def greet(self, number: int, role: str = "worker") -> None:
        hello = wire.Hello(
            protocol=wire.PROTOCOL,
            role=role,
            key="key" if role == "observer" else None,
            id=number if role == "worker" else None,
            nonce=f"process {number}",
            host="here",
            pid=number,
            run=self.holds,
        )
        self.control.receive(b"door %d" % number, hello, [], self.now)
        self.hear(number, wire.Probe(session=f"session-{number}"))

    def adopt(self, number: int) -> None:
        """A snapshot from worker 1, of one piece."""
        [give] = [m for _, m in self.told.sent if isinstance(m, wire.Give)][-1:]
        n = give.snapshot
        manifest = wire.Manifest(
            snapshot=n,
            step=0,
            lineage=self.rounds.lineage,
            tree="{}",
            tensors=(("uint8", (4,)),),
            piece_bytes=4,
        )
        self.hear(1, manifest)
        self.hear(number, wire.Want(snapshot=n, piece=0))
        self.hear(1, wire.Piece(snapshot=n, piece=0))
        self.hear(number, wire.Adopted(snapshot=n, step=0, lineage=self.rounds.lineage))

    def hear(self, number: int, message: wire.Message, *buffers: Any) -> None:
        self.control.receive(b"link %d" % number, message, list(buffers), self.now)

    def push(self, number: int, *values: float, **more: Any) -> None:
        assert self.rounds.round is not None
        push = wire.Push(round=self.rounds.round.number, bucket=0, samples=4, **more)
        self.hear(number, push, memoryview(torch.tensor(values).numpy()).cast("B"))

    def to(self, number: int, kind: type[Any]) -> list[Any]:
        return [m for r, m in self.told.sent if r == b"link %d" % number and isinstance(m, kind)]


def test_a_round_from_greeting_to_close() -> None:
    run = Run()
    run.push(1, 1.0, 2.0, 3.0)
    assert run.told.averages == []
    run.now += 0.25
    run.push(2, 3.0, 4.0, 5.0)
    assert run.told.averages == [[2.0, 3.0, 4.0]]
    [close] = run.told.closes
    assert close.contributors == {1: 4, 2: 4} and run.control.closed_at == run.now
    assert run.control.first_open_at == 100.0
    [at] = [i for i, m in enumerate(run.told.published) if isinstance(m, wire.Close)]
    assert isinstance(run.told.published[at - 1], wire.Average)


def test_a_deadline_passes_when_the_test_says_so() -> None:
    run = Run()
    run.push(1, 1.0, 2.0, 3.0)
    due = run.rounds.next_deadline()
    assert due is not None
    run.control.tick(due - 0.001)
    assert run.told.closes == []
    run.control.tick(due)
    [close] = run.told.closes
    assert close.contributors == {1: 4} and 2 in close.late


def test_bad_numbers_are_kept_nowhere() -> None:
    run = Run()
    run.push(1, 1.0, float("nan"), 3.0)
    assert run.data._payloads == {}
    run.push(2, 3.0, 4.0, 5.0)
    assert run.told.averages == [[3.0, 4.0, 5.0]]
    assert "not all of its numbers are finite" in run.to(1, wire.Refused)[0].reason


def test_what_is_out_of_proportion_is_kept_nowhere() -> None:
    run = Run()
    run.rounds.norms.judge = lambda bucket, norm: "too large" if norm > 100 else None  # type: ignore[method-assign]
    run.push(1, 1000.0, 0.0, 0.0)
    assert run.data._payloads == {}
    run.push(2, 3.0, 4.0, 5.0)
    assert run.told.averages == [[3.0, 4.0, 5.0]]
    assert run.to(1, wire.Refused)[0].reason == "too large"


@pytest.mark.parametrize("aggregate", ["trimmed", "median", "clipped"])
def test_whose_gradients_disagree_is_named_among_the_problems(aggregate: str) -> None:
    run = Run(3, aggregate=aggregate)
    for _ in range(12):
        run.push(1, 1.0, 2.0, 3.0)
        run.push(2, -50.0, -50.0, -50.0)
        run.push(3, 1.0, 2.5, 3.5)
    assert len(run.told.closes) == 12
    [problem] = run.told.problems
    assert problem.startswith("the gradients of worker 2 (here) disagree with the others' in 10 of")
    assert run.rounds.disagreement.trouble(2) and not run.rounds.disagreement.trouble(1)


def test_with_the_mean_nobody_is_compared() -> None:
    run = Run(3)
    for _ in range(12):
        run.push(1, 1.0, 2.0, 3.0)
        run.push(2, -50.0, -50.0, -50.0)
        run.push(3, 1.0, 2.5, 3.5)
    assert len(run.told.closes) == 12 and run.told.problems == []


def test_who_sends_rubbish_is_told_and_is_out() -> None:
    run = Run()
    run.push(1, 1.0, places=((0, 12, 0),))
    assert "you have no outbox" in run.to(1, wire.Reject)[0].reason
    assert [p.id for p in run.rounds.peers.values()] == [2]
    assert set(run.control.links.values()) == set(run.control.routes) == {"session-2"}


def test_updates_are_fetched_but_not_twice_at_a_time() -> None:
    run = Run()
    before = run.rounds.lineage
    run.push(1, 1.0, 2.0, 3.0)
    run.push(2, 3.0, 4.0, 5.0)
    run.told.unread[b"link 2"] = 10**9  # the answer before is still unread
    run.hear(2, wire.Fetch(step=0, lineage=before))
    assert run.to(2, wire.Fetched) == []
    run.told.unread.clear()
    run.hear(2, wire.Fetch(step=0, lineage=before))
    kinds = [type(m) for r, m in run.told.sent if r == b"link 2"][-3:]
    assert kinds == [wire.Average, wire.Close, wire.Fetched]


def test_of_two_reasons_to_stop_the_first_stands() -> None:
    """Ctrl-C goes to a demo and to its server; the demo then ends the server, too."""
    run = Run()
    run.control.stop("stopped by Ctrl-C")
    run.control.stop("stopped from outside (SIGTERM)")
    run.control.tick(run.now)
    ended = run.control.rounds.ended
    assert ended is not None and ended.reason == "stopped by Ctrl-C"


def test_a_server_has_finished_when_all_had_time_for_their_goodbye() -> None:
    run = Run()
    run.control.stop("stopped")
    assert run.rounds.ended is None
    run.control.tick(run.now)
    assert run.rounds.ended is not None
    for number, over in ((1, False), (2, True)):
        assert run.control.finished(run.now) is False
        run.hear(number, wire.Goodbye(reason="finished", step=0, digest="d"))
        assert run.control.finished(run.now) is over


def test_who_beats_and_says_no_goodbye_is_not_awaited_for_ever() -> None:
    run = Run()
    run.control.stop("stopped")
    run.control.tick(run.now)
    for _ in range(5 * control.GOODBYE_TIMEOUTS):
        assert not run.control.finished(run.now)
        run.now += SILENCE_S / 5
        for number in (1, 2):
            run.hear(number, wire.Beat(session=f"session-{number}"))
    run.now += 0.001
    assert run.control.finished(run.now)


@pytest.mark.parametrize("runs", [True, False])
def test_a_silent_observer_is_awaited_for_longer_while_its_process_runs(runs: bool) -> None:
    """The workers of a busy machine take the processor from it; its last evaluation is to come."""
    run = Run()
    run.greet(3, "observer")
    run.control.stop("stopped")
    run.control.tick(run.now)
    for number in (1, 2):
        run.hear(number, wire.Goodbye(reason="finished", step=0, digest="d"))
    run.rounds.observer_comes = runs
    run.now += SILENCE_S + 0.1
    assert run.control.finished(run.now) is not runs
    run.now += (control.GOODBYE_TIMEOUTS - 1) * SILENCE_S
    assert run.control.finished(run.now)


def test_after_a_restart_the_end_is_told_to_those_who_have_not_greeted_yet() -> None:
    """Each has a heartbeat timeout to be heard of, and as long after its last beat; but one that
    beats and does not greet is not awaited for ever."""
    run = Run(noted=NOTHING)
    run.control.stop("stopped")
    run.control.tick(run.now)
    for number in (1, 2):
        run.hear(number, wire.Goodbye(reason="finished", step=0, digest="d"))
    began = run.now
    beat = wire.Beat(session="of the server before", run="run", nonce="process 3")
    for silent_s in (SILENCE_S - 0.1, SILENCE_S, SILENCE_S):
        run.now += silent_s
        assert not run.control.finished(run.now)
        run.control.receive(b"door 3", beat, [], run.now)
    assert not run.control.finished(run.now)
    run.now = began + control.GOODBYE_TIMEOUTS * SILENCE_S + 0.1
    assert run.control.finished(run.now)


def test_a_pulse_goes_to_all_and_to_each_link() -> None:
    run = Run()
    run.told.sent.clear()
    run.control.pulse(run.now)
    [one], [two] = run.to(1, wire.Pulse), run.to(2, wire.Pulse)
    assert one == two == run.told.published[-1] and (one.sent_bytes, one.received_bytes) == (5, 7)


@pytest.mark.parametrize("module", ["time", "socket", "os", "pathlib", "threading"])
def test_control_has_no_clock_no_file_and_no_thread(module: str) -> None:
    tree = ast.parse(Path(control.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert module not in imported


def test_peers_are_prompted_in_an_order_that_is_always_the_same() -> None:
    run = Run()
    run.told.sent.clear()
    run.control._prompt(["session-2", "session-1"], run.now)
    assert [route for route, _ in run.told.sent] == [b"link 1", b"link 2"]


def test_who_could_follow_only_by_what_was_written_over_takes_a_snapshot() -> None:
    """Void rounds may take the whole ring."""
    run = Run()
    origin = run.rounds.lineage
    run.push(1, 1.0, 1.0, 1.0)
    run.push(2, 1.0, 1.0, 1.0)
    assert run.rounds.step == 1 and run.rounds.knows(0, origin)
    run.data._history.forget_before(1)
    run.hear(2, wire.Fetch(step=0, lineage=origin))
    assert not run.rounds.knows(0, origin) and run.rounds.knows(1, run.rounds.lineage)
    assert run.to(2, wire.Fetched) == []


def test_what_comes_after_a_standstill_meets_no_deadline_that_passed_meanwhile() -> None:
    """A server that was started again waits for who holds the newest step. It stands still, and
    what an older replica says is the first that it reads: the newest one's greeting is behind."""
    run = Run(workers=0, noted="newest")
    run.control.tick(run.now)
    run.greet(1)
    run.now += 3 * SILENCE_S
    run.hear(1, wire.Join(layout=LAYOUT, step=2, lineage="older", device=""))
    assert run.rounds.coming_back
    run.greet(2)
    run.hear(2, wire.Join(layout=LAYOUT, step=3, lineage="newest", device=""))
    assert (run.rounds.step, run.rounds.lineage) == (3, "newest")


OFFER = wire.Offer(session="session-1", secret="")


def with_a_shard() -> Run:
    """A run whose worker 1 has a shard, at the end of the link `shard`."""
    run = Run(shards=2)
    run.control.tick(run.now)
    run.control.receive(b"shard", OFFER, [], run.now)
    return run


def all_beat(run: Run, seconds: float) -> None:
    """Both workers and their shard give signs of life for so long."""
    for _ in range(10):
        run.now += seconds / 10
        for number in (1, 2):
            run.hear(number, wire.Beat(session=f"session-{number}"))
        run.control.receive(b"shard", OFFER, [], run.now)
        run.control.tick(run.now)


def test_who_does_not_reach_a_shard_tries_again_each_minute() -> None:
    """Three times at once, for a channel that was only slow."""
    run = Run(shards=2)
    run.control.tick(run.now)
    [(route, _)] = [(r, m) for r, m in run.told.sent if isinstance(m, wire.Carry)]
    assert route == b"link 1"
    run.control.receive(b"shard", OFFER, [], run.now)

    def meets() -> int:
        sent = [m for r, m in run.told.sent if r == b"shard" and isinstance(m, wire.Meet)]
        return sum(m.session == "session-2" for m in sent)

    unreached = wire.Reached(shard=1, problem="a firewall")
    assert meets() == 1
    for tries in (2, 3, 3):
        run.hear(2, unreached)
        assert meets() == tries
    for tries in (4, 5):
        all_beat(run, 59.9)
        assert meets() == tries - 1
        all_beat(run, 0.2)
        assert meets() == tries
        run.hear(2, unreached)
    run.hear(2, wire.Goodbye(reason="ends", finished=True))
    all_beat(run, 90.0)
    assert meets() == 5


def test_a_shard_that_beats_and_sends_nothing_of_what_it_keeps_is_lost() -> None:
    """Who lacks that would wait for ever, and take part in no round."""
    run = with_a_shard()
    before = run.rounds.lineage
    run.push(1, 1.0, 2.0, 3.0)
    run.push(2, 3.0, 4.0, 5.0)
    spread = run.control._data
    made = wire.Sharded(nonce="", round=1, step=1, bucket=0, shard=1, number=1)
    spread._kept[1] = Kept(1, run.rounds.lineage, {0: made})
    run.hear(2, wire.Fetch(step=0, lineage=before))
    recalls = [m for r, m in run.told.sent if r == b"shard" and isinstance(m, wire.Recall)]
    assert len(recalls) == 1 and run.to(2, wire.Fetched) == []
    limit = control.MUTE_TIMEOUTS * SILENCE_S
    for seconds, lives in ((0.0, True), (limit, True), (0.1, False)):
        all_beat(run, seconds)
        assert (1 in run.rounds.shards.live) is lives
    assert len(run.to(2, wire.Fetched)) == 1, "it has to ask again"


def test_a_shard_makes_a_peer_no_more_channels_than_it_was_told_to() -> None:
    run = with_a_shard()
    for _ in range(5):
        met = wire.Met(session="session-2", channel=wire.Channel(port=1, id="ab"))
        run.control.receive(b"shard", met, [], run.now)
    assert len(run.to(2, wire.Channel)) == 2, "its keys, and its end"
    for _ in range(3):  # it stays behind for so many rounds
        run.control._allow_mets()
    for _ in range(5):
        run.control.receive(b"shard", met, [], run.now)
    assert len(run.to(2, wire.Channel)) == 4, "the same again"


def test_a_shard_may_replace_the_keys_of_its_peers_each_round() -> None:
    run = with_a_shard()
    met = wire.Met(session="session-2", channel=wire.Channel(port=1, id="ab"))
    for told in range(1, 6):
        run.control.receive(b"shard", met, [], run.now)
        assert len(run.to(2, wire.Channel)) == told
        run.push(1, 1.0, 2.0, 3.0)
        run.push(2, 3.0, 4.0, 5.0)
        assert run.rounds.step == told


def test_peers_are_told_that_a_shard_is_gone() -> None:
    """Else they would keep their channels to it. A shard cannot say so itself."""
    run = with_a_shard()
    end = wire.Met(session="session-2", channel=wire.Channel(reason="the end"))
    run.control.receive(b"shard", end, [], run.now)
    [ended] = run.to(2, wire.Channel)
    assert not ended.port and ended.host, "it may get another one"
    run.hear(1, wire.Goodbye(reason="ends", finished=True))
    run.now += SILENCE_S
    run.control.tick(run.now)
    assert not run.control._shards
    [_, gone] = run.to(2, wire.Channel)
    assert (gone.port, gone.shard, gone.host, gone.id) == (0, 1, "", "")
    run.hear(2, wire.Reached(shard=1, problem="it is gone"))
    assert "session-2" in run.rounds.peers and not run.control._met


def test_a_peer_is_told_that_a_shard_does_not_get_what_it_sends() -> None:
    """It pushes nothing more through the channel that it has, and gets another one."""
    run = with_a_shard()
    run.told.sent.clear()
    push = wire.Push(round=1, bucket=0, samples=4, shard=1, sealed=1)
    run.control._held.hold(b"link 2", Came(push, [], None, 0, run.now), run.now)
    run.now += SILENCE_S / 2 + 0.1
    run.control.tick(run.now)
    [ended] = run.to(2, wire.Channel)
    assert (ended.port, ended.shard, ended.host) == (0, 1, "")
    [meet] = [m for r, m in run.told.sent if r == b"shard" and isinstance(m, wire.Meet)]
    assert meet.session == "session-2"


def test_who_says_in_turn_that_it_reaches_a_shard_is_believed_as_often_as_it_gets_a_channel() -> (
    None
):
    """Each change is another map, for all."""
    run = with_a_shard()
    shard, believed = run.rounds.shards.live[1], 0
    for _ in range(20):
        run.hear(2, wire.Reached(shard=1))
        believed += "session-2" in shard.reached
        run.hear(2, wire.Reached(shard=1, problem="its connection was cut"))
        assert "session-2" not in shard.reached
    assert believed == control.MEETS_MAX


def average_of(run: Run, shard: int) -> None:
    """The shard has made the average of the open round's bucket."""
    assert run.rounds.round is not None
    number = run.rounds.round.number
    made = wire.Sharded(nonce="", round=number, step=1, bucket=0, shard=shard, number=1)
    run.control._data._made[0] = made


def test_who_comes_again_on_another_link_gets_again_what_it_lacks() -> None:
    """The answer before was lost with the link: without it the round would wait in vain, and the
    shard would be blamed for that."""
    run = with_a_shard()
    average_of(run, 1)
    assert run.rounds.round is not None
    lacks = wire.Lacks(round=run.rounds.round.number, buckets=(0,))
    recalled = wire.Recalled(round=lacks.round, bucket=0, kept=True)

    def asks(link: bytes) -> int:
        """The answers on this link."""
        run.control.receive(link, lacks, [], run.now)
        run.control.receive(b"shard", recalled, [b"numbers"], run.now)
        return sum(r == link and isinstance(m, wire.Average) for r, m in run.told.sent)

    assert asks(b"link 2") == 1
    assert asks(b"link 2") == 1, "it is on its way"
    run.control.receive(b"other link", wire.Probe(session="session-2"), [], run.now)
    state = (run.rounds.step, run.rounds.lineage)
    join = wire.Join(layout=LAYOUT, step=state[0], lineage=state[1], device="")
    run.control.receive(b"other link", join, [], run.now)
    assert asks(b"other link") == 1
    run.control.cut_off("session-2", run.now)  # on the same link, by a record that was lost
    run.control.receive(b"other link", join, [], run.now)
    assert asks(b"other link") == 2


def test_an_average_that_could_not_be_sent_may_be_asked_for_again() -> None:
    run = with_a_shard()
    average_of(run, 1)
    assert run.rounds.round is not None
    lacks = wire.Lacks(round=run.rounds.round.number, buckets=(0,))
    recalled = wire.Recalled(round=lacks.round, bucket=0, kept=True)
    run.told.gone.add(b"link 2")
    for answers in (1, 2):
        run.hear(2, lacks)
        run.control.receive(b"shard", recalled, [b"numbers"], run.now)
        assert len(run.to(2, wire.Average)) == answers


def test_shards_end_with_the_run_and_their_workers_need_not_wait_for_them() -> None:
    """The last worker's goodbye ends the loop of the server: what its shard keeps nobody lacks."""
    run = with_a_shard()
    spread = run.control._data
    made = wire.Sharded(nonce="", round=1, step=1, bucket=0, shard=1, number=1)
    spread._kept[1] = Kept(1, run.rounds.lineage, {0: made})
    run.control.stop("stopped")
    run.control.tick(run.now)
    for number in (2, 1):
        assert not run.control.finished(run.now)
        run.hear(number, wire.Goodbye(reason="finished", step=0, digest="d"))

    def ends() -> int:
        return sum(r == b"shard" and isinstance(m, wire.Greet) for r, m in run.told.sent)

    assert ends() == 0, "it might still be asked for what it keeps"
    server = SimpleNamespace(
        control=run.control,
        rounds=run.rounds,
        settings=Settings(),
        _show=lambda now, last: None,
    )
    assert run.control.finished(time.monotonic())
    assert Server.run(server) is run.rounds.ended  # type: ignore[arg-type]
    assert ends() == 1


def test_a_shard_that_is_not_wanted_is_told_and_its_process_ends() -> None:
    """Worker 2's host has none to carry."""
    run = Run(shards=2)
    run.control.tick(run.now)
    run.control.receive(b"shard", wire.Offer(session="session-1", secret=""), [], run.now)
    run.control.receive(b"spare", wire.Offer(session="session-2", secret=""), [], run.now)
    assert [m for r, m in run.told.sent if r == b"spare"] == [wire.Greet(session_known=False)]
    assert [r for r, m in run.told.sent if isinstance(m, wire.Employ)] == [b"shard"]
    assert set(run.rounds.shards.live) == {1} and not run.control._offers


@pytest.mark.parametrize(("codec", "times"), [("int8", 1), ("", 0)])
def test_what_is_lost_with_a_shard_is_said_once(
    codec: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(leaves_out=codec)
    monkeypatch.setattr(run.data, "leaves_out", lambda bucket: bool(codec))
    spread = run.control._data
    for maker in (0, 3, 4, 0):  # shards that die before these rounds
        spread._makers[0] = maker
        if maker:
            spread.dismiss(maker)
        run.push(1, 1.0, 2.0, 3.0), run.push(2, 3.0, 4.0, 5.0)
    said = [text for text in run.told.said if "had left out" in text]
    assert len(said) == times and len(run.told.closes) == 4
    assert all(t.startswith(f"what {codec} had left out of the averages of 1 of 1") for t in said)
