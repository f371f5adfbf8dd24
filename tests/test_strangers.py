"""What strangers send to a server's ports, and rubbish from a worker, costs only the sender.

Each test holds a run of two workers in the middle while a stranger does its worst, and checks
afterwards that the run came out as in one process.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
import zmq
from crew import Crew, Noise, Setup, perceptron
from whole import DEADLINE_S, LOOPBACK, Run, Served
from zmq.utils import garbage

import workers
from paramserver.errors import UserError
from paramserver.protocol import messages as wire
from paramserver.rounds.ledger import Ledger
from paramserver.rounds.sentences import AT_ONCE
from paramserver.transport import sockets
from workers.link.snapshot import Giving
from workers.replica.replica import Replica

HELD_AT = 3
EPOCHS = 2


@contextmanager
def a_run_in_its_middle(**settings: Any) -> Iterator[Served]:
    """Two workers hold at a step while the block is executed; then the run goes on to its end."""
    go_on = threading.Event()

    def hold(number: int, step: int) -> None:
        if step == HELD_AT:
            assert go_on.wait(DEADLINE_S)

    with Served(num_workers=2, num_epochs=EPOCHS, **settings) as served:
        crew = Crew(served, perceptron, Noise(96), hold)
        futures = [crew.start(number, 8) for number in (1, 2)]
        served.until(lambda: len(served.closes) == HELD_AT)
        try:
            yield served
        finally:
            go_on.set()
        served.wait(*futures)
    crew.check()
    assert crew.applied() == dict.fromkeys(range(96), EPOCHS)
    assert served.samples == (96 * EPOCHS, 0, 0)
    assert not any(close.late for close in served.closes)


@contextmanager
def dealer(port: int) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as s:
        s.linger = 0
        s.rcvtimeo = int(1000 * DEADLINE_S)
        s.connect(f"tcp://{LOOPBACK}:{port}")
        yield s


def answer(s: zmq.Socket[bytes], kind: type[wire.Message]) -> Any:
    """The next message of this kind."""
    while True:
        message, _ = wire.from_frames(s.recv_multipart())
        if isinstance(message, kind):
            return message


# ------------------------------------------------------------------------------- raw connections

NOISE = torch.randint(256, (100_000,), generator=torch.Generator().manual_seed(1)).tolist()
ZMTP_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00NULL" + bytes(16) + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"

RAW = {
    "random bytes": bytes(NOISE),
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a TLS handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "a huge message": ZMTP_GREETING
    + struct.pack(">BB", 4, len(READY))
    + READY
    + struct.pack(">BQ", 2, 2**62),
    "a large message": ZMTP_GREETING
    + struct.pack(">BB", 4, len(READY))
    + READY
    + struct.pack(">BQ", 2, 2**31),
    "half a greeting": ZMTP_GREETING[:20],
}


@pytest.mark.parametrize("door", [0, 1], ids=["ROUTER", "PUB"])
@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_not_the_protocol_do_not_disturb(name: str, door: int) -> None:
    with (
        a_run_in_its_middle() as served,
        socket.create_connection((LOOPBACK, served.port + door), DEADLINE_S) as s,
    ):
        with suppress(OSError):  # it may hang up in the middle
            s.sendall(RAW[name])
        if name.endswith("message"):
            while s.recv(1000):  # refused by its length: the connection ends
                pass


def test_a_crowd_of_strangers_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither memory nor descriptors grow, and a round waits for its worker only."""
    with Run(tmp_path) as run:
        server = run.server("observer=false", "num_epochs=9999", "num_workers=1")
        run.worker(1)
        server.wait_for("training, step")
        process = psutil.Process(server.process.pid)

        def come_and_go() -> int:
            for port in (run.port, run.port + 1):
                for knock in RAW.values():
                    for _ in range(25):
                        with suppress(OSError), socket.create_connection((LOOPBACK, port)) as s:
                            s.sendall(knock)
            with dealer(run.port) as s:
                for frames in GARBAGE.values():
                    for _ in range(10):
                        s.send_multipart(frames)
                s.send_multipart(wire.to_frames(msgspec.structs.replace(HELLO, id=0)))
                while "out of range" not in answer(s, wire.Reject).reason:
                    pass  # the last answer: the server has been through it all
            server.wait_for("training, step")
            return process.memory_full_info().uss

        before, descriptors = come_and_go(), process.num_fds()
        after = max(come_and_go() for _ in range(2))
        assert after < before + 16 * 2**20
        for _ in range(20):  # ZeroMQ closes what was hung up on in a thread of its own
            if process.num_fds() >= descriptors + 20:
                server.wait_for("training, step")
        assert process.num_fds() < descriptors + 20
        assert "late" not in server.output and "void" not in server.output


# ---------------------------------------------------------------------------------- ZeroMQ frames

GARBAGE = {
    "an empty frame": [b""],
    "a thousand empty frames": [b""] * 1000,
    "bytes": [bytes(NOISE)],
    "text": [b"hello"],
    "a number": [b"1"],
    "no type": [b"{}"],
    "an unknown type": [b'{"type":"shutdown"}'],
    "a message without its fields": [b'{"type":"hello"}'],
    "a field of another kind": [b'{"type":"beat","session":[1]}'],
    "deep nesting": [b"[" * 500_000],
    "deep nesting in a field": [b'{"type":"probe","session":' + b"[" * 500_000],
    "no UTF-8": [b'{"type":"probe","session":"\xff\xfe"}'],
    "a lone surrogate": [b'{"type":"probe","session":"\\ud800"}'],
    "a huge number": [b'{"type":"want","snapshot":1' + b"0" * 4000 + b',"piece":0}'],
    "a header too large": [b'{"type":"beat","session":"' + b"x" * (4 * 2**20) + b'"}'],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_frames_are_refused_with_a_reason(name: str) -> None:
    with a_run_in_its_middle() as served, dealer(served.port) as s:
        s.send_multipart(GARBAGE[name])
        if name == "a huge number":
            answer(s, wire.Greet | wire.Reject)  # whether it is one depends on who reads it
        else:
            assert "not understood" in answer(s, wire.Reject).reason
    assert served.text.count("sent what this protocol does not allow") <= 1


LAYOUT = wire.Layout((wire.Tensor("w", (3,), "float32"),))
NOBODY = [
    wire.Probe(session="nobody"),
    wire.Join(layout=LAYOUT, step=-1, lineage="", device=""),
    wire.Ready(samples=-1, batch_size=-1),
    wire.Push(round=4, bucket=0, samples=8),
    wire.Fetch(step=-(10**15), lineage=""),
    wire.Manifest(snapshot=1, step=0, lineage="", tree="", tensors=(), piece_bytes=0),
    wire.Want(snapshot=0, piece=-1),
    wire.Piece(snapshot=0, piece=-1),
    wire.Adopted(snapshot=0, step=0, lineage=""),
    wire.Abort(snapshot=0, reason=""),
    wire.Report(step=0, values={"val_loss": None}, final=True),
    wire.Problem("the disk is full"),
    wire.Goodbye(reason="", step=0, digest="0"),
    wire.Reject("no"),
    wire.End(nonce="", step=0, lineage="", reason="over"),
    wire.Average(nonce="", round=4, step=4, bucket=0),
]


def test_who_never_said_hello_has_no_say() -> None:
    with a_run_in_its_middle() as served, dealer(served.port) as s:
        s.send_multipart(wire.to_frames(wire.Beat(session="nobody")))
        for message in NOBODY:
            s.send_multipart(wire.to_frames(message, b"payload"))
            answer(s, wire.Greet)


HELLO = wire.Hello(
    protocol=wire.PROTOCOL, role="worker", id=None, nonce="stranger", host="here", pid=1
)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 99}, "protocol"),
        ({"protocol": -1}, "protocol"),
        ({"role": "king"}, "no role 'king'"),
        ({"role": "observer", "key": "guessed"}, "observer"),
        ({"id": 1}, "worker id 1 is taken by pid"),
        ({"id": 0}, "out of range"),
        ({"id": -(2**63)}, "out of range"),
        ({"id": 2**62}, "out of range"),
        ({"run": "another"}, "another"),
    ],
)
def test_a_wrong_hello_is_refused(changes: dict[str, Any], reason: str) -> None:
    with a_run_in_its_middle() as served, dealer(served.port) as s:
        s.send_multipart(wire.to_frames(msgspec.structs.replace(HELLO, **changes)))
        assert reason in answer(s, wire.Reject).reason


@contextmanager
def greeted(served: Served) -> Iterator[zmq.Socket[bytes]]:
    """The link of a stranger that knows how to greet."""
    with dealer(served.port) as door, dealer(served.port) as link:
        door.send_multipart(wire.to_frames(HELLO))
        session = answer(door, wire.Welcome).session
        link.send_multipart(wire.to_frames(wire.Probe(session=session)))
        answer(link, wire.Pulse)
        yield link


LAYOUTS = {
    "nothing": wire.Layout(()),
    "a negative size": wire.Layout((wire.Tensor("w", (-3, 5), "float32"),)),
    "two negative sizes": wire.Layout((wire.Tensor("w", (-3, -5), "float32"),)),
    "more than there is": wire.Layout((wire.Tensor("w", (2**40, 2**20), "float32"),)),
    "more than a number holds": wire.Layout((wire.Tensor("w", (2**62, 2**62), "float32"),)),
    "an unknown dtype": wire.Layout((wire.Tensor("w", (3,), "float1024"),)),
    "an unknown kind": wire.Layout((wire.Tensor("w", (3,), "float32", "odd"),)),
    "a name twice": wire.Layout((wire.Tensor("w", (3,), "float32"),) * 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_that_cannot_be_is_refused(name: str) -> None:
    """As the first of a run without observer, whose layout would be the run's."""
    with Served(num_workers=1, num_epochs=1, bucket_mb=0.001) as served:
        with greeted(served) as link:
            join = wire.Join(layout=LAYOUTS[name], step=0, lineage="x", device="cpu")
            link.send_multipart(wire.to_frames(join))
            assert answer(link, wire.Reject).reason
            link.send_multipart(wire.to_frames(wire.Goodbye(reason="as you like")))
            served.until(lambda: not served.server.rounds.peers)
        crew = Crew(served, perceptron, Noise(32))
        served.wait(crew.start(1, 8))


SETTLED = {"samples": 5, "epochs": 1, "waiting": [], "done": 9, "partly": 0, "skipped": 0}


@pytest.mark.parametrize(
    "ledger",
    [
        {},
        {"samples": -1},
        {**SETTLED, "head": [0, 9]},
        {**SETTLED, "head": [0, 0]},
        {**SETTLED, "head": [-1, 0], "done": -5},
        {**SETTLED, "head": [0, 0], "done": 0, "waiting": [[0, 3, 1]]},
        {**SETTLED, "head": [1, 0], "done": 0, "waiting": [[0, 0, 3], [0, 1, 3]]},
    ],
)
def test_a_ledger_that_cannot_be_is_refused(ledger: dict[str, Any]) -> None:
    with Served(num_workers=1, num_epochs=1) as served:
        with greeted(served) as link:
            join = wire.Join(layout=LAYOUT, step=0, lineage="x", device="cpu", ledger=ledger)
            link.send_multipart(wire.to_frames(join))
            assert "ledger" in answer(link, wire.Reject).reason
            link.send_multipart(wire.to_frames(wire.Goodbye(reason="as you like")))
            served.until(lambda: not served.server.rounds.peers)
        crew = Crew(served, perceptron, Noise(32))
        served.wait(crew.start(1, 8))


# ------------------------------------------------------------------------------ from a real worker


FLOATS = 180  # in the perceptron

PUSHES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "nothing": ({}, []),
    "too little": ({}, [4 * FLOATS - 4]),
    "too much": ({}, [4 * FLOATS, 4 * FLOATS]),
    "a negative scale": ({"scale": -1.0}, [4 * FLOATS]),
    "no scale": ({"scale": 0.0}, [4 * FLOATS]),
    "a place before its outbox": ({"places": ((-4096, 4 * FLOATS, 0),)}, []),
    "a place behind its outbox": ({"places": ((2**40, 4 * FLOATS, 0),)}, []),
    "a place longer than a slot": ({"places": ((4096, 2**40, 0),)}, []),
    "a slot that is not there": ({"places": ((4096, 4 * FLOATS, 2**40),)}, []),
    "the slots' states": ({"places": ((0, 4 * FLOATS, -1),)}, []),
}


@pytest.mark.parametrize("name", PUSHES)
def test_a_push_that_does_not_fit_costs_only_its_sender(name: str) -> None:
    changes, lengths = PUSHES[name]
    data = Noise(96)
    with Served(num_workers=2, num_epochs=EPOCHS) as served:
        crew = Crew(served, perceptron, data)

        def rubbish() -> None:
            setup = perceptron(2)
            with workers.join(port=served.port, worker_id=2, say=served.say) as cluster:
                cluster.attach(setup.model, setup.optimizer)
                for _, y, _ in cluster.batches(data, batch_size=8):
                    push = wire.Push(round=1, bucket=0, samples=len(y))
                    push = msgspec.structs.replace(push, **changes)
                    cluster.client.push(push, [bytearray(length) for length in lengths])
                    cluster.client.wait(lambda: cluster.end, "for an answer")

        first, second = crew.start(1, 8), served.start(rubbish)
        with pytest.raises(UserError, match=r"your message was not understood: "):
            served.wait(second)
        served.wait(first)
    assert re.search(r"worker 2 \(.* sent what this protocol does not allow", served.text)
    assert crew.applied() == dict.fromkeys(range(96), EPOCHS)
    assert served.samples == (96 * EPOCHS, 0, 0)


def test_a_gradient_that_is_not_finite_is_left_out_and_counted() -> None:
    data = Noise(64)
    data.x[17] = torch.nan
    with Served(num_workers=2, num_epochs=2) as served:
        crew = Crew(served, perceptron, data)
        served.wait(crew.start(1, 4), crew.start(2, 4))
    assert served.samples == (120, 0, 8)
    assert crew.applied()[17] == 0
    assert "not all of its numbers are finite" in served.text
    crew.check()


def test_a_worker_cannot_tell_problems_of_the_run() -> None:
    with a_run_in_its_middle() as served, dealer(served.port) as s:
        s.send_multipart(wire.to_frames(HELLO))
        session = answer(s, wire.Welcome).session
        s.send_multipart(wire.to_frames(wire.Probe(session=session)))
        s.send_multipart(wire.to_frames(wire.Problem("the disk is full")))
        s.send_multipart(wire.to_frames(wire.Problem("x" * (wire.PROBLEM_CHARS + 1))))
        assert "not understood" in answer(s, wire.Reject).reason
        assert served.problems == []


# --------------------------------------------------------------------- in somebody else's name


def test_a_session_that_others_can_see_is_not_enough_to_act_as_its_owner() -> None:
    """Neither to take its link over, to say goodbye for it, nor to keep it alive."""
    with a_run_in_its_middle() as served, dealer(served.port) as thief:
        peers = dict(served.server.rounds.peers)
        assert len(peers) == 2
        for session, peer in peers.items():
            for secret in ("", "guessed", peer.nonce, session):
                thief.send_multipart(wire.to_frames(wire.Probe(session=session, secret=secret)))
                assert not answer(thief, wire.Greet).session_known
                thief.send_multipart(wire.to_frames(wire.Beat(session=session, secret=secret)))
                assert not answer(thief, wire.Greet).session_known
            thief.send_multipart(wire.to_frames(wire.Goodbye(reason="ended by a thief")))
            assert answer(thief, wire.Greet).session_known  # this link has no session
            mine = msgspec.structs.replace(HELLO, nonce=peer.nonce, id=peer.id)
            thief.send_multipart(wire.to_frames(mine))
            assert (
                "another process has joined under the name of this one"
                in answer(thief, wire.Reject).reason
            )
    assert "thief" not in served.text


def test_a_secret_is_told_to_nobody() -> None:
    hello = msgspec.structs.replace(HELLO, secret="never told")
    with (
        Served(num_workers=1, num_epochs=1) as served,
        zmq.Context() as context,
        context.socket(zmq.SUB) as sub,
        dealer(served.port) as link,
    ):
        sub.linger, sub.rcvtimeo = 0, int(1000 * DEADLINE_S)
        sub.subscribe(b"")
        sub.connect(f"tcp://{LOOPBACK}:{served.port + 1}")
        sub.recv()  # it hears what is published
        link.send_multipart(wire.to_frames(hello))
        welcome = answer(link, wire.Welcome)
        probe = wire.Probe(session=welcome.session, secret="never told")
        link.send_multipart(wire.to_frames(probe))
        answer(link, wire.Pulse)
        heard = answer(sub, wire.Probe)
        assert heard == wire.Probe(session=welcome.session)
        crew = Crew(served, perceptron, Noise(32))
        link.send_multipart(wire.to_frames(wire.Goodbye(reason="as you like")))
        served.until(lambda: not served.server.rounds.peers)  # its number is free
        served.wait(crew.start(1, 8))


def test_a_peer_without_a_secret_is_known_by_its_session() -> None:
    """As those of older versions are."""
    with a_run_in_its_middle() as served, greeted(served) as first, dealer(served.port) as second:
        session = next(
            s for s, peer in served.server.rounds.peers.items() if peer.nonce == HELLO.nonce
        )
        second.send_multipart(wire.to_frames(wire.Probe(session=session)))
        answer(second, wire.Pulse)
        first.send_multipart(wire.to_frames(wire.Unready()))
        assert answer(first, wire.Greet).session_known  # it is not its link any more


# ---------------------------------------------------------------- a snapshot, or a close, that lies


def too_large(giving: Giving) -> None:
    giving.shapes = (("float32", (2**38,)),)
    giving.piece_bytes = 2**42


def other_names(giving: Giving) -> None:
    giving.tree = giving.tree.replace("weight", "wait")


def other_shapes(giving: Giving) -> None:
    giving.shapes = tuple((dtype, shape[::-1]) for dtype, shape in giving.shapes)


def no_ledger(giving: Giving) -> None:
    giving.tree = giving.tree.replace('"ledger": null', '"ledger": {"samples": "many"}')


def other_bits(giving: Giving) -> None:
    give = giving.give

    def lies(piece: int) -> tuple[wire.Piece, Any]:
        header, content = give(piece)
        return header, bytes(content)[:-1] + bytes([content[-1] ^ 1])

    giving.give = lies  # type: ignore[method-assign]


LIES = [too_large, other_bits, other_names, other_shapes, no_ledger]


def giving_lies(monkeypatch: pytest.MonkeyPatch, lie: Callable[[Giving], None], times: int) -> None:
    """The giver of a snapshot lies in this way, several times."""
    give, left = Giving.__init__, [None] * times

    def lies(self: Giving, number: int, replica: Replica) -> None:
        give(self, number, replica)
        if left:
            left.pop()
            lie(self)

    monkeypatch.setattr(Giving, "__init__", lies)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_snapshot_that_cannot_be_is_asked_for_again(
    lie: Callable[[Giving], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    giving_lies(monkeypatch, lie, 2)
    with Served(num_workers=2, num_epochs=1) as served:
        crew = Crew(served, perceptron, Noise(32))
        served.wait(crew.start(1, 8), crew.start(2, 8))
    crew.check()
    assert crew.applied() == dict.fromkeys(range(32), 1)


def first_from_1(number: int) -> Setup:
    """Worker 1 gives the first weights as soon as it is here."""
    setup = perceptron(number)
    setup.attach = {"first": True} if number == 1 else {}
    return setup


@pytest.mark.parametrize(
    "lie",
    [*LIES[:2], *(pytest.param(lie, marks=pytest.mark.long) for lie in LIES[2:])],
    ids=lambda lie: lie.__name__,
)
def test_who_gets_nothing_but_snapshots_that_cannot_be_gives_up_with_the_reason(
    lie: Callable[[Giving], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    giving_lies(monkeypatch, lie, 1000)
    with Served(num_workers=2, num_epochs=1, join_timeout=5.0) as served:
        crew = Crew(served, first_from_1, Noise(32))
        first = crew.start(1, 8)
        served.until(lambda: served.server.rounds.layout is not None)
        changed = {too_large: ".* MiB, more than", other_bits: ".* changed on its way"}
        why = f"tried 5 times: {changed[lie]}" if lie in changed else "does not fit this worker"
        with pytest.raises(UserError, match=why):
            served.wait(crew.start(2, 8))
        served.wait(first)


def test_who_has_shown_nothing_does_not_make_others_give_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It only claims to hold the state, while no other peer does."""
    giving_lies(monkeypatch, other_names, 3)
    with Served(num_workers=2, num_epochs=1) as served:
        crew = Crew(served, first_from_1, Noise(32))
        first = crew.start(1, 8)
        served.until(lambda: served.server.rounds.layout is not None)
        [peer] = served.server.rounds.peers.values()
        peer.proven = False
        served.wait(first, crew.start(2, 8))
        served.until_said("gave its state to nobody in 3 attempts")
    assert crew.applied() == dict.fromkeys(range(32), 1)
    assert len(served.digests()) == 1


def test_a_close_with_another_ledger_ends_a_worker_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Ledger, "state", lambda self: {"samples": "many"})
    with Served(num_workers=1, num_epochs=1) as served:
        crew = Crew(served, perceptron, Noise(32))
        with pytest.raises(UserError, match="does not speak this protocol: step 1: `samples` of"):
            served.wait(crew.start(1, 8))


# ------------------------------------------------------------------------------ who tells lies


def test_a_host_name_without_end_is_refused() -> None:
    with a_run_in_its_middle() as served, dealer(served.port) as s:
        for length in (256, 60_000, 4 * 2**20 - 300):
            s.send_multipart(wire.to_frames(msgspec.structs.replace(HELLO, host="A" * length)))
            assert "not understood" in answer(s, wire.Reject).reason


def test_numbers_that_would_overflow_cost_only_who_tells_them() -> None:
    with Served(num_workers=1, num_epochs=1) as served:
        with greeted(served) as link:
            for message in (
                wire.Join(layout=LAYOUT, step=2**63 - 1, lineage="x", device="cpu"),
                wire.Push(round=1, bucket=0, samples=2**63 - 1),
                wire.Ready(samples=2**62, batch_size=2**62),
            ):
                link.send_multipart(wire.to_frames(message))
                assert answer(link, wire.Reject | wire.Greet)
        crew = Crew(served, perceptron, Noise(32))
        served.wait(crew.start(1, 8))
    assert crew.applied() == dict.fromkeys(range(32), 1)


def test_a_digest_of_somebody_who_never_took_part_is_not_believed() -> None:
    with a_run_in_its_middle() as served:
        for nonce in range(AT_ONCE):
            with dealer(served.port) as s:
                hello = msgspec.structs.replace(HELLO, nonce=str(nonce))
                s.send_multipart(wire.to_frames(hello))
                session = answer(s, wire.Welcome).session
                s.send_multipart(wire.to_frames(wire.Probe(session=session)))
                answer(s, wire.Pulse)
                if nonce % 2:
                    at = {"step": served.server.rounds.step, "lineage": served.closes[-1].lineage}
                    s.send_multipart(
                        wire.to_frames(wire.Join(layout=LAYOUT, device="cpu", recipe="", **at))
                    )
                end = wire.Goodbye(reason="", step=HELD_AT, digest="d" * 64)
                s.send_multipart(wire.to_frames(end))
        served.until(lambda: len(served.server.rounds.peers) == 2)
        assert served.server.digests == {}
    lines = [line for line in served.said if "worker 3" in line]
    assert 2 < len(lines) <= AT_ONCE + 1, "what is said about one worker is limited"


def test_who_reads_none_of_its_answers_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    make = sockets._make

    def with_little_room(*arguments: Any) -> zmq.Socket[bytes]:
        s = make(*arguments)
        s.setsockopt(zmq.SNDBUF, 4096)
        return s

    # The kernel would take tens of thousands of answers, and hold up the other way meanwhile.
    monkeypatch.setattr(sockets, "_make", with_little_room)
    monkeypatch.setattr(sockets, "MESSAGES_UNREAD", 100)
    with a_run_in_its_middle() as served, dealer(served.port) as door:
        door.send_multipart(wire.to_frames(HELLO))
        session = answer(door, wire.Welcome).session
        with zmq.Context() as context, context.socket(zmq.DEALER) as link:
            link.linger = 0
            link.setsockopt(zmq.RCVHWM, 1)
            link.setsockopt(zmq.RCVBUF, 4096)
            link.connect(f"tcp://{LOOPBACK}:{served.port}")
            link.send_multipart(wire.to_frames(wire.Probe(session=session)))
            abort = wire.to_frames(wire.Abort(snapshot=1, reason="x" * 100))
            while not any("does not read" in line for line in served.said):
                # It lives: TCP may hold up the other connection for seconds, as its buffer is full.
                door.send_multipart(wire.to_frames(wire.Beat(session=session)))
                if link.poll(100, zmq.POLLOUT):
                    link.send_multipart(abort)
            served.until_said(r"worker 3 .* left: it does not read what it asks for")


def test_what_waits_for_a_peer_is_counted_until_it_has_left() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as s:
        s.linger = 0
        s.setsockopt(zmq.SNDHWM, 0)
        port = s.bind_to_random_port(f"tcp://{LOOPBACK}")
        with dealer(port) as peer:
            peer.setsockopt(zmq.RCVHWM, 1)
            peer.send(b"here")
            route = s.recv_multipart()[0]
            unread = sockets.Unread()
            numbers = bytearray(2**20)
            for _ in range(100):
                unread.send(s, route, [b"header", numbers], own=False)
            waiting = unread.waiting(route)
            assert waiting > 50 * 2**20
            numbers[:] = b"x" * len(numbers)  # written over: the messages have their own
            for _ in range(100):
                assert peer.recv_multipart() == [b"header", bytes(2**20)]
            while unread.waiting(route):
                pass
            assert not unread._waiting
    garbage.gc.stop()  # pyzmq's thread that lets go what was sent without a copy
