"""Messages as frames: each type there and back, and nothing but `PeerError` for anything else."""

from __future__ import annotations

import json
import sys
import time
import typing
from contextlib import suppress
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paramserver.errors import PeerError
from paramserver.protocol import messages as wire

TYPES = typing.get_args(wire.ANY)
SLOW_S = 5.0
"""Far more than the largest header takes on a busy machine, far less than a quadratic parser."""

# -------------------------------------------------------------------------- messages of all kinds

INTS = st.integers(-wire.NUMBER_MAX, wire.NUMBER_MAX)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SIMPLE: dict[Any, st.SearchStrategy[Any]] = {
    int: INTS,
    float: FLOATS,
    str: st.text(max_size=8),
    bool: st.booleans(),
    type(None): st.none(),
    msgspec.UnsetType: st.just(msgspec.UNSET),
}
JSON = st.recursive(
    st.none() | st.booleans() | INTS | FLOATS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Whatever a field of this type may hold."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return JSON
    if origin is typing.Annotated:
        limit = args[1]
        if args[0] is int:
            return st.integers(limit.ge, limit.le)
        return values(args[0]).filter(lambda v: len(v) <= limit.max_length)
    if origin is dict:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=3)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    if args:  # a union
        return st.one_of(*map(values, args))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return structs(kind)
    return SIMPLE[kind]


def structs(kind: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{f: st.deferred(lambda h=h: values(h)) for f, h in hints.items()})


def there_and_back(message: wire.Message, *buffers: Any) -> tuple[Any, list[Any]]:
    return wire.from_frames([bytes(f) for f in wire.to_frames(message, *buffers)])


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_there_and_back(kind: type[wire.Message]) -> None:
    @settings(max_examples=60)
    @given(structs(kind), st.lists(st.binary(max_size=20), max_size=3))
    def check(message: wire.Message, buffers: list[bytes]) -> None:
        back, rest = there_and_back(message, *buffers)
        assert type(back) is type(message)
        assert back == message
        assert rest == buffers

    check()


def test_every_message_is_told_apart_and_described() -> None:
    tags = [kind.__struct_config__.tag for kind in TYPES]
    assert len(set(tags)) == len(tags)
    every = {c for c in vars(wire).values() if isinstance(c, type) and issubclass(c, wire.Message)}
    assert every - {wire.Message} == set(TYPES)
    described = wire.__doc__ or ""
    for kind in TYPES:
        assert f"\n{kind.__name__} " in described, f"{kind.__name__} is not in the table"


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_the_type_comes_first_so_that_sub_can_choose(kind: type[wire.Message]) -> None:
    @settings(max_examples=5)
    @given(structs(kind))
    def check(message: wire.Message) -> None:
        assert wire.to_frames(message)[0].startswith(wire.topic(kind))

    check()


def test_buffers_are_passed_on_and_not_copied() -> None:
    numbers = bytearray(b"12345678")
    frames = wire.to_frames(wire.Piece(snapshot=1, piece=2), memoryview(numbers))
    _, [buffer] = wire.from_frames(frames)
    numbers[0] = ord("X")
    assert bytes(buffer) == b"X2345678"


def test_frames_of_zmq_are_taken_as_they_come() -> None:
    frames = wire.to_frames(wire.Piece(snapshot=1, piece=2), b"abc")
    message, [buffer] = wire.from_frames([zmq.Frame(f) for f in frames])
    assert message == wire.Piece(snapshot=1, piece=2)
    assert isinstance(buffer, memoryview) and bytes(buffer) == b"abc"


def test_a_field_of_a_later_version_is_passed_over() -> None:
    message, _ = wire.from_frames([b'{"type":"probe","later":{"a":[1,2]},"session":"s"}'])
    assert message == wire.Probe(session="s")


def test_a_join_of_an_older_worker_is_read() -> None:
    """It also has a link, which was never used."""
    join = wire.Join(layout=wire.Layout(()), step=3, lineage="x", device="cpu")
    [header] = wire.to_frames(join)
    older = json.loads(header) | {"link": "ipc"}
    assert wire.from_frames([json.dumps(older).encode()]) == (join, [])


def test_defaults_need_not_be_sent() -> None:
    message, _ = wire.from_frames([b'{"type":"push","round":1,"bucket":0,"samples":2}'])
    assert message == wire.Push(round=1, bucket=0, samples=2)


# -------------------------------------------------------------------------- limits

MEASURED = {("Welcome", "settings"), ("Join", "ledger"), ("Close", "ledger")}
"""Dicts of anything: their size as JSON is limited."""


def unlimited(kind: Any, where: tuple[str, ...], limit: Any = None) -> list[str]:
    """Places in this type where a peer could put as much as it likes."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return unlimited(args[0], where, args[1])
    if kind is int:
        most = 2**63 if where == ("Hello", "id") else wire.NUMBER_MAX
        fine = limit is not None and limit.ge >= -most and limit.le <= most
        return [] if fine else [".".join(where)]
    if kind is Any:
        return [] if where[:2] in MEASURED else [".".join(where)]
    found = []
    many = origin is dict or (origin is tuple and args[-1] is Ellipsis)
    if (kind is str or many) and (limit is None or limit.max_length is None):
        found.append(".".join(where))
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        return [gap for f, h in hints.items() for gap in unlimited(h, (*where, f))]
    inside = [a for a in args if a not in (Ellipsis, type(None))]
    return found + [gap for a in inside for gap in unlimited(a, (*where, "[]") if many else where)]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_field_has_a_limit(kind: type[wire.Message]) -> None:
    hints = typing.get_type_hints(kind, include_extras=True)
    assert [gap for f, h in hints.items() for gap in unlimited(h, (kind.__name__, f))] == []


def test_a_field_without_a_limit_would_be_found() -> None:
    class Lax(msgspec.Struct):
        number: int
        text: str
        more: tuple[wire.Int, ...]
        table: dict[str, float]

    assert unlimited(Lax, ("Lax",)) == [
        "Lax.number",
        "Lax.text",
        "Lax.more",
        "Lax.table",
        "Lax.table.[]",
    ]


def header_of(kind: type[wire.Message], nbytes: int) -> bytes:
    begin = wire.topic(kind) + b',"later":"'
    return begin + b"x" * (nbytes - len(begin) - 2) + b'"}'


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
def test_every_kind_of_message_has_a_limit_for_its_header(kind: type[wire.Message]) -> None:
    most = wire.HEADER_LIMITS.get(kind, wire.USUAL_HEADER_BYTES_MAX)
    told = f"a header of {most + 1} bytes (at most {most})"
    assert refused(header_of(kind, most + 1)) == told
    with suppress(PeerError):  # fields are missing, but it was looked at
        wire.from_frames([header_of(kind, most)])


def test_a_large_header_that_hides_its_kind_is_refused() -> None:
    hidden = b'{"step":1,"type":"join",' + b" " * wire.USUAL_HEADER_BYTES_MAX + b"}"
    assert "at most" in refused(hidden)


def test_more_frames_than_any_message_has_are_refused() -> None:
    frames = wire.to_frames(wire.Want(snapshot=1, piece=1), *[b"x"] * wire.BUFFERS_MAX)
    wire.from_frames(frames)
    assert refused(*frames, b"x") == "18 frames (at most 17)"


def test_what_may_hold_anything_is_measured() -> None:
    ledger = {"waiting": [[0, i, i + 1] for i in range(40_000)]}
    join = wire.Join(
        layout=wire.Layout(()), step=0, lineage="", device="", recipe="", ledger=ledger
    )
    assert "`ledger` has" in refused(wire.to_frames(join)[0])
    long = wire.Join(
        layout=wire.Layout((wire.Tensor("w" * 900, (), "float32"),) * 400),
        step=0,
        lineage="",
        device="",
        ledger={"waiting": []},
    )
    assert there_and_back(long)[0] == long


def test_sentences_are_cut_where_they_are_made() -> None:
    """Else what one peer says at length could make a message that no other peer understands."""
    long = "x" * 10_000
    for message in (
        wire.Reject(long, long),
        wire.Goodbye(long),
        wire.Abort(1, long),
        wire.Refused(1, long),
        msgspec.structs.replace(CLOSE, reason=long, late={1: long}),
        wire.End(nonce="", step=1, lineage="", reason=long),
        wire.Pulse(nonce="", step=1, lineage="", phase=long),
    ):
        there_and_back(message)


def test_what_older_peers_have_no_fields_for_is_read_off_their_words() -> None:
    goodbye = b'{"type":"goodbye","reason":"%s"}'
    assert wire.from_frames([goodbye % b"finished"])[0].is_done
    assert not wire.from_frames([goodbye % b"it was stopped"])[0].is_done
    pulse = b'{"type":"pulse","nonce":"n","step":0,"lineage":"l","phase":"%s"}'
    assert wire.from_frames([pulse % b"training"])[0].trains
    assert not wire.from_frames([pulse % b"between rounds"])[0].trains


def test_what_has_a_field_is_not_read_off_words() -> None:
    assert there_and_back(wire.Goodbye("that is all", finished=True))[0].is_done
    assert not there_and_back(wire.Goodbye("finished", finished=False))[0].is_done
    pulse = wire.Pulse(nonce="n", step=0, lineage="l", phase="step by step", doing="training")
    assert there_and_back(pulse)[0].trains
    told = msgspec.structs.replace(pulse, phase="training", doing="what comes after this version")
    assert not there_and_back(told)[0].trains


@pytest.mark.parametrize(
    ("header", "limit"),
    [
        (b'{"type":"push","round":1,"bucket":0,"samples":%d}' % (2**63 - 1), "2147483647"),
        (b'{"type":"fetch","step":%d,"lineage":""}' % (2**53 + 1), "9007199254740992"),
        (b'{"type":"goodbye","reason":"","digest":"%s"}' % (b"d" * 129), "length <= 128"),
    ],
)
def test_a_number_or_text_beyond_its_limit_is_refused(header: bytes, limit: str) -> None:
    assert limit in refused(header)


# -------------------------------------------------------------------------- what is no message


def refused(*frames: Any) -> str:
    """The text of the error; fails where there is none, another one, or where it took long."""
    start = time.perf_counter()
    with pytest.raises(PeerError) as error:
        wire.from_frames(frames)
    assert time.perf_counter() - start < SLOW_S
    assert len(str(error.value)) < 500
    return str(error.value)


def harmless(header: bytes) -> None:
    """Whatever this is: a message of this protocol that can be sent again, or a `PeerError`."""
    start = time.perf_counter()
    try:
        message, _ = wire.from_frames([header])
    except PeerError as e:
        str(e).encode()  # it is sent back and printed
    else:
        assert isinstance(message, TYPES)
        wire.to_frames(message)
    assert time.perf_counter() - start < SLOW_S


def test_no_frame_at_all() -> None:
    assert refused() == "a message without a header"


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"null",
        b"1",
        b"[]",
        b"{}",
        b'"probe"',
        b"\x00\xff\xfe",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f",
        b"\xef\xbb\xbf" + b'{"type":"probe","session":"s"}',
        b'{"type":"probe"}',
        b'{"type":"probe","session":1}',
        b'{"type":"probe","session":null}',
        b'{"type":"probe","session":"s"} {}',
        b'{"type":"probe","type":"beat","session":"s"}',
        b'{"type":"Probe","session":"s"}',
        b'{"type":"message"}',
        b'{"type":["probe"],"session":"s"}',
        b'{"type":1,"session":"s"}',
        b'{"session":"s"}',
        b'{"type":"probe","session":"\xff\xfe"}',
        b'{"type":"probe","session":"\\ud800"}',
        b'{"type":"probe","session":"\x00"}',
        b'{"type":"want","snapshot":1.5,"piece":1}',
        b'{"type":"want","snapshot":1e2,"piece":1}',
        b'{"type":"want","snapshot":"1","piece":1}',
        b'{"type":"want","snapshot":true,"piece":1}',
        b'{"type":"want","snapshot":NaN,"piece":1}',
        b'{"type":"want","snapshot":' + b"9" * 30 + b',"piece":1}',
        b'{"type":"want","snapshot":' + b"9" * 5000 + b',"piece":1}',
        b'{"type":"push","round":1,"bucket":1,"samples":1,"scale":1e999}',
        b'{"type":"push","round":1,"bucket":1,"samples":1,"scale":Infinity}',
        b'{"type":"push","round":1,"bucket":1,"samples":1,"absent":[1.5]}',
        b'{"type":"push","round":1,"bucket":1,"samples":1,"absent":{"0":1}}',
        b'{"type":"report","step":1,"values":{"loss":"low"}}',
        b'{"type":"open","nonce":"","round":1,"step":1,"lineage":"","leases":{"one":[]}}',
        b'{"type":"open","nonce":"","round":1,"step":1,"lineage":"","leases":{"1":[[1,2]]}}',
    ],
    ids=lambda header: repr(header[:60]),
)
def test_what_is_no_message_is_refused(header: bytes) -> None:
    refused(header)
    refused(memoryview(header))
    refused(zmq.Frame(header))


LARGEST = wire.HEADER_BYTES_MAX
JOIN = (
    b'{"type":"join","step":1,"lineage":"","device":"","layout":{"tensors":[%s]},"ledger":{"a":%s}}'
)


def test_a_header_that_is_too_large_is_not_looked_at() -> None:
    assert "at most" in refused(b'{"type":"probe","session":"' + b"s" * LARGEST + b'"}')
    assert "at most" in refused(memoryview(bytes(LARGEST + 1)))


@pytest.mark.parametrize(
    ("part", "header"),
    [
        ("[", b'{"type":"welcome","settings":{"a":%s}}'),
        ("[", JOIN % (b"", b"%s")),
        ('{"a":', JOIN % (b"", b"%s")),
        ("[", b"%s"),
        ('{"type":', b"%s"),
    ],
)
def test_deep_nesting_is_refused(part: str, header: bytes) -> None:
    for depth in (2000, LARGEST // len(part) - 200):
        refused(header % (depth * part.encode()))
        closing = b"]" if part == "[" else b"}"
        if depth * (len(part) + 1) < LARGEST - 200:
            refused(header % (depth * part.encode() + b"1" + depth * closing))


@pytest.mark.parametrize("limit", [1000, 20_000])  # the decoder's, which differs by Python
def test_nesting_is_let_through_up_to_a_limit_of_ours(limit: int) -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        for depth in (wire.LEVELS_MAX, 100, 900, 2000):
            refused(JOIN % (b"", b"[" * depth + b"1" + b"]" * depth))
        depth = wire.LEVELS_MAX - 2
        message, _ = wire.from_frames([JOIN % (b"", b"[" * depth + b"1" + b"]" * depth)])
        wire.to_frames(message)
    finally:
        sys.setrecursionlimit(before)


def test_nesting_in_a_field_that_nobody_knows_is_harmless() -> None:
    for depth in (10, 900, 2000):
        nested = b"[" * depth + b"1" + b"]" * depth
        harmless(b'{"type":"probe","x":%s,"session":"s"}' % nested)


@pytest.mark.parametrize(
    "header",
    [
        b'{"type":"want","snapshot":%s,"piece":1}' % (b"9" * 4_000_000),
        b'{"type":"want","snapshot":-%s,"piece":1}' % (b"9" * 4_000_000),
        b'{"type":"push","round":1,"bucket":1,"samples":1,"scale":1.%s}' % (b"9" * 4_000_000),
        b'{"type":"push","round":1,"bucket":1,"samples":1,"scale":1e-%s}' % (b"9" * 4_000_000),
        b'{"type":"push","round":1,"bucket":1,"samples":1,"absent":[%s1]}' % (b"1," * 2_000_000),
        JOIN % (b"", b"%s" % (b"9" * 4_000_000)),
        JOIN % (b"", b"[%s1]" % (b"1," * 2_000_000)),
        JOIN % (b'["w",[%s1],"f"]' % (b"9" * 18 + b","), b"1"),
        JOIN % (b'["w",[%s1],"float32"]' % ((b"9" * 18 + b",") * 200_000), b"1"),
        JOIN % (b'["w",[],"float32"],' * 200_000 + b'["w",[],"float32"]', b"1"),
        b'{"type":"probe","session":"%s"}' % (b"\\u0041" * 600_000),
        b'{"type":"report","step":1,"values":{%s"b":1}}' % (b'"a":null,' * 400_000),
        b" " * 4_000_000 + b'{"type":"probe","session":"s"}',
    ],
    ids=lambda header: repr(header[:70]),
)
def test_what_is_large_is_refused_or_read_and_never_slow(header: bytes) -> None:
    assert len(header) <= LARGEST
    harmless(header)


EXAMPLE = wire.to_frames(
    wire.Close(
        nonce="n",
        round=3,
        step=2,
        lineage="l",
        buckets=(0, 1),
        contributors={1: 10, 2: 4},
        late={3: "late (usually within 0.41 s, last seen 1.2 s ago)"},
        loss=0.5,
        seconds=0.1,
        ledger={"samples": 5, "waiting": [(0, 1, 2)]},
        open=wire.Open(nonce="n", round=4, step=2, lineage="l", leases={1: ((0, 1, 2),)}),
        partly={2: (0,)},
    )
)[0]


def test_a_truncated_header_is_refused_wherever_it_ends() -> None:
    for length in range(len(EXAMPLE)):
        refused(EXAMPLE[:length])


@given(
    st.lists(
        st.tuples(st.integers(0, len(EXAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4
    )
)
def test_a_garbled_header_is_refused_or_another_message(changes: list[tuple[int, int]]) -> None:
    header = bytearray(EXAMPLE)
    for place, byte in changes:
        header[place] = byte
    harmless(bytes(header))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(header: bytes) -> None:
    harmless(header)


@settings(max_examples=300)
@given(
    st.sampled_from(TYPES),
    st.dictionaries(st.sampled_from(["step", "round", "open", "layout", "ledger", "leases"]), JSON),
    st.data(),
)
@example(wire.Join, {"layout": {"tensors": [["w", [-1], "float32", "grad"]]}}, None)
def test_any_json_in_any_field_is_refused_or_a_message(
    kind: type[wire.Message], more: dict[str, Any], data: st.DataObject | None
) -> None:
    fields = dict(more)
    if data is not None:
        for name in kind.__struct_fields__:
            if name not in fields and data.draw(st.booleans()):
                fields[name] = data.draw(JSON)
    harmless(json.dumps({"type": kind.__struct_config__.tag, **fields}).encode())


# -------------------------------------------------------------------------- layouts and lineages

WEIGHT, BIAS = wire.Tensor("weight", (2, 3), "float32"), wire.Tensor("bias", (), "float16", "stat")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ((WEIGHT, BIAS), None),
        ((WEIGHT,), "bias scalar float16 (stat) is missing"),
        ((), "weight 2x3 float32 is missing"),
        (
            (wire.Tensor("weight", (3, 2), "float32"), BIAS),
            "weight is 3x2 float32, the run has 2x3 float32",
        ),
        (
            (wire.Tensor("weight", (2, 3), "bfloat16"), BIAS),
            "weight is 2x3 bfloat16, the run has 2x3 float32",
        ),
        (
            (WEIGHT, wire.Tensor("bias", (), "float16")),
            "bias is scalar float16, the run has scalar float16 (stat)",
        ),
        (
            (WEIGHT, BIAS, wire.Tensor("more", (1,), "float32")),
            "more 1 float32 is not in the run's model",
        ),
        ((BIAS, WEIGHT), "the parameters come in another order"),
    ],
)
def test_the_difference_of_layouts_is_told(
    other: tuple[wire.Tensor, ...], difference: str | None
) -> None:
    layout, second = wire.Layout((WEIGHT, BIAS)), wire.Layout(other)
    assert layout.difference(second) == difference
    assert (layout.fingerprint() == second.fingerprint()) == (difference is None)


CLOSE = msgspec.json.decode(EXAMPLE, type=wire.Close)


def test_a_lineage_names_all_that_came_before_and_the_close() -> None:
    name = wire.next_lineage("before", CLOSE)
    assert len(name) == 32
    assert wire.next_lineage("other", CLOSE) != name
    for field, value in {
        "step": 3,
        "round": 4,
        "buckets": (0,),
        "contributors": {1: 10},
        "loss": None,
        "ledger": {},
        "nonce": "",
    }.items():
        changed = msgspec.structs.replace(CLOSE, **{field: value})
        assert wire.next_lineage("before", changed) != name, field


def test_a_lineage_does_not_hang_on_what_follows_nor_on_its_way() -> None:
    name = wire.next_lineage("before", CLOSE)
    assert wire.next_lineage("before", msgspec.structs.replace(CLOSE, open=None)) == name
    assert wire.next_lineage("before", msgspec.structs.replace(CLOSE, lineage=name)) == name


@settings(max_examples=60)
@given(structs(wire.Close))
def test_a_lineage_is_the_same_on_both_sides(close: wire.Close) -> None:
    assert wire.next_lineage("before", there_and_back(close)[0]) == wire.next_lineage(
        "before", close
    )


# ------------------------------------------------------------------------- joined messages


@given(st.lists(st.lists(st.binary(min_size=1, max_size=4), min_size=1, max_size=4), min_size=1))
def test_joined_messages_come_apart_as_they_were(messages: list[list[bytes]]) -> None:
    assert wire.split(wire.join(messages)) == messages


def test_a_joined_average_and_close_are_both_read() -> None:
    average = wire.Average(nonce="n", round=1, step=1, bucket=0)
    pulse = wire.Pulse(nonce="n", step=1, lineage="a", phase="training")
    joined = wire.join([wire.to_frames(average, b"1234"), wire.to_frames(pulse)])
    assert joined[0].startswith(wire.topic(wire.Average)), "it goes to those who hear averages"
    first, second = map(wire.from_frames, wire.split(joined))
    assert (first, second) == ((average, [b"1234"]), (pulse, []))


def test_nobody_insists_on_more_samples_than_statistics_over_a_batch_need() -> None:
    """Others would get none of a round, where samples are divided by speed."""
    frames = wire.to_frames(wire.Ready(samples=100, batch_size=8, least=wire.LEAST_MAX + 1))
    with pytest.raises(PeerError, match="least"):
        wire.from_frames(frames)
