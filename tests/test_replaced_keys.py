"""Both ends of the channels between a shard, or the server, and one worker, without a run: how keys
are replaced and ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from test_lying_shards import CUT, NONCE, peers
from whole import LOOPBACK

from paramserver.protocol import messages as wire
from paramserver.server.channels import Channels
from paramserver.shard.memory import Memory
from paramserver.transport import sealing, shm, sockets
from paramserver.transport.passwords import VALID_S, Passwords
from workers.link.channel import Lost
from workers.link.connection import Connection

SESSION = "worker"
SILENCE_S = 4.0
BIG_S = 1000.0
DEADLINE_S = 30.0


class Pair:
    """A shard's channels and a `worker` with its own; the server between them `passes_on` what the
    shard says."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        worker: Connection,
        memory: Memory,
        shard: int,
    ) -> None:
        self.worker, self.memory = worker, memory
        self.now = 0.0
        self.passes_on = True
        self.met: list[wire.Channel] = []
        self.pushed: list[bytes] = []
        """What the shard has got."""
        self.ids: list[bytes] = []
        """Of the keys that it came under, in that order."""
        record_bytes = sealing.RECORD_BYTES + sealing.OVERHEAD_BYTES
        self.socket = sockets.channel_router(context, record_bytes, 64, 64)
        self.passwords = Passwords(context)
        self.channels = Channels(
            self.socket,
            self.passwords,
            None,
            sockets.bind_shard(self.socket, LOOPBACK, guarded=True),
            NONCE,
            2**20,
            self._tell,
            lambda text: None,
            shard=shard,
            sharing=memory,
        )

    def close(self) -> None:
        self.channels.close()
        self.socket.close()
        self.passwords.close()
        self.memory.close()

    def _tell(self, session: str, channel: wire.Channel) -> None:
        self.met.append(channel)
        if not channel.shard:
            self.worker.payloads.told(channel, self.now)
        elif self.passes_on:
            self.worker.shards.told(msgspec.structs.replace(channel, host=LOOPBACK), self.now)

    def turn(self) -> None:
        """Both read what has come."""
        self.socket.poll(1)
        self.passwords.answer(lambda: self.now)
        while sockets.readable(self.socket):
            session = self.channels.receive(sockets.receive(self.socket), self.now)
            for payload in [] if session is None else self.channels.take(session):
                push, buffers = wire.from_frames(payload.buffers)
                [content], release = self.memory.located(payload.id, push, buffers)
                self.pushed.append(bytes(content))
                self.ids.append(payload.id)
                release()
        self.worker.shards.tick(self.now, (1,))
        self.worker.payloads.tick(self.now)

    def until(self, is_so: Callable[[], Any]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not is_so():
            assert time.monotonic() < deadline
            self.turn()

    def meet(self) -> None:
        """Both have a channel."""
        self.channels.dial(SESSION, 1, sealing.measured(), self.now)
        self.until(lambda: self.worker.shards.sockets(1))

    def push(self, round: int, content: bytes) -> None:
        """Through the outbox, where there is one."""
        push = wire.Push(round=round, bucket=0, samples=1, shard=1)
        outbox = self.worker.shards.outbox(1)
        if outbox is None:
            self.worker.shards.push(push, [content])
            return
        slot = outbox.room(len(content))
        assert slot is not None, "the shard frees them"
        slot.fill(content)
        self.worker.shards.push(msgspec.structs.replace(push, places=(slot.place,)), [])

    def average(self, round: int, content: bytes) -> wire.Sharded:
        """The shard sends it."""
        room = self.memory.room(0, len(content))
        room.numpy()[:] = memoryview(content)
        number = self.channels.send(round, 0, [room.numpy()], self.memory.places(0))
        self.memory.over()
        return wire.Sharded(nonce=NONCE, round=round, step=1, bucket=0, shard=1, number=number)

    def brought(self, average: wire.Sharded) -> bytes:
        """What the worker gets of it."""
        found = list[Any]()

        def looks() -> bool:
            payload = self.worker.shards.payload(average, self.now)
            if payload is not None:
                found.append(payload)
            return bool(found)

        self.until(looks)
        [payload] = found
        buffers = payload.buffers if isinstance(payload, shm.Blocks) else payload
        return b"".join(bytes(buffer) for buffer in buffers)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[wire.Message]:
    """What workers say on their links, without headers of pushes."""
    found: list[wire.Message] = []

    def send(self: Connection, message: wire.Message, *buffers: Any) -> None:
        if not isinstance(message, wire.Push):
            found.append(message)

    monkeypatch.setattr(Connection, "send", send)
    return found


@contextmanager
def pairs(shared: bool = False, shard: int = 1) -> Iterator[Pair]:
    """Both ends; with memory that they share, or without."""
    memory = Memory(0, wanted=shared)
    memory.begin(CUT)
    with zmq.Context() as context, peers(SESSION) as [worker]:
        worker.share_memory, worker.shards.slot_bytes = shared, CUT.largest_bytes
        worker.heartbeat_timeout = SILENCE_S
        pair = Pair(context, worker, memory, shard)
        try:
            yield pair
        finally:
            pair.close()


@pytest.mark.parametrize(
    "shared",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not Path(shm.SHARED).is_dir(), reason="no /dev/shm")
        ),
    ],
)
def test_worn_keys_of_a_shard_are_replaced_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, said: list[wire.Message], shared: bool
) -> None:
    """Each round begins before the new channel is bound."""
    monkeypatch.setattr(sealing, "RECORDS_MAX", 3)
    with pairs(shared) as pair:
        pair.meet()
        assert (pair.worker.shards.outbox(1) is not None) is shared
        contents = [b"%12d" % round for round in range(1, 25)]
        for round, content in enumerate(contents, 1):
            pair.push(round, content)
            pair.until(lambda: len(pair.pushed) == round)  # noqa: B023
            assert pair.brought(pair.average(round, content[::-1])) == content[::-1]
            pair.channels.round_over(pair.now)
        assert pair.pushed == contents
        assert len(dict.fromkeys(pair.ids)) > 4, "keys were replaced"
        assert pair.channels.unopened == 0
        assert {type(m) for m in said} == {wire.Reached}
        assert not [m for m in said if isinstance(m, wire.Reached) and m.problem]
        assert len(pair.worker.shards.sockets(1)) <= 2


def test_a_push_goes_through_the_channel_whose_outbox_holds_it(said: list[wire.Message]) -> None:
    """Also where the shard reads it after the next channel is bound."""
    if not Path(shm.SHARED).is_dir():
        pytest.skip("no /dev/shm")
    with pairs(shared=True) as pair:
        pair.meet()
        before = pair.worker.shards.outbox(1)
        pair.channels._hand_out(SESSION, 1, "aes-256-gcm", pair.now)
        pair.push(1, b"through both")
        assert pair.worker.shards.outbox(1) is before is not None
        pair.until(lambda: pair.worker.shards.outbox(1) is not before)
        pair.until(lambda: pair.pushed)
        pair.push(2, b"the next one")
        pair.until(lambda: len(pair.pushed) == 2)
        assert pair.pushed == [b"through both", b"the next one"]
        assert len(set(pair.ids)) == 2
        assert before.room(1) is not None and not before.full


def test_pushes_under_the_former_keys_open_until_the_first_under_new_ones(
    said: list[wire.Message],
) -> None:
    """The worker hears later than the shard that the new channel is bound."""
    with pairs() as pair:
        pair.meet()
        pair.channels._hand_out(SESSION, 1, "aes-256-gcm", pair.now)
        while not pair.channels._old:
            pair.socket.poll(1)
            pair.passwords.answer(lambda: pair.now)
            while sockets.readable(pair.socket):
                pair.channels.receive(sockets.receive(pair.socket), pair.now)
        for content in (b"one", b"two"):
            pair.channels.round_over(pair.now)
            pair.push(1, content)
            pair.until(lambda: content in pair.pushed)  # noqa: B023
        pair.channels.round_over(pair.now)
        assert not pair.channels._old and len(set(pair.ids)) == 2


def test_an_observer_pushes_nothing_so_its_former_keys_end_with_the_round(
    said: list[wire.Message],
) -> None:
    with pairs() as pair:
        assert pair.worker.welcome is not None
        pair.worker.welcome = msgspec.structs.replace(pair.worker.welcome, id=0)
        pair.channels.dial(SESSION, 0, sealing.measured(), pair.now)
        pair.until(lambda: pair.worker.shards.sockets(1))
        pair.channels._hand_out(SESSION, 0, "aes-256-gcm", pair.now)
        pair.until(lambda: pair.channels._old)
        pair.channels.round_over(pair.now)
        assert not pair.channels._old and pair.channels.live == 1


def test_a_channel_that_is_cut_takes_not_the_next_one_with_it(
    monkeypatch: pytest.MonkeyPatch, said: list[wire.Message]
) -> None:
    monkeypatch.setattr(sealing, "RECORDS_MAX", 1)
    with pairs() as pair:
        pair.meet()
        unread = pair.average(1, b"made before")
        pair.channels.round_over(pair.now)
        assert pair.channels.lose(SESSION, "its connection was cut")
        assert pair.channels.live == 0
        pair.until(lambda: pair.channels.live)
        assert pair.brought(unread) == b"made before"
        assert pair.brought(pair.average(2, b"made after")) == b"made after"
        pair.until(lambda: len(said) == 2)
        assert said == [wire.Reached(shard=1)] * 2


def test_the_next_channel_to_the_server_comes_up_when_the_one_before_is_cut(
    monkeypatch: pytest.MonkeyPatch, said: list[wire.Message]
) -> None:
    monkeypatch.setattr(sealing, "RECORDS_MAX", 1)
    with pairs(shard=0) as pair:
        payloads = pair.worker.payloads
        pair.channels.dial(SESSION, 1, sealing.measured(), pair.now)
        pair.until(lambda: payloads.sealed)
        number = pair.channels.send(1, 0, [b"made before"])
        pair.channels.round_over(pair.now)
        assert pair.channels.lose(SESSION, "its connection was cut")
        assert not payloads.sealed
        pair.until(lambda: payloads.sealed)
        unread = wire.Sealed(nonce=NONCE, round=1, step=1, bucket=0, number=number)
        found = payloads.payload(unread, pair.now)
        assert isinstance(found, list) and [bytes(b) for b in found] == [b"made before"]
        assert said == [], "it need not dial again"


def test_dialing_ends_all_channels_and_counts_one_loss() -> None:
    with pairs() as pair:
        pair.passes_on = False
        for _ in range(3):
            pair.channels.dial(SESSION, 1, sealing.measured(), pair.now)
            assert len(pair.channels._channels) == 1 and not pair.channels._losses


def test_keys_with_which_nobody_came_are_offered_anew(
    monkeypatch: pytest.MonkeyPatch, said: list[wire.Message]
) -> None:
    """The message that had them was dropped, or was read too late."""
    monkeypatch.setattr(sealing, "RECORDS_MAX", 1)
    with pairs() as pair:
        pair.meet()
        pair.passes_on = False
        for waited_s, offers in ((0.0, 2), (VALID_S, 2), (0.1, 3)):
            pair.now += waited_s
            pair.channels.round_over(pair.now)
            assert len(pair.met) == offers
        assert len(pair.channels._channels) == 2, "what was not taken is forgotten"
        pair.worker.shards.told(msgspec.structs.replace(pair.met[-1], host=LOOPBACK), pair.now)
        pair.until(lambda: len(said) == 2)
        assert pair.brought(pair.average(1, b"average")) == b"average"


def test_an_offer_that_does_not_come_up_leaves_the_channel_that_works(
    said: list[wire.Message],
) -> None:
    with pairs() as pair:
        pair.meet()
        pair.channels._hand_out(SESSION, 1, "aes-256-gcm", pair.now)
        pair.passwords.take_back(pair.met[-1].id)
        pair.now += 6.0
        pair.until(lambda: not pair.worker.shards._coming)
        pair.push(1, b"push")
        pair.until(lambda: pair.pushed)
        assert said == [wire.Reached(shard=1)]


def gone(shard: int = 1) -> wire.Channel:
    """What the server says in its own name."""
    return wire.Channel(shard=shard, reason="this shard is gone")


def test_what_a_shard_has_sent_before_it_was_gone_is_read(said: list[wire.Message]) -> None:
    """The channel is closed when the round of that time is over, and some time has passed."""
    with pairs() as pair:
        pair.meet()
        shards = pair.worker.shards
        [channel] = shards._sources(1)
        averages = [pair.average(1, b"%d" % number) for number in range(2)]
        shards.told(gone(), pair.now)
        assert shards.outbox(1) is None
        pair.push(1, b"in vain")
        for average, waited_s in zip(averages, (0.0, BIG_S), strict=True):
            pair.now += waited_s
            shards.tick(pair.now, (1,))
            assert pair.brought(average) == b"%d" % (average.number - 1), "its round may be open"
        shards.tick(pair.now)
        assert shards.sockets(1) == [] and channel.socket.closed
        assert channel._sealer._aead is channel._opener._aead is None
        with pytest.raises(Lost):
            shards.payload(averages[0], pair.now)
        assert said == [wire.Reached(shard=1)], "the server knows"


def test_a_channel_to_a_shard_that_is_gone_is_closed_in_time(said: list[wire.Message]) -> None:
    with pairs() as pair:
        pair.meet()
        shards = pair.worker.shards
        shards.told(gone(), 0.0)
        for at, left in ((0.0, 1), (SILENCE_S / 2, 1), (SILENCE_S / 2 + 0.1, 0)):
            shards.tick(at)
            assert len(shards.sockets(1)) == left
        shards.told(gone(), 5.0)
        shards.tick(BIG_S)
        assert not shards._ended
        assert said == [wire.Reached(shard=1)]


def test_an_average_that_a_shard_did_not_send_before_it_was_gone_is_lost(
    said: list[wire.Message],
) -> None:
    """It is given up after the time in which it would have come."""
    with pairs() as pair:
        pair.meet()
        shards = pair.worker.shards
        average = wire.Sharded(nonce=NONCE, round=1, step=1, bucket=0, shard=1, number=1)
        shards.told(gone(), 0.0)
        assert shards.payload(average, 0.0) is None
        with pytest.raises(Lost):
            shards.payload(average, SILENCE_S / 2 + 0.1)
        assert shards.sockets(1) == [] and said == [wire.Reached(shard=1)]


def test_after_its_end_a_channel_may_be_made_anew(said: list[wire.Message]) -> None:
    """A payload was lost on it: the server lets the shard make another one."""
    with pairs() as pair:
        pair.meet()
        unread = pair.average(1, b"made before")
        pair.worker.shards.told(gone(), pair.now)
        pair.meet()
        pair.until(lambda: len(said) == 2)
        assert pair.brought(unread) == b"made before"
        pair.push(1, b"push")
        pair.until(lambda: pair.pushed)
        rubbish = wire.Channel(port=1, shard=1, host=LOOPBACK)
        pair.worker.shards.told(gone(), pair.now)
        pair.worker.shards.told(rubbish, pair.now)
        assert isinstance(said[-1], wire.Reached) and said[-1].problem, "it gets another one"


def test_late_news_of_a_shards_channel_end_no_other(said: list[wire.Message]) -> None:
    with pairs() as pair:
        pair.meet()
        shards = pair.worker.shards
        for id, works in (("00" * 16, True), (pair.met[-1].id, False)):
            shards.told(wire.Channel(shard=1, host=LOOPBACK, id=id, reason="cut"), pair.now)
            assert bool(shards.sockets(1)) is works
        assert said == [wire.Reached(shard=1), wire.Reached(shard=1, problem="cut")]
