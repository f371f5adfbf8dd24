"""The keys of a user's servers: private, made once, the same after a restart, new on demand."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from paramserver import keys
from paramserver.errors import UserError
from paramserver.keys import Kept, Keys
from paramserver.net.jointoken import decode


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration folder, which is not there yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config/paramserver"


def test_keys_are_made_once_and_are_private(folder: Path) -> None:
    old = os.umask(0)
    try:
        made, new = keys.load_or_make()
    finally:
        os.umask(old)
    assert new
    assert keys.load_or_make() == (made, False)
    assert [path.name for path in folder.iterdir()] == ["keys.json"]
    assert stat.S_IMODE((folder / "keys.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_of_servers_that_start_at_once_all_have_the_same() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: keys.load_or_make()[0], range(8)))
    assert len({k.server_secret for k in made}) == 1


def test_rotated_keys_are_all_new(folder: Path) -> None:
    before, _ = keys.load_or_make()
    after = keys.rotate()
    assert keys.load_or_make() == (after, False)
    assert before.server_secret != after.server_secret
    assert before.client_secret != after.client_secret
    assert [path.name for path in folder.iterdir()] == ["keys.json"]


def test_a_server_that_runs_notices_new_keys(folder: Path) -> None:
    made, _ = keys.load_or_make()
    kept = Kept(made)
    assert kept.fresh() is None
    (folder / "keys.json").touch()
    assert kept.fresh() is None, "they are the same"
    (folder / "keys.json").rename(folder / "away")
    assert kept.fresh() is None and kept.keys == made, "there are none"
    rotated = keys.rotate()
    assert kept.fresh() == rotated.for_server()
    assert kept.fresh() is None and kept.keys == rotated


def test_keys_that_are_made_anew_while_a_server_starts_are_noticed(folder: Path) -> None:
    made, _ = keys.load_or_make()
    rotated = keys.rotate()
    assert Kept(made).fresh() == rotated.for_server()


def test_a_token_fits_the_server() -> None:
    made, _ = keys.load_or_make()
    token = decode(made.token("10.10.0.1", 65432))
    server = made.for_server()
    assert (token.host, token.port) == ("10.10.0.1", 65432)
    assert z85.encode(token.server_key) == server.public == zmq.curve_public(server.secret)
    assert zmq.curve_public(z85.encode(token.client_secret)) == server.workers


def test_an_address_that_no_token_can_hold_is_told() -> None:
    with pytest.raises(UserError, match="no join token can hold the address über"):
        Keys.new().token("über", 65432)


def test_secrets_are_not_shown() -> None:
    made, _ = keys.load_or_make()
    for shown in (repr(made), repr(made.for_server())):
        assert made.server_secret not in shown and made.client_secret not in shown


def test_keys_that_others_may_read_are_refused(folder: Path) -> None:
    keys.load_or_make()
    (folder / "keys.json").chmod(0o640)
    with pytest.raises(UserError, match=r"others may read the keys in .*keys\.json\n  .*chmod 600"):
        keys.load_or_make()
    keys.rotate()
    keys.load_or_make()


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"server_secret":"x","client_secret":"y"}', b"\xff", b"[1]"]
)
def test_a_file_without_keys_is_told(folder: Path, content: bytes) -> None:
    keys.load_or_make()
    (folder / "keys.json").write_bytes(content)
    with pytest.raises(UserError, match=r"holds no keys\n  .*ROTATE=1"):
        keys.load_or_make()


def test_a_folder_that_cannot_be_had_is_told(folder: Path) -> None:
    folder.parent.write_text("a file")
    for make in (keys.load_or_make, keys.rotate):
        with pytest.raises(UserError, match=r"cannot be kept: .*\n.*security=none"):
            make()


def test_without_a_setting_they_are_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert keys.path() == Path("/home/somebody/.config/paramserver/keys.json")


def test_the_program_prints_the_token_and_makes_new_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["keys", *words])
        keys.main()
        return capsys.readouterr().out.splitlines()

    first, to_watch, watching, told, token = says("host_ip=10.10.0.1", "port=65000")
    assert first == f"new keys: {keys.path()}"
    assert told == "join token of a server at 10.10.0.1:65000:"
    assert decode(token).port == 65000
    assert to_watch.startswith("watch token of a server at 10.10.0.1:64498 (")
    assert decode(watching, to_watch=True).port == 64498
    again = [f"keys: {keys.path()}", to_watch, watching, told, token]
    assert says("host_ip=10.10.0.1", "port=65000") == again
    assert says("host_ip=10.10.0.1", "port=65000", "watch_port=0") == [again[0], told, token]
    assert says("rotate", "host_ip=10.10.0.1", "port=65000")[-1] != token
    assert "tell the server's address" in says()[-1]


def test_a_mistake_is_told() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "paramserver.keys", "rotat"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: cannot read the argument 'rotat'")


@pytest.mark.parametrize("words", [[], ["rotate"]])
def test_an_address_that_is_none_makes_no_new_keys(folder: Path, words: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "paramserver.keys", *words, "host_ip=999.1.1.1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2 and "999.1.1.1 is neither an address nor" in ran.stderr
    assert ran.stdout == "" and not folder.exists()
