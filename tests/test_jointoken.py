"""Join tokens: a token comes back as it was encoded, and a damaged one is an error."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.errors import UserError
from paramserver.net.jointoken import (
    JoinToken,
    decode,
    encode,
    hidden,
    joined,
    looks_like_one,
)

KEYS = st.binary(min_size=32, max_size=32)
HOSTS = st.from_regex(r"[a-z0-9][a-z0-9.:-]{0,60}", fullmatch=True)
TOKEN = JoinToken("10.10.0.1", 65432, bytes(range(32)), bytes(range(32, 64)))
WORD = encode(TOKEN)


@given(HOSTS, st.integers(1, 65535), KEYS, KEYS)
def test_decode_is_the_inverse_of_encode(
    host: str, port: int, server: bytes, client: bytes
) -> None:
    token = JoinToken(host, port, server, client)
    assert decode(encode(token)) == token


def test_a_token_may_hold_several_addresses_as_many_as_fit() -> None:
    both = replace(TOKEN, host=joined(["10.10.0.1", "10.20.0.1"]))
    assert decode(encode(both)).hosts == ("10.10.0.1", "10.20.0.1")
    assert TOKEN.hosts == ("10.10.0.1",)
    many = joined([f"fd00:1234:5678:9abc:def0:1234:5678:{n:04x}" for n in range(20)])
    assert len(many) <= 255 and many.count(",") == 5
    assert encode(replace(TOKEN, host=many))


def test_a_token_is_one_word_of_letters_and_digits() -> None:
    assert re.fullmatch(r"[a-z0-9]+", WORD)
    assert len(WORD) < 140
    assert looks_like_one(WORD)


@pytest.mark.parametrize(
    "changed",
    [
        WORD.upper(),
        f"  {WORD}\n",
        f"{WORD[:60]}\n{WORD[60:]}",
        f"{WORD[:60]}\r\n    {WORD[60:]}",
        f"'{WORD}'",
    ],
)
def test_what_mails_and_terminals_do_is_no_harm(changed: str) -> None:
    assert decode(changed) == TOKEN


@given(st.integers(0, len(WORD) - 1), st.sampled_from("abcdefghijklmnopqrstuvwxyz234567"))
def test_a_wrong_character_is_told(at: int, character: str) -> None:
    changed = WORD[:at] + character + WORD[at + 1 :]
    if changed[:-1] != WORD[:-1]:  # the last one has bits to spare
        with pytest.raises(UserError, match=r"damaged|cut off|no join token|a watch token"):
            decode(changed)


@pytest.mark.parametrize("length", range(10, len(WORD)))
def test_a_token_that_was_cut_off_is_told(length: int) -> None:
    said = f"{length} of its {len(WORD)} characters" if length >= 12 else "cut off|damaged"
    with pytest.raises(UserError, match=said):
        decode(WORD[:length])


@given(st.text(max_size=200))
def test_nothing_else_is_taken_for_one(text: str) -> None:
    with pytest.raises(UserError):
        decode(text)


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz234567", min_size=8, max_size=200))
def test_nor_what_only_begins_like_one(text: str) -> None:
    with pytest.raises(UserError):
        decode(f"ps{text}")


def test_errors_do_not_repeat_the_secret() -> None:
    for changed in (WORD[:-5], "ps" + WORD[2:].replace("a", "b"), "x" + WORD):
        with pytest.raises(UserError) as raised:
            decode(changed)
        assert changed[10:40] not in str(raised.value)
    assert str(list(TOKEN.client_secret)[5]) not in repr(TOKEN)
    assert "client_secret" not in repr(TOKEN)


@pytest.mark.parametrize("word", [WORD, WORD.upper(), "pw" + WORD[2:]])
def test_a_token_in_a_line_of_the_log_is_hidden(word: str) -> None:
    """Those who watch a run, and whoever gets its report, see the server's log."""
    for line in (f"make worker ID=2 JOIN={word}", f"http://10.0.0.1:1/#{word}", f"({word}), 'x'"):
        assert word[2:20] not in hidden(line)
        assert hidden(line) == line.replace(word, f"{word[:2]}…")
    assert hidden("psychology, a pst, ps and pwd stay") == "psychology, a pst, ps and pwd stay"


def test_a_token_of_another_version_says_so() -> None:
    body = bytes([7]) + bytes(90)
    content = body + hashlib.sha256(body).digest()[:4]
    with pytest.raises(UserError, match=r"of version 7, this program reads version 1"):
        decode("ps" + base64.b32encode(content).decode().rstrip("=").lower())


@pytest.mark.parametrize(
    "token",
    [
        JoinToken("", 1, bytes(32), bytes(32)),
        JoinToken("h" * 256, 1, bytes(32), bytes(32)),
        JoinToken("über", 1, bytes(32), bytes(32)),
        JoinToken("host", 0, bytes(32), bytes(32)),
        JoinToken("host", 65536, bytes(32), bytes(32)),
        JoinToken("host", 1, bytes(31), bytes(32)),
    ],
)
def test_what_is_no_token_is_not_encoded(token: JoinToken) -> None:
    with pytest.raises(ValueError, match=r"address|key|ascii"):
        encode(token)
