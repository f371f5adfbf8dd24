"""Strangers at a server that admits only peers with its join token: they learn nothing, delay
nothing, and get an error.

In most of these tests loopback is guarded too, so that no other address is needed.
"""

from __future__ import annotations

import itertools
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from crew import Crew, Noise, perceptron
from test_strangers import RAW, ZMTP_GREETING, a_run_in_its_middle
from whole import DEADLINE_S, ENDLESS, LOOPBACK, Program, Run, Served

from benchmarks.network import Hosts
from paramserver.errors import UserError
from paramserver.keys import Keys
from paramserver.net.address import keys_of
from paramserver.net.jointoken import decode
from paramserver.protocol import messages as wire
from paramserver.transport import sockets
from paramserver.transport.handshake import HUNG_UP_TIMES, HandshakeMonitor
from paramserver.transport.sockets import PeerKeys
from workers.link.client import Client

KEYS, OTHERS = Keys.new(), Keys.new()
EPOCHS = 2


def as_peer(keys: Keys) -> PeerKeys:
    return keys_of(decode(keys.token("host", 1)))


def a_guarded_run() -> AbstractContextManager[Served]:
    """Two workers with the right keys hold at a step while the block is executed; then the run goes
    on to its end, which must be as in one process."""
    return a_run_in_its_middle(keys=KEYS)


def refusals(served: Served) -> list[str]:
    return [line for line in served.said if " was refused: " in line]


# ------------------------------------------------------------------------------------ our own


def test_who_has_the_token_takes_part() -> None:
    with a_guarded_run() as served:
        pass
    assert refusals(served) == []


STRANGERS: dict[str, tuple[PeerKeys | None, str, str]] = {
    "no token": (None, "wants a join token", r"it (has no|did not show a) join token"),
    "another client's key": (
        PeerKeys(as_peer(KEYS).server, as_peer(OTHERS).secret),
        "refuses the key",
        "its key is not the one of the join token",
    ),
    "an old token": (
        as_peer(OTHERS),
        "has other keys than this worker's join token",
        "its join token is an old one, or another server's",
    ),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_worker_without_the_right_token_is_told_and_logged_once(name: str) -> None:
    keys, told, logged = STRANGERS[name]
    with a_guarded_run() as served:
        for _ in range(3):
            client = Client(LOOPBACK, served.port, id=3, keys=keys)
            try:
                with pytest.raises(UserError, match=told) as e:
                    client.connect(DEADLINE_S)
            finally:
                client.close()
            command = f"make keys host_ip={LOOPBACK} port={served.port}"
            assert keys is None or f"or `{command}`" in e.value.hint
        served.until_said(logged)
    # A peer that hangs up at once may be gone before its address is read: then it is "somebody".
    who = [line.split()[0] for line in refusals(served)]
    assert len(who) == len(set(who)) and set(who) <= {LOOPBACK, "somebody"}
    assert served.server.rounds.peers == {}


# ------------------------------------------------------------------------------------- strangers


@contextmanager
def stranger(kind: int, port: int, keys: PeerKeys | None = None) -> Iterator[zmq.Socket[bytes]]:
    """A plain ZeroMQ socket, with keys if it has any."""
    with zmq.Context() as context, context.socket(kind) as s:
        s.linger = 0
        if keys is not None:
            s.curve_serverkey, s.curve_secretkey = keys.server, keys.secret
            s.curve_publickey = zmq.curve_public(keys.secret)
        if kind == zmq.SUB:
            s.subscribe(b"")
        s.connect(f"tcp://{LOOPBACK}:{port}")
        yield s


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_cannot_read_what_is_published(name: str) -> None:
    """All rounds of a run are published while it listens; a peer with the key hears them."""
    with Served(keys=KEYS, num_workers=1, num_epochs=EPOCHS) as served:
        crew = Crew(served, perceptron, Noise(96))
        with (
            stranger(zmq.SUB, served.port + 1, STRANGERS[name][0]) as s,
            stranger(zmq.SUB, served.port + 1, as_peer(KEYS)) as friend,
        ):
            assert friend.poll(int(1000 * DEADLINE_S))  # pulses come without any worker
            served.wait(crew.start(1, 8), served.end)
            heard: list[Any] = []
            while not any(isinstance(message, wire.Close) for message in heard):
                assert friend.poll(int(1000 * DEADLINE_S))
                heard += [wire.from_frames(m)[0] for m in wire.split(friend.recv_multipart())]
            assert not s.poll(0)


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_cannot_say_anything(name: str) -> None:
    hello = wire.Hello(
        protocol=wire.PROTOCOL, role="worker", id=None, nonce="stranger", host="here", pid=1
    )
    with a_guarded_run() as served, stranger(zmq.DEALER, served.port, STRANGERS[name][0]) as s:
        for _ in range(100):
            with suppress(zmq.Again):  # ZeroMQ may have given the connection up already
                s.send_multipart(wire.to_frames(hello), zmq.NOBLOCK)
                s.send_multipart([b"rubbish"], zmq.NOBLOCK)
        served.until_said(STRANGERS[name][2])
        assert not s.poll(0)
        assert len(served.server.rounds.peers) == 2
    assert "does not allow" not in served.text


@pytest.mark.parametrize("door", [0, 1], ids=["ROUTER", "PUB"])
def test_raw_bytes_do_not_disturb(door: int) -> None:
    with a_guarded_run() as served:
        for content in RAW.values():
            with (
                socket.create_connection((LOOPBACK, served.port + door), DEADLINE_S) as s,
                suppress(OSError),  # it may hang up in the middle
            ):
                s.sendall(content)
                s.shutdown(socket.SHUT_WR)
                while s.recv(1000):
                    pass


def test_many_silent_connections_do_not_hold_up_who_comes() -> None:
    """As a port scanner may leave them; ZeroMQ drops them after its handshake limit."""
    with Served(keys=KEYS, num_workers=2, num_epochs=EPOCHS) as served:
        crew = Crew(served, perceptron, Noise(96))
        silent = [socket.create_connection((LOOPBACK, served.port)) for _ in range(100)]
        try:
            served.wait(*[crew.start(number, 8) for number in (1, 2)])
        finally:
            for s in silent:
                s.close()
    crew.check()


def test_a_log_does_not_grow_with_who_knocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paramserver.transport.handshake.PEERS_TOLD", 1)
    with a_guarded_run() as served:
        for name in STRANGERS:
            with (
                stranger(zmq.DEALER, served.port, STRANGERS[name][0]),
                socket.create_connection((LOOPBACK, served.port), DEADLINE_S),
            ):
                served.until_said("was refused")
    assert len(refusals(served)) == 1


# ------------------------------------------------------------------------------- other mismatches


def test_a_token_for_a_server_without_security_is_told() -> None:
    with Served(num_workers=1) as served:
        client = Client(LOOPBACK, served.port, id=1, keys=as_peer(KEYS))
        try:
            with pytest.raises(UserError, match="takes no join token: it was started with secu"):
                client.connect(DEADLINE_S)
        finally:
            client.close()


def test_nobody_gets_in_where_the_authenticator_is_gone() -> None:
    """Without its authenticator the server refuses every peer."""
    with Served(keys=KEYS, num_workers=1) as served:
        authenticator: Any = served.server._authenticator
        authenticator._zap.stop()
        client = Client(LOOPBACK, served.port, id=1, keys=as_peer(KEYS))
        try:
            # Which of the two errors: that depends on how often the server hangs up in this time.
            with pytest.raises(UserError, match=r"no server answered|has other keys"):
                client.connect(0.5)
            handshake = client.connection.handshake
            assert handshake is not None and not handshake.proven
        finally:
            client.close()
        assert not served.server.rounds.peers


@pytest.mark.parametrize(
    ("mechanism", "keys", "told"),
    [
        ("NULL", as_peer(KEYS), "takes no join token: it was started with security=none"),
        ("CURVE", as_peer(KEYS), "has other keys than this worker's join token"),
        ("CURVE", None, "wants a join token"),
        ("", as_peer(KEYS), "no server answered"),
        ("", None, "no server answered"),
    ],
)
def test_who_hangs_up_without_a_word_is_asked_what_it_wants(
    mechanism: str, keys: PeerKeys | None, told: str
) -> None:
    """As a server may that finds the worker's greeting wrong first; or a tunnel that leads nowhere,
    which is no refusal."""
    greeting = ZMTP_GREETING.replace(b"NULL", mechanism.encode().ljust(4, b"\0"))
    with socket.create_server((LOOPBACK, 0)) as listener:

        def hang_up() -> None:
            with suppress(OSError):
                for number in itertools.count():
                    with listener.accept()[0] as s:
                        if mechanism and number >= HUNG_UP_TIMES:
                            s.sendall(greeting)
                            s.recv(100)

        thread = threading.Thread(target=hang_up)
        thread.start()
        client = Client(LOOPBACK, listener.getsockname()[1], id=1, keys=keys)
        try:
            with pytest.raises(UserError, match=told):
                client.connect(DEADLINE_S if mechanism else 1.0)
        finally:
            client.close()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_S)


# --------------------------------------------------------------------------------- as users do it


@pytest.mark.root
def test_two_machines_a_killed_server_and_new_keys(tmp_path: Path) -> None:
    """The token that the server prints is all that the other machine needs, also after the server
    was killed; the programs say what is wrong with strangers and old tokens."""
    with Hosts(["mini1", "mini2"]) as hosts, Run(tmp_path) as run:
        here, there = hosts["mini1"], hosts["mini2"]
        home = {"XDG_CONFIG_HOME": str(tmp_path / "mini1")}
        address = f"host_ip={hosts.address('mini1')}"
        where = f"{hosts.address('mini1')}:{run.port}"

        def server() -> tuple[Program, str]:
            # The run neither ends by itself, nor without workers that a busy machine makes wait.
            settings = ("observer=false", "num_epochs=100000", "heartbeat_timeout=6")
            program = run.server(address, *settings, host=here, **home)
            line = program.wait_for("other machines join with: ")
            return program, line.split("join=")[1]

        def refused(*settings: str, **environment: str) -> str:
            worker = run.worker(2, *settings, host=there, **environment)
            assert worker.end() == 2, worker.output
            assert "Traceback" not in worker.output
            return worker.output

        first, token = server()
        assert "made the keys of this cluster" in first.output
        assert (tmp_path / "mini1/paramserver/keys.json").stat().st_mode & 0o777 == 0o600
        another = Keys.new().token(hosts.address("mini1"), run.port)
        assert f"{where} has other keys" in refused(f"join={another}")
        first.wait_for(rf"({hosts.address('mini2')}|somebody) was refused: ")

        workers = [
            run.worker(1, address, host=here),
            run.worker(2, host=there, PARAMSERVER_JOIN=token),
        ]
        first.wait_for("training, step")
        first.kill()
        second, same = server()
        assert same == token
        second.wait_for("training, step")
        assert "the run goes on after step" in second.output
        second.kill()

        keys = run.start("make keys", "-m", "paramserver.keys", "rotate", address, **home)
        assert keys.end() == 0, keys.output
        third, new = server()
        assert new != token
        assert workers[1].end() == 2, workers[1].output
        assert f"error: the server at {where} has other keys" in workers[1].output
        third.wait_for("training, step")  # with the worker on its own machine
        third.send(signal.SIGINT)
        assert (third.end(), workers[0].end()) == (0, 0)
        assert len(run.runs) == 1


WITHOUT_TMP = """
import ctypes, os, runpy, subprocess, sys
assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS: the mounts are this program's own
subprocess.run(["sh", "-euc", '''
    mount --make-rprivate /
    mount --bind . .
    for each in /tmp /var/tmp /dev/shm; do
        mount --rbind $each $each
        mount -o remount,bind,ro $each
    done
'''], check=True)
os.chdir(os.getcwd())
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.root
def test_where_no_folder_takes_sockets_the_servers_own_peers_come_with_the_token(
    tmp_path: Path,
) -> None:
    """Such a server lets nobody in at loopback without keys. Its observer gets the token from it,
    also the one of new keys, and keeps the run for the workers that come then."""
    folder = tmp_path / ("deep" * 20)  # no socket can have so long a name
    folder.mkdir()
    with Hosts(["mini1"]) as hosts, Run(folder) as run:
        here, home = hosts["mini1"], {"XDG_CONFIG_HOME": str(folder / "keys")}
        small = ("dataset.name=digits", "model.hidden=16", "wandb.mode=disabled")
        ours = (f"port={run.port}", "run_dir=runs", "plain=true", "num_workers=1")
        address = f"host_ip={hosts.address('mini1')}"
        endless = f"num_epochs={ENDLESS}"
        words = ("-c", WITHOUT_TMP, "paramserver", *small, *ours, address, endless)
        server = run.start("the server", *words, host=here, XDG_RUNTIME_DIR="", **home)
        server.wait_for("peers on this host need the join token")
        token = server.wait_for("other machines join with: ").split("join=")[1]
        refused = run.worker(1, host=here)
        assert refused.end() == 2
        printing = f"make keys {address} port={run.port}"
        assert f"give it the join token, which `{printing}` prints" in refused.output
        worker = run.worker(1, host=here, PARAMSERVER_JOIN=token)
        server.wait_for("training, step")

        keys = run.start("make keys", "-m", "paramserver.keys", "rotate", address, **home)
        assert keys.end() == 0, keys.output
        new = keys.lines[-1]
        assert f"`{printing}` prints the new one" in server.wait_for("the keys were made anew")
        assert worker.end() == 2, worker.output
        worker = run.worker(1, host=here, PARAMSERVER_JOIN=new)
        server.wait_for("worker 1 .* is here")
        server.wait_for("training, step")
        server.send(signal.SIGINT)
        assert (server.end(), worker.end()) == (0, 0), server.output
        assert "the observer ended" not in server.output
        assert run.summary()["val_accuracy"] is not None
        written = [path.read_text(errors="replace") for path in run.runs[-1].glob("*.*")]
        assert not any(secret in text for text in written for secret in (token, new))


@pytest.mark.root
@pytest.mark.long
def test_a_demo_gives_its_workers_the_token_where_no_folder_takes_sockets(tmp_path: Path) -> None:
    folder = tmp_path / ("deep" * 20)
    folder.mkdir()
    with Hosts(["mini1"]) as hosts, Run(folder) as run:
        small = ("demo", "model.hidden=16", "wandb.mode=disabled", "num_epochs=1", "num_workers=1")
        ours = (f"port={run.port}", "run_dir=runs", "plain=true")
        words = ("-c", WITHOUT_TMP, "paramserver.launch", *small, *ours)
        home = {"XDG_CONFIG_HOME": str(folder / "keys"), "XDG_RUNTIME_DIR": ""}
        address = f"host_ip={hosts.address('mini1')}"
        demo = run.start("the demo", *words, address, host=hosts["mini1"], **home)
        assert demo.end() == 0, demo.output
        assert "peers on this host need the join token" in demo.output
        assert run.summary()["val_accuracy"] is not None


def test_a_socket_closed_in_the_middle_of_a_handshake_leaves_its_context_alive() -> None:
    """ZeroMQ's I/O thread waits for a reader of its events, and must not do so for ever."""
    with socket.create_server((LOOPBACK, 0)) as listener, zmq.Context() as ctx:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        port = listener.getsockname()[1]
        for _ in range(500):
            s = sockets.dealer(ctx)
            handshake = HandshakeMonitor(ctx, s, LOOPBACK, port, with_keys=False)
            sockets.connect(s, sockets.tcp(LOOPBACK, port))
            s.poll(1)
            handshake.close()
            s.close()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)
        with zmq.Context() as other, sockets.dealer(other) as s:
            s.bind("tcp://127.0.0.1:*")
            with sockets.dealer(ctx) as ours:
                ours.connect(s.last_endpoint.decode())
                ours.send(b"still here")
                assert s.poll(int(1000 * DEADLINE_S)) and s.recv() == b"still here"
