"""The addresses that a server binds and a worker dials, and which of them need a token."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from paramserver.config.loading import load
from paramserver.errors import UserError
from paramserver.keys import Keys
from paramserver.net import address
from paramserver.net.address import LOOPBACK, Address, find, listen

ELSEWHERE = "192.0.2.7"  # for documentation: no host has it
KEYS = Keys.new()
TOKEN = KEYS.token(ELSEWHERE, 65000)


@pytest.mark.parametrize(
    ("host_ip", "security", "expected"),
    [
        (None, "curve", ([LOOPBACK], [])),
        ("localhost", "curve", ([LOOPBACK], [])),
        (LOOPBACK, "curve", ([LOOPBACK], [])),
        ("127.0.0.2", "curve", ([LOOPBACK, "127.0.0.2"], [])),
        (ELSEWHERE, "curve", ([LOOPBACK], [ELSEWHERE])),
        (ELSEWHERE, "none", ([LOOPBACK, ELSEWHERE], [])),
        ("mini1.local", "curve", ([LOOPBACK], ["10.0.0.7"])),
        ("fd00::7,[fd00::8]", "curve", ([LOOPBACK], ["fd00::7", "fd00::8"])),
        ("::1", "curve", ([LOOPBACK, "::1"], [])),
    ],
)
def test_only_loopback_is_open_to_all(
    host_ip: str | None,
    security: str,
    expected: tuple[list[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"mini1.local": ["127.0.1.1", "10.0.0.7", "fd00::7"]}
    monkeypatch.setattr(address, "addresses_of", lambda host: names.get(host, [host]))
    assert listen(host_ip, security) == expected


def test_a_name_that_leads_nowhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"mini1": ["127.0.1.1"], "nobody": []}
    monkeypatch.setattr(address, "addresses_of", lambda host: names[host])
    with pytest.raises(UserError, match=r"mini1 is 127\.0\.1\.1 here, where no other machine"):
        listen("mini1")
    with pytest.raises(UserError, match="nobody is neither an address nor a name"):
        listen("nobody")


def test_everywhere_is_every_address_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {socket.AF_INET: ["10.0.0.1", "10.10.0.1"], socket.AF_INET6: ["fd00::1"]}
    monkeypatch.setattr(address, "own_addresses", lambda family=socket.AF_INET: own[family])
    assert listen("::") == ([LOOPBACK], ["10.0.0.1", "10.10.0.1", "fd00::1"])
    assert listen("0.0.0.0") == ([LOOPBACK], ["10.0.0.1", "10.10.0.1"])
    assert listen("0.0.0.0", "none") == ([LOOPBACK, "10.0.0.1", "10.10.0.1"], [])


def test_on_loopback_nothing_is_needed() -> None:
    assert find(None, None, None) == Address(LOOPBACK, 65432)
    assert find("localhost", 65000, None) == Address(LOOPBACK, 65000)
    assert find("[::1]", 65000, None) == Address(LOOPBACK, 65000)


def test_nor_at_another_address_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "is_local", lambda host: host == ELSEWHERE)
    assert find(ELSEWHERE, 65000, None) == Address(LOOPBACK, 65000)


def test_a_token_of_this_hosts_server_brings_its_address_for_those_who_need_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = find(None, None, TOKEN).keys
    monkeypatch.setattr(address, "is_local", lambda host: host == ELSEWHERE)
    outside = Address(ELSEWHERE, 65000, keys)
    assert find(None, None, TOKEN) == Address(LOOPBACK, 65000, outside=outside)
    assert find(None, None, TOKEN, security="none") == Address(LOOPBACK, 65000)


def test_a_token_brings_address_and_keys() -> None:
    there = find(None, None, TOKEN)
    assert (there.host, there.port) == (ELSEWHERE, 65000)
    assert there.keys is not None and there.keys.server == KEYS.for_server().public
    assert find("198.51.100.1", 65001, TOKEN) == Address("198.51.100.1", 65001, there.keys)


def test_of_several_addresses_in_a_token_the_first_or_this_machines_own_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = KEYS.token(f"198.51.100.1,{ELSEWHERE}", 65000)
    assert find(None, None, two).host == "198.51.100.1"
    assert address.several(two) and not address.several(TOKEN) and not address.several(None)
    monkeypatch.setattr(address, "is_local", lambda host: host == ELSEWHERE)
    there = find(None, None, two)
    assert (there.host, there.port) == (LOOPBACK, 65000)
    assert there.outside is not None and there.outside.host == ELSEWHERE


def test_another_machine_without_a_token_is_an_error_that_helps() -> None:
    with pytest.raises(UserError, match=r"on another machine.*its join token\n.*JOIN=") as raised:
        find(ELSEWHERE, None, None)
    assert "PARAMSERVER_JOIN" in raised.value.hint and "security=none" in raised.value.hint
    assert find(ELSEWHERE, 65432, None, security="none") == Address(ELSEWHERE, 65432)


@pytest.mark.parametrize(
    "text",
    [TOKEN, f"{TOKEN}\n", f"  {TOKEN[:50]}\n{TOKEN[50:]}\n\n"],
    ids=["as it is", "with a newline", "on two lines"],  # TOKEN is another one in each process
)
def test_a_token_may_lie_in_a_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text)
    assert find(None, None, str(file)) == find(None, None, TOKEN)


def test_what_is_no_token_is_told_without_repeating_it(tmp_path: Path) -> None:
    (tmp_path / "half").write_text(TOKEN[:70])
    for join, words in (
        (TOKEN[:70], "cut off: 70 of its"),
        (str(tmp_path / "half"), "half: the join token is cut off"),
        (str(tmp_path / "nothing"), "neither a join token nor a file"),
        (str(tmp_path), "neither a join token nor a file"),
        ("~\x00", "neither a join token nor a file"),
        ("/dev/zero", "/dev/zero: this is no join token"),
    ):
        with pytest.raises(UserError, match=words) as raised:
            find(None, None, join)
        assert TOKEN[20:60] not in str(raised.value)


# ------------------------------------------------------------------------------------ as a setting


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    return tmp_path / "conf/cluster.yaml"


def test_the_command_line_goes_before_the_environment_and_that_before_a_file(
    in_a_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_folder.write_text("join: from_a_file\n")
    assert load([], "worker").settings.join == "from_a_file"
    monkeypatch.setenv("PARAMSERVER_JOIN", "from_the_environment")
    loaded = load([], "worker")
    assert loaded.settings.join == "from_the_environment" and loaded.given == {}
    assert load(["join=from_the_line"], "worker").settings.join == "from_the_line"


def test_null_on_the_command_line_is_no_token(
    in_a_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_folder.write_text("join: from_a_file\n")
    monkeypatch.setenv("PARAMSERVER_JOIN", "from_the_environment")
    assert load(["join=null"], "worker").settings.join is None


def test_a_server_does_not_keep_a_token(in_a_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end up in config.yaml, and at W&B."""
    monkeypatch.setenv("PARAMSERVER_JOIN", TOKEN)
    in_a_folder.write_text(f"join: {TOKEN}\n")
    assert load([], "server").settings.join is None
    with pytest.raises(UserError, match="join belongs to a worker"):
        load([f"join={TOKEN}"], "server")


def test_security_is_curve_unless_none_is_said(in_a_folder: Path) -> None:
    assert load([], "server").settings.security == "curve"
    in_a_folder.write_text("security: none\n")
    assert load([], "server").settings.security == "none"
    for word in ("off", "null", "no"):
        with pytest.raises(UserError, match="security must be"):
            load([f"security={word}"], "server")
