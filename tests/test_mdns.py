"""A worker that looks for its server (`host_ip=auto`): it finds the right one, and no other.

Whole programs search in network namespaces; what is made of records is tested without a network.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path

import pytest
import zeroconf
from machines import call
from whole import Program, Run

from benchmarks.network import Hosts
from paramserver.errors import UserError
from paramserver.keys import Keys
from paramserver.net.address import LOOPBACK, Address
from paramserver.net.jointoken import decode, fingerprint
from paramserver.net.mdns import SERVICE, Announcement, Heard, joined, only

TTL = 120


def service(name: str, host: str, port: int, text: bytes, at: str) -> list[zeroconf.DNSRecord]:
    """The records of a service as a packet brings them."""
    name, host = f"{name}.{SERVICE}", f"{host}.local."
    return [
        zeroconf.DNSService(name, 33, 1, TTL, 0, 0, port, host),
        zeroconf.DNSText(name, 16, 1, TTL, text),
        zeroconf.DNSAddress(host, 1, 1, TTL, socket.inet_aton(at)),
    ]


def text(**words: str) -> bytes:
    pairs = [f"{name}={value}".encode() for name, value in words.items()]
    return b"".join(bytes([len(pair)]) + pair for pair in pairs)


# ---------------------------------------------------------------------------------------- records


def test_a_service_is_put_together_in_any_order() -> None:
    records = service("mini1 12", "paramserver-12", 65432, text(run="12", key="ab"), "10.10.0.1")
    heard = [Heard("12", "10.10.0.1", 65432, "ab")]
    assert joined(records) == joined(reversed(records)) == heard
    for number in range(len(records)):
        assert joined(records[:number] + records[number + 1 :]) == []


def test_who_announces_the_name_of_another_hides_nobody() -> None:
    right = service("mini1 12", "paramserver-12", 65432, text(run="12", key="ab"), "10.10.0.1")
    wrong = service("mini1 12", "paramserver-12", 1234, text(run="12", key="ab"), "10.10.0.66")
    assert Heard("12", "10.10.0.1", 65432, "ab") in joined(right + wrong)
    assert Heard("12", "10.10.0.1", 65432, "ab") in joined(wrong + right)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"\xff", b"\xffrun=1", text(run="\x1b[31mred\n"), b"\x03=ab", bytes(range(256))],
)
def test_rubbish_in_a_text_is_no_harm(content: bytes) -> None:
    for heard in joined(service("x", "x", 1, content, "10.10.0.1")):
        assert str(heard).isprintable() and heard.key == ""
    assert joined(service("x", "x", 0, content, "10.10.0.1")) == []


def test_of_several_servers_without_a_token_none_is_taken() -> None:
    one = Heard("1", "192.0.2.1", 65432, "")
    assert only([one], "none") == [Address("192.0.2.1", 65432)]
    with pytest.raises(UserError, match=r"several servers: 192.0.2.1:65432 \(run 1\), 192.0.2.2"):
        only([one, Heard("2", "192.0.2.2", 65432, "")], "none")


def test_without_a_token_only_this_host_is_joined_where_keys_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"the server at 192.0.2.1 is on another machine"):
        only([Heard("1", "192.0.2.1", 65432, "ab")], "curve")
    assert only([Heard("1", LOOPBACK, 65432, "ab")], "curve") == [Address(LOOPBACK, 65432)]


def test_a_server_of_this_host_alone_is_not_announced() -> None:
    silent = Announcement([LOOPBACK, "localhost"], 65432, "12", None)
    assert silent.problem() is None and silent._zeroconf is None
    silent.close()


# zeroconf leaves a socket to the collector where it fails
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_cannot_be_announced_says_so_once() -> None:
    silent = Announcement(["192.0.2.1"], 65432, "12", None)  # an address of no machine
    told = silent.problem()
    assert told is not None
    assert told.startswith("workers cannot find this server by host_ip=auto: no multicast DNS here")
    assert silent.problem() is None
    silent.close()


# --------------------------------------------------------------------------------------- programs

SERVER = """
import contextlib, sys, threading, zeroconf
from paramserver.transport import sockets
from paramserver.errors import UserError
from paramserver.keys import Keys
name, host, port, run, key = sys.argv[1:]
ctx = sockets.context()
router = sockets.router(ctx, 1000)
at = [sockets.tcp(host, int(port))]
with contextlib.suppress(UserError):  # a server is there, of another run
    sockets.bind(router, [] if key else at, at if key else [], Keys.new().for_server())
info = zeroconf.ServiceInfo(
    "_paramserver._tcp.local.", name + "._paramserver._tcp.local.", port=int(port),
    properties={"run": run, "key": key}, server=f"paramserver-{run[:8]}.local.",
    parsed_addresses=[host],
)
zc = zeroconf.Zeroconf([host])
zc.register_service(info, cooperating_responders=True)  # without a look whose name it is
print("announced", flush=True)
threading.Event().wait()  # until it is killed, where it could not bind, too
"""
FIND = """
import re
import sys
from paramserver import logs
from paramserver.net import mdns as discover
from paramserver.errors import UserError
token, security, timeout_s = sys.argv[1:]
try:
    log = logs.to(print, "workers")
    there = discover.find(token, security=security, timeout_s=float(timeout_s), log=log)
    print(f"it is {there.host}:{there.port}", "with keys" if there.keys else "without keys")
except UserError as e:
    print(e.problem, e.hint, "the end", sep="\\n")
"""


def announce(run: Run, hosts: Hosts, host: str, name: str, run_id: str, key: str = "") -> Program:
    """What looks like a server; with a `key` it has keys, but not that one."""
    words = (name, hosts.address(host), str(run.port), run_id, key)
    program = run.start(name, "-c", SERVER, *words, host=hosts[host])
    program.wait_for("announced")
    return program


def find(
    run: Run, host: str, token: str = "", security: str = "curve", timeout_s: int = 60
) -> Program:
    return run.start("a search", "-c", FIND, token, security, str(timeout_s), host=host)


CABLE, OTHER_CABLE = "10.88.0", "10.99.0"


def join_by_a_cable(hosts: Hosts, network: str, one: str, other: str) -> None:
    """As network.1 and network.2, beside the network that all are in."""
    link = f"thunderbolt0 type veth peer name thunderbolt0 netns {hosts[other]}"
    call("ip", f"-n {hosts[one]} link add {link}")
    for number, name in enumerate((one, other), 1):
        call("ip", f"-n {hosts[name]} addr add {network}.{number}/24 dev thunderbolt0")
        call("ip", f"-n {hosts[name]} link set thunderbolt0 up")


@pytest.mark.root
@pytest.mark.timeout(400)
def test_the_server_of_the_token_is_found_and_nobody_else(tmp_path: Path) -> None:
    """The worker is there first, then an impostor, then the server, at another address than the
    token tells; then an impostor under the server's own name, and another worker. Then there is
    another run with the same keys, the server dies with its cable and comes back at its next
    address; meanwhile an impostor claims that the other run's server is the one."""
    names = ["mini1", "mini2", "mini3", "mini4"]
    with Hosts(names) as hosts, Run(tmp_path) as run:
        join_by_a_cable(hosts, CABLE, "mini1", "mini2")
        join_by_a_cable(hosts, OTHER_CABLE, "mini4", "mini3")
        worker = hosts["mini2"]
        home = {"XDG_CONFIG_HOME": str(tmp_path / "mini1")}
        made = run.start("make keys", "-m", "paramserver.keys", "host_ip=10.77.0.99", **home)
        assert made.end() == 0
        token = made.lines[-1]
        key = fingerprint(decode(token).server_key)

        first = run.worker(1, host=worker, PARAMSERVER_JOIN=token, PARAMSERVER_HOST="auto")
        first.wait_for(r"looking for the server of this join token .*\(for 60 s")
        false = announce(run, hosts, "mini3", "impostor", "f00df00d", key)
        announce(run, hosts, "mini2", "another", "12121212", "another key")
        first.wait_for(
            rf"{hosts.address('mini3')}:{run.port} (has other keys|does not prove) .*goes on"
        )
        long = ("observer=false", "num_workers=1", "num_epochs=9999", "heartbeat_timeout=3")
        server = run.server("host_ip=auto", *long, host=hosts["mini1"], **home)
        # By the cable, or where that answers late on a busy machine, by the network.
        ways = rf"({re.escape(CABLE)}\.1|{re.escape(hosts.address('mini1'))}):{run.port}"
        taken = first.wait_for(f"found it at {ways}").partition("found it at ")[2]
        server.wait_for("worker 1 .* is here")
        assert "no multicast" not in server.output
        false.kill()

        number = json.loads((run.runs[-1] / "run.json").read_text())["run"]
        name = f"{socket.gethostname().partition('.')[0][:40]} {number[:8]}"
        announce(run, hosts, "mini3", name, number, key)
        found = find(run, worker, token).wait_for("it is")
        assert re.fullmatch(f"it is {ways} with keys", found)
        same_host = find(run, hosts["mini1"], token).wait_for("it is")
        assert same_host == f"it is {LOOPBACK}:{run.port} without keys"
        beside = find(run, hosts["mini1"])  # neither with a token, nor alone in the network
        beside.wait_for("there are several servers")

        (folder := tmp_path / "other").mkdir()
        both = f"host_ip={hosts.address('mini4')},{OTHER_CABLE}.1"
        other = run.server(both, "observer=false", host=hosts["mini4"], folder=folder, **home)
        other.wait_for("server at")
        by_cable = find(run, hosts["mini3"], token).wait_for("it is")
        assert by_cable == f"it is {OTHER_CABLE}.1:{run.port} with keys"

        server.wait_for("training, step")
        server.kill()
        call("ip", f"-n {hosts['mini1']} link set thunderbolt0 down")
        first.wait_for(f"{taken} is silent: looking for the server elsewhere, too")
        announce(run, hosts, "mini4", "liar", number, key)
        first.wait_for(f"found it at {hosts.address('mini4')}")
        first.wait_for(f"the server at {hosts.address('mini4')}:.* is another one")
        again = run.server("host_ip=auto", *long, host=hosts["mini1"], **home)
        again.wait_for(r"the run goes on after step \d+, where worker 1")
        again.wait_for("training, step")
        assert len(run.runs) == 1 and "worker" not in other.output


@pytest.mark.root
def test_without_a_token_the_only_server_is_taken(tmp_path: Path) -> None:
    with Hosts(["mini1", "mini2", "mini3"]) as hosts, Run(tmp_path) as run:
        token = Keys.new().token("10.77.0.99", run.port)
        announce(run, hosts, "mini1", "plain", "11111111")
        nobody = find(run, hosts["mini2"], token, timeout_s=3)
        there = f"{hosts.address('mini1')}:{run.port}"
        found = find(run, hosts["mini2"], security="none").wait_for("it is")
        assert found == f"it is {there} without keys"
        nobody.wait_for("the server of this join token was not found within 3 s")
        nobody.wait_for(f"{there} .run 11111111. is another one")
        keyless = find(run, hosts["mini2"])
        keyless.wait_for(f"the server at {hosts.address('mini1')} is on another machine")
        announce(run, hosts, "mini3", "plain too", "22222222")
        several = find(run, hosts["mini2"], security="none")
        several.wait_for("there are several servers: .*11111111.*22222222|.*22222222.*11111111")


@pytest.mark.root
def test_a_server_with_two_addresses_is_reached_by_the_other_when_a_cable_is_out(
    tmp_path: Path,
) -> None:
    """And one that only stands still for a while is not left."""
    with Hosts(["mini1", "mini2"]) as hosts, Run(tmp_path) as run:
        join_by_a_cable(hosts, CABLE, "mini1", "mini2")
        long = ("observer=false", "num_workers=1", "num_epochs=9999", "heartbeat_timeout=3")
        both = f"host_ip={CABLE}.1,{hosts.address('mini1')}"
        home = {"XDG_CONFIG_HOME": str(tmp_path / "mini1")}
        server = run.server(both, *long, host=hosts["mini1"], **home)
        token = server.wait_for("other machines join with: ").rpartition("=")[2]
        # A worker takes the slower address where the cable, which was just made, answers too late.
        dial = f"import socket; socket.create_connection(('{CABLE}.1', {run.port}), 60)"
        assert run.start("the cable", "-c", dial, host=hosts["mini2"]).end() == 0
        auto = {"PARAMSERVER_JOIN": token, "PARAMSERVER_HOST": "auto"}
        call("ip", f"-n {hosts['mini2']} link set eth0 down")  # or, on a busy machine, it may win
        worker = run.worker(1, host=hosts["mini2"], **auto)
        worker.wait_for(f"found it at {CABLE}.1")
        call("ip", f"-n {hosts['mini2']} link set eth0 up")
        server.wait_for("training, step")

        server.send(signal.SIGSTOP)
        worker.wait_for(f"{CABLE}.1:{run.port} is silent: looking for the server elsewhere, too")
        server.send(signal.SIGCONT)
        worker.wait_for(r"step \d+")
        assert worker.output.count("found it at") == 1

        call("ip", f"-n {hosts['mini1']} link set thunderbolt0 down")
        worker.wait_for(f"found it at {hosts.address('mini1')}:{run.port}")
        server.wait_for("worker 1 .* is here")
        server.wait_for("training, step")


@pytest.mark.root
def test_one_join_line_of_host_ip_auto_serves_workers_in_either_network(tmp_path: Path) -> None:
    """One is in both networks, the other in the slower one only; the faster network dies."""
    with Hosts(["mini1", "mini2", "mini3"]) as hosts, Run(tmp_path) as run:
        join_by_a_cable(hosts, CABLE, "mini1", "mini2")
        long = ("observer=false", "num_workers=2", "num_epochs=9999", "heartbeat_timeout=3")
        home = {"XDG_CONFIG_HOME": str(tmp_path / "mini1")}
        server = run.server("host_ip=auto", *long, host=hosts["mini1"], **home)
        token = server.wait_for("other machines join with: ").rpartition("=")[2]
        house = hosts.address("mini1")
        assert {*decode(token).hosts} == {f"{CABLE}.1", house}
        assert server.output.count("other machines join with") == 1
        dial = f"import socket; socket.create_connection(('{CABLE}.1', {run.port}), 60)"
        assert run.start("the cable", "-c", dial, host=hosts["mini2"]).end() == 0
        while True:
            both = run.worker(1, host=hosts["mini2"], PARAMSERVER_JOIN=token)
            if f"{CABLE}.1:{run.port}" in both.wait_for("worker 1 of a run at"):
                break
            both.send(signal.SIGINT)  # on a busy machine the cable's answer came too late
            assert both.end() in (0, 130)
        house_only = run.worker(2, host=hosts["mini3"], PARAMSERVER_JOIN=token)
        house_only.wait_for(f"worker 2 of a run at {house}:{run.port}")
        server.wait_for("training, step")

        call("ip", f"-n {hosts['mini1']} link set thunderbolt0 down")
        both.wait_for(f"found it at {house}:{run.port}")
        server.wait_for("worker 1 .* is here")
        before = len(run.steps())
        while {1, 2} != {w for line in run.steps()[before:] for w in line["workers"]}:
            server.wait_for("training, step")
        assert len(run.runs) == 1 and house_only.output.count("found it") == 1


ENTER = """
import json, sys, urllib.error, urllib.request
url, token = sys.argv[1].split("#")
body = json.dumps({"token": token}).encode()
try:
    with urllib.request.urlopen(urllib.request.Request(url + "enter", body), timeout=60) as answer:
        print("the page says", answer.status)
except urllib.error.HTTPError as e:
    print("the page says", e.code)
"""


@pytest.mark.root
def test_new_keys_of_a_server_that_runs_are_the_pages_and_are_announced(tmp_path: Path) -> None:
    """Old tokens are worthless at once, and the new ones good."""
    with Hosts(["mini1", "mini2"]) as hosts, Run(tmp_path) as run:
        here, there, address = hosts["mini1"], hosts["mini2"], hosts.address("mini1")
        home = {"XDG_CONFIG_HOME": str(tmp_path / "mini1")}
        ours = (f"host_ip={address}", f"page_ip={address}", "observer=false")
        server = run.server(*ours, host=here, **home)
        old = server.wait_for("page elsewhere: ").split()[-1]

        def enters(url: str) -> str:
            return run.start("a browser", "-c", ENTER, url, host=there).wait_for("the page says")

        assert enters(old) == "the page says 200"
        made = run.start(
            "make keys", "-m", "paramserver.keys", "rotate", "host_ip=10.77.0.99", **home
        )
        assert made.end() == 0
        new = server.wait_for("page elsewhere: ").split()[-1]
        server.wait_for("the keys were made anew")
        assert enters(old) == "the page says 401"
        assert enters(new) == "the page says 200"
        token = made.lines[-1]  # for the same keys, at an address where nobody is
        find(run, there, token).wait_for(f"it is {address}:{run.port} with keys")
