"""Tokens: one word with a server's address and keys. The join token admits a worker; the watch
token only lets people watch.

    psaearnxmcqxwzi...   "ps", or "pw" to watch, then in base32 (lower case, no padding):

    1 byte    version, 1
    1 byte    length of the address
    2 bytes   port, big-endian; in a watch token the one for watching
    32 bytes  the server's public key: no other program can pose as the server
    32 bytes  the secret key of the cluster's workers, or watchers: it admits its holder
    n bytes   the address, ASCII
    4 bytes   the first of SHA-256 over everything before: a token that was cut off is noticed

Letters and digits only, so that a double click takes all of it, and upper case, blanks and line
breaks, as mails and terminals add them, do no harm. It is a secret: `repr` does not show the keys,
and no error repeats the text.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from paramserver.errors import UserError
from paramserver.typed import typed

VARIABLE = "PARAMSERVER_JOIN"
"""Environment variable that may hold a token, or the path of a file with one."""

PREFIX, WATCH_PREFIX = "ps", "pw"
VERSION = 1
KEY_BYTES = 32
SUM_BYTES = 4
HOST_BYTES = 255
HOSTS_MAX = 8  # networks that a server is in
_HEAD = struct.Struct("!BBH")
_IN_TEXT = re.compile(r"\b(p[sw])[a-z2-7]{40,}", re.IGNORECASE)
_HINT = (
    f"copy the whole line that `{typed('server')}` or `{typed('keys')}` prints on the machine of "
    "the server"
)


@dataclass(frozen=True)
class JoinToken:
    """The contents of a token. Keys are raw bytes of Curve25519, `KEY_BYTES` each."""

    host: str
    """The server's address, or several with commas, the best first."""
    port: int
    server_key: bytes = field(repr=False)
    client_secret: bytes = field(repr=False)
    watches: bool = False
    """It is a watch token."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """The server's addresses."""
        return tuple(host for host in self.host.split(",") if host) or (self.host,)


def joined(hosts: Sequence[str]) -> str:
    """These addresses as the `host` of a token: as many as one can hold, the first ones."""
    told = hosts[0]
    for host in hosts[1:HOSTS_MAX]:
        if len(told) + 1 + len(host) <= HOST_BYTES:
            told += f",{host}"
    return told


def encode(token: JoinToken) -> str:
    """The token as a word; `decode` is the inverse. Raises `ValueError` for an invalid address."""
    host = token.host.encode("ascii")
    if not host or len(host) > HOST_BYTES or not 0 < token.port < 65536:
        raise ValueError(f"no address for a token: {token.host!r}, port {token.port}")
    if {len(token.server_key), len(token.client_secret)} != {KEY_BYTES}:
        raise ValueError(f"a key has {KEY_BYTES} bytes")
    head = _HEAD.pack(VERSION, len(host), token.port)
    body = head + token.server_key + token.client_secret + host
    prefix = WATCH_PREFIX if token.watches else PREFIX
    return prefix + base64.b32encode(body + _sum(body)).decode().rstrip("=").lower()


def decode(text: str, *, to_watch: bool = False) -> JoinToken:
    """The contents of a join token or, `to_watch`, of either kind. Raises `UserError`, which does
    not repeat the text."""
    word = re.sub(r"[\s\"']+", "", text).lower()
    if not looks_like_one(word):
        raise UserError("this is no join token (they begin with `ps`)", _HINT)
    watches = word.startswith(WATCH_PREFIX)
    if watches and not to_watch:
        raise UserError("this is a watch token: it lets you watch, not take part", _HINT)
    content = _bytes(word[len(PREFIX) :])
    body, checksum = content[:-SUM_BYTES], content[-SUM_BYTES:]
    if checksum != _sum(body):
        wanted = _length(content)
        if wanted is not None and len(word) < wanted:
            raise UserError(
                f"the join token is cut off: {len(word)} of its {wanted} characters are there",
                _HINT,
            )
        raise UserError("the join token is damaged: some of its characters are not right", _HINT)
    version = body[0] if body else 0
    if version != VERSION or len(body) < _HEAD.size + 2 * KEY_BYTES + 1:
        raise UserError(
            f"the join token is of version {version}, this program reads version {VERSION}",
            "install the same version on both machines",
        )
    _, _, port = _HEAD.unpack_from(body)
    server_key, client_secret, host = (
        body[_HEAD.size :][:KEY_BYTES],
        body[_HEAD.size + KEY_BYTES :][:KEY_BYTES],
        body[_HEAD.size + 2 * KEY_BYTES :],
    )
    if not re.fullmatch(rb"[!-.0-~]+", host):  # ASCII without blanks and slashes
        raise UserError("the join token holds no address", _HINT)
    return JoinToken(host.decode("ascii"), port, server_key, client_secret, watches)


def fingerprint(server_key: bytes) -> str:
    """Identifies a server's public key without showing it: a peer that knows the key passes the
    first check of the server."""
    return hashlib.sha256(b"paramserver" + server_key).hexdigest()[:16]


def looks_like_one(text: str) -> bool:
    """Is this meant to be a token, rather than the name of a file?"""
    return re.fullmatch(r"p[sw][a-z2-7]{8,}", text.strip().lower()) is not None


def hidden(text: str) -> str:
    """`text` for those who may not have the tokens in it."""
    return _IN_TEXT.sub(r"\1…", text)


def _bytes(word: str) -> bytes:
    """The bytes of the longest part that is base32."""
    padded = word.upper() + "=" * (-len(word) % 8)
    try:
        return base64.b32decode(padded)
    except binascii.Error:  # no text has this length
        return base64.b32decode(padded[: len(word) // 8 * 8])


def _length(content: bytes) -> int | None:
    """The length in characters of a token that begins like this; None where that is not known."""
    if len(content) < 2 or content[0] != VERSION:
        return None
    size = _HEAD.size + 2 * KEY_BYTES + content[1] + SUM_BYTES
    return len(PREFIX) + -(-8 * size // 5)


def _sum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:SUM_BYTES]
