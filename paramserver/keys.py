"""`python -m paramserver.keys`: the keys of this user's servers, and the tokens made of them.

They lie in one file that only this user may read, `keys.json` in the user's configuration folder. A
server that listens for other machines makes them when there are none; all servers of this user have
the same. `rotate` makes new ones: then every token made before is worthless, as soon as the server
notices it, or is started.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from paramserver import terminal
from paramserver.config.help import answer
from paramserver.config.loading import load
from paramserver.errors import UserError
from paramserver.net import machine
from paramserver.net.address import listen
from paramserver.net.jointoken import KEY_BYTES, JoinToken, encode, joined
from paramserver.program import exit_on_user_error
from paramserver.transport.sockets import ServerKeys
from paramserver.typed import typed
from paramserver.words import host_port


@dataclass(frozen=True)
class Keys:
    """The secret keys of a server and of its workers, in Z85."""

    server_secret: str = field(repr=False)
    client_secret: str = field(repr=False)

    @classmethod
    def new(cls) -> Keys:
        return cls(*(zmq.curve_keypair()[1].decode() for _ in range(2)))

    @property
    def watch_secret(self) -> bytes:
        """The secret key of those who may only watch, raw. It follows from the server's, from which
        nobody can go back: so it needs no place in the file, and new keys bring a new one."""
        server = z85.decode(self.server_secret)
        return hashlib.blake2b(server, digest_size=KEY_BYTES, person=b"paramserv watch").digest()

    def for_server(self) -> ServerKeys:
        """The keys in the form that the server's sockets take."""
        secret = self.server_secret.encode()
        return ServerKeys(
            public=zmq.curve_public(secret),
            secret=secret,
            workers=zmq.curve_public(self.client_secret.encode()),
            watchers=zmq.curve_public(z85.encode(self.watch_secret)),
        )

    def token(self, host: str, port: int) -> str:
        """The join token for a server at this address; a `UserError` where no token can hold it."""
        return self._token(host, port, z85.decode(self.client_secret), watches=False)

    def watch_token(self, host: str, port: int) -> str:
        """The watch token for a server at this address, where `port` is the one for watching."""
        return self._token(host, port, self.watch_secret, watches=True)

    def _token(self, host: str, port: int, secret: bytes, *, watches: bool) -> str:
        public = z85.decode(zmq.curve_public(self.server_secret.encode()))
        try:
            return encode(JoinToken(host, port, public, secret, watches))
        except ValueError:
            raise UserError(
                f"no join token can hold the address {host}", "give it as a number: 10.10.0.1"
            ) from None


def path() -> Path:
    """The file of the keys: in `$XDG_CONFIG_HOME/paramserver`, or `~/.config/paramserver`."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    if folder.startswith("~"):  # there is no HOME, and the system does not know this user
        raise UserError(
            "this user has no home folder, where the keys of a server are kept",
            "choose one with XDG_CONFIG_HOME=FOLDER; with security=none no keys are needed",
        )
    return Path(folder) / "paramserver" / "keys.json"


def load_or_make() -> tuple[Keys, bool]:
    """The keys of this user, and whether they are new. Raises `UserError`."""
    place = path()
    try:
        found = _read(place)
        if found is not None:
            return found, False
        draft = _draft(place, Keys.new())
        try:
            os.link(draft, place)  # fails where another server was quicker: then use its keys
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    except OSError as error:
        raise _cannot(place, error) from None
    made = _read(place)
    assert made is not None
    return made, True


class Kept:
    """The keys of a server that runs, and what becomes of them in the file."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys
        self._seen: tuple[int, int] | None = None  # they may have changed since they were read

    def fresh(self) -> ServerKeys | None:
        """The keys in the file, if they have changed since the last call; they are `keys` then. A
        file that is gone, or that cannot be used, changes nothing."""
        stamp = self._stamp()
        if stamp == self._seen:
            return None
        self._seen = stamp
        with suppress(UserError, OSError):
            found = _read(path())
            if found is not None and found != self.keys:
                self.keys = found
                return found.for_server()
        return None

    @staticmethod
    def _stamp() -> tuple[int, int] | None:
        with suppress(OSError, UserError):
            status = path().stat()
            return status.st_ino, status.st_mtime_ns
        return None


def rotate() -> Keys:
    """New keys in place of the old ones, if there are any. Raises `UserError`."""
    place, keys = path(), Keys.new()
    try:
        _draft(place, keys).replace(place)
    except OSError as error:
        raise _cannot(place, error) from None
    return keys


def _read(place: Path) -> Keys | None:
    """The keys in this file; None where there is none."""
    try:
        with place.open("rb") as file:
            mode, content = os.fstat(file.fileno()).st_mode, file.read()
    except FileNotFoundError:
        return None
    if stat.S_IMODE(mode) & 0o077:
        raise UserError(
            f"others may read the keys in {place}",
            f"if nobody did: chmod 600 {place}; else make new ones: {typed('keys', 'rotate')}",
        )
    try:
        keys = msgspec.json.decode(content, type=Keys)
        keys.for_server()
    except (msgspec.DecodeError, zmq.ZMQError, ValueError):
        raise UserError(
            f"{place} holds no keys",
            f"make new ones: {typed('keys', 'rotate')} (tokens change with them)",
        ) from None
    return keys


def _draft(place: Path, keys: Keys) -> Path:
    """A private file beside `place` with these keys, to be linked or moved there."""
    place.parent.mkdir(parents=True, mode=0o700, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=".keys-", dir=place.parent)  # of mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(keys) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            os.unlink(name)
        raise
    return Path(name)


def _cannot(place: Path, error: OSError) -> UserError:
    return UserError(
        f"the keys in {place} cannot be kept: {error.strerror or error}",
        "choose another folder with XDG_CONFIG_HOME=FOLDER; with security=none no keys are needed",
    )


def main() -> None:
    """Print the join token; with the argument `rotate`, make new keys first."""
    with exit_on_user_error():
        words = sys.argv[1:]
        answer(words, "keys")
        settings = load([word for word in words if word != "rotate"], "server").settings
        guarded = listen(machine.settle(settings)[0])[1]  # before anything is made anew
        if "rotate" in words:
            keys = rotate()
            terminal.result(f"new keys: {path()}")
            terminal.result(
                "a server that runs has them in a moment; older tokens are worthless then, "
                "and workers that came with one end"
            )
        else:
            keys, made = load_or_make()
            terminal.result(f"{'new keys' if made else 'keys'}: {path()}")
        port = settings.port_of_watchers
        if guarded and port:
            where = ", ".join(f"{host_port(host, port)}" for host in guarded)
            terminal.result(
                f"watch token of a server at {where} (its holder sees the run and can do nothing "
                f"else: {typed('watch', 'join=...')}):"
            )
            terminal.result(keys.watch_token(joined(guarded), port))
        if guarded:
            where = ", ".join(f"{host_port(host, settings.port)}" for host in guarded)
            terminal.result(f"join token of a server at {where}:")
            terminal.result(keys.token(joined(guarded), settings.port))
        if not guarded:
            terminal.result(
                f"for a join token, tell the server's address: {typed('keys', 'host_ip=10.10.0.1')}"
            )


if __name__ == "__main__":
    main()
