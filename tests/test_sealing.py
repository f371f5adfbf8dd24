"""Records of a channel: what opens, and all that does not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from cryptography.exceptions import UnsupportedAlgorithm

from paramserver.transport import sealing
from paramserver.transport.sealing import (
    CIPHERS,
    CLEAR,
    RECORD_BYTES,
    Ends,
    Kind,
    Opener,
    Payload,
    Sealer,
    Unopened,
)

LARGEST = 3 * RECORD_BYTES
ENDS = Ends("aes-256-gcm", bytes(range(32)), bytes(range(16)), "nonce", shard=0, sender=3)
BUFFERS = [os.urandom(2 * RECORD_BYTES + 5), b"", os.urandom(7)]


def opener(ends: Ends = ENDS, kind: Kind = Kind.PUSH) -> Opener:
    return Opener(ends, (kind,), LARGEST, 16)


def sealed(ends: Ends = ENDS, buffers: list[bytes] = BUFFERS, number: int = 1) -> list[bytes]:
    return [bytes(r) for r in Sealer(ends).seal(Kind.PUSH, 7, 2, number, buffers)]


def opened(at: Opener, records: list[bytes]) -> list[Payload]:
    """The payloads that these records complete; those that do not open are dropped."""
    found = []
    for record in records:
        try:
            payload = at.open(record)
        except Unopened:
            continue
        if payload is not None:
            found.append(payload)
    return found


def contents(payloads: list[Payload]) -> list[list[bytes]]:
    return [[bytes(b) for b in payload.buffers] for payload in payloads]


@pytest.mark.parametrize("cipher", CIPHERS)
def test_what_was_sealed_is_opened(cipher: str) -> None:
    ends = replace(ENDS, cipher=cipher)
    at = opener(ends)
    (payload,) = opened(at, sealed(ends))
    assert contents([payload]) == [BUFFERS]
    assert (payload.kind, payload.round, payload.bucket, payload.number) == (Kind.PUSH, 7, 2, 1)
    assert (at.opened, at.unopened, at.torn, at.newest) == (5, 0, 0, 1)


def test_numbers_cannot_be_read() -> None:
    records = sealed(buffers=[bytes(1000)])
    assert len({records[0][i] for i in range(CLEAR.size, len(records[0]))}) > 200


@pytest.mark.parametrize("place", range(CLEAR.size + 7 + sealing.TAG_BYTES))
def test_a_flipped_bit_is_noticed_wherever_it_is(place: int) -> None:
    """In what everybody can read, in the ciphertext, in the tag."""
    (record,) = sealed(buffers=[b"7 bytes"])
    changed = bytearray(record)
    changed[place] ^= 1
    at = opener()
    with pytest.raises(Unopened):
        at.open(changed)
    assert contents(opened(at, [record])) == [[b"7 bytes"]], "nothing has changed"
    assert at.unopened == 1


FOREIGN: dict[str, Ends] = {
    "another key": replace(ENDS, key=bytes(32)),
    "another key id": replace(ENDS, id=bytes(16)),
    "another server": replace(ENDS, nonce="of its next start"),
    "another shard": replace(ENDS, shard=1),
    "another worker": replace(ENDS, sender=4),
    "the server": replace(ENDS, sender=0),
    "another cipher": replace(ENDS, cipher="chacha20-poly1305"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_records_of_others_do_not_open(name: str) -> None:
    at = opener()
    assert opened(at, sealed(FOREIGN[name])) == []
    assert at.unopened == 5


def test_an_average_is_no_push() -> None:
    assert opened(opener(kind=Kind.AVERAGE), sealed()) == []


ATTACKS: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "one is lost": lambda r: [r[0], *r[2:]],
    "the first is lost": lambda r: r[1:],
    "the last is lost": lambda r: r[:-1],
    "two are swapped": lambda r: [r[1], r[0], *r[2:]],
    "one comes late": lambda r: [r[0], *r[2:], r[1]],
    "one is shortened": lambda r: [r[0], r[1][:-1], *r[2:]],
    "one is longer": lambda r: [r[0], r[1] + b"\0", *r[2:]],
    "one is empty": lambda r: [r[0], b"", *r[2:]],
    "one is of another payload": lambda r: [r[0], sealed(number=2)[1], *r[2:]],
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_payload_with_a_wrong_record_is_none_and_the_next_one_is_whole(name: str) -> None:
    sealer = Sealer(ENDS)
    first = [bytes(r) for r in sealer.seal(Kind.PUSH, 7, 2, 1, BUFFERS)]
    second = [bytes(r) for r in sealer.seal(Kind.PUSH, 7, 3, 2, BUFFERS)]
    at = opener()
    payloads = opened(at, ATTACKS[name](first) + second)
    assert [payload.number for payload in payloads] == [2]
    assert contents(payloads) == [BUFFERS]
    assert at.newest == 2, "who waits for the first one learns that it does not come"


def test_nothing_opens_twice() -> None:
    at, records = opener(), sealed()
    assert len(opened(at, records)) == 1
    assert opened(at, records) == [] and at.unopened == len(records)


def test_noise_between_records_costs_nothing() -> None:
    noisy = [r for record in sealed() for r in (os.urandom(len(record)), record)]
    assert contents(opened(opener(), noisy)) == [BUFFERS]


def test_a_failed_record_writes_into_nothing_that_is_read() -> None:
    """The cipher leaves its output written where the tag is wrong."""
    at, records = opener(), sealed(buffers=[bytes(RECORD_BYTES + 1)])
    forged = bytearray(records[1])
    forged[-1] ^= 1
    assert contents(opened(at, [records[0], bytes(forged), records[1]])) == [
        [bytes(RECORD_BYTES + 1)]
    ]


@pytest.mark.parametrize(
    "buffers", [[bytes(LARGEST + 1)], [b"x"] * 17], ids=["too large", "too many"]
)
def test_a_peer_chooses_no_amount_of_memory(buffers: list[bytes]) -> None:
    at = opener()
    assert opened(at, sealed(buffers=buffers)) == []
    assert at.opened == 0


def test_no_counter_is_used_twice() -> None:
    sealer, found = Sealer(ENDS), list[bytes]()

    def seal() -> None:
        for number in range(200):
            found.extend(bytes(r) for r in sealer.seal(Kind.PUSH, 1, 1, number, [b"x"]))

    threads = [threading.Thread(target=seal) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({record[CLEAR.size - 12 : CLEAR.size] for record in found}) == 800


def test_a_forked_child_has_no_keys() -> None:
    """It would seal under the counters of its parent."""
    sealer, at = Sealer(ENDS), opener()
    record = bytes(sealer.bind())
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (sealer.bind, lambda: at.open(record)):
            try:
                use()
            except RuntimeError:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert at.open(record) is None and at.bound


def test_who_has_forgotten_a_key_holds_none() -> None:
    sealer, at = Sealer(ENDS), opener()
    for end in (sealer, at):
        end.forget()
        assert end.ends.key == b"" and end._aead is None
        assert end.ends.id == ENDS.id, "what is no secret stays"


def test_a_failure_in_the_middle_costs_a_counter_and_uses_none_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever ends the sealing of a record, an interrupt or a lack of memory: its nonce may have
    been used."""
    sealer, records = Sealer(ENDS), list[bytes]()

    class Failing:
        def __init__(self, aead: object) -> None:
            self._aead = aead

        def encrypt_into(self, nonce: bytes, *rest: object) -> None:
            self._aead.encrypt_into(nonce, *rest)  # type: ignore[attr-defined]
            if int.from_bytes(nonce) in (1, 3):
                raise KeyboardInterrupt

    monkeypatch.setattr(sealer, "_aead", Failing(sealer._aead))
    for _ in range(5):
        with suppress(KeyboardInterrupt):
            records.append(bytes(sealer.bind()))
    counters = [int.from_bytes(CLEAR.unpack(r[: CLEAR.size])[-1]) for r in records]
    assert counters == [0, 2, 4]


def test_a_key_wears_out_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server replaces keys for both directions, and sees of one only what it opens."""
    monkeypatch.setattr(sealing, "RECORDS_MAX", 2)
    sealer, at = Sealer(ENDS), opener()
    for worn in (False, False, True):
        assert sealer.worn == at.worn == worn
        at.open(sealer.bind())
    monkeypatch.undo()
    monkeypatch.setattr(sealing, "BYTES_MAX", 5)
    sealer, at = Sealer(ENDS), opener()
    for content in (b"1234", b"5"):
        assert not sealer.worn and not at.worn
        for record in sealer.seal(Kind.PUSH, 1, 1, 1, [content]):
            at.open(record)
    assert sealer.worn and at.worn


def test_a_key_whose_records_were_dropped_is_worn_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealing, "RECORDS_MAX", 4)
    sealer, at = Sealer(ENDS), opener()
    for _ in range(3):
        sealer.bind()
    at.open(sealer.bind())
    assert at.opened == 1 and at.worn


def test_without_keys_nothing_is_worn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "RECORDS_MAX", 1)
    ends = replace(ENDS, cipher=sealing.PLAIN)
    sealer, at = Sealer(ends), Opener(ends, (Kind.PUSH,), 100, 1)
    for _ in range(3):
        at.open(sealer.bind())
    assert at.opened == 3 and not sealer.worn and not at.worn


def test_the_cipher_is_the_one_that_costs_both_machines_least() -> None:
    aes, chacha = CIPHERS
    fast, pi4 = {aes: 1.0, chacha: 3.0}, {aes: 30.0, chacha: 9.0}
    assert sealing.cheapest(fast, fast) == aes
    assert sealing.cheapest(fast, pi4) == chacha
    assert sealing.cheapest(fast, {chacha: 1.0}) == chacha
    assert sealing.cheapest(fast, {"rot13": 0.0}) is None
    assert set(sealing.measured()) == set(CIPHERS)


def test_a_machine_that_lacks_a_cipher_does_with_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenSSL as FIPS wants it refuses ChaCha20."""

    def lacking(key: bytes) -> object:
        raise UnsupportedAlgorithm("not here")

    aes, chacha = CIPHERS
    monkeypatch.setitem(CIPHERS, chacha, lacking)
    assert set(sealing.measured.__wrapped__()) == {aes}


def test_keys_are_not_shown() -> None:
    assert "key" not in repr(ENDS)
