"""Codecs: what they lose is bounded, what is not finite stays visible, and no bytes do harm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from paramserver.config.schema import KEYS
from paramserver.tensors.codec import CODECS, Codec, codec_of_pushes
from paramserver.tensors.codec.topk import TopK

RATIO = 0.01
SECTION = 2**16  # of topk: positions count from its start, and of each one some are sent
BLOCK = 1024  # of int8: numbers that share a scale

LARGEST = 2.0**127  # above it, rounding may lead to infinity
TINY = 2.0**-126  # smallest normal float32


def encoded(codec: Codec, values: Tensor) -> tuple[list[bytearray], float]:
    """As the other side gets them, in memory of its own. `values` keep what was not sent."""
    buffers, scale = codec.encode(values)
    return [bytearray(b) for b in buffers], scale


def through(name: str, values: Tensor, ratio: float = RATIO) -> tuple[Tensor, Tensor]:
    """(what arrives, what stays with the sender); `values` are left alone."""
    codec, residual = codec_of_pushes(name, ratio), values.clone()
    buffers, scale = encoded(codec, residual)
    assert codec.fits(len(values), buffers) is None
    assert 0 < scale < math.inf
    arrived = codec.decode(buffers, scale, torch.full_like(values, math.nan)).clone()
    return arrived, residual if codec.leaves_residual else values - arrived


# ---------------------------------------------------------------------------- what may be lost


Bound = Callable[[Tensor, Tensor], Tensor]


def of_float16(values: Tensor, arrived: Tensor) -> Tensor:
    """11 bits; fewer, then none for what is far smaller than the largest."""
    return (2.0**-11 * values.abs()).clamp(min=max(2.0**-34 * values.abs().max().item(), 2.0**-149))


def of_int8(values: Tensor, arrived: Tensor) -> Tensor:
    """Half a step; the largest magnitude of a block is 127 steps."""
    largest = [b.abs().max().expand(len(b)) for b in values.split(BLOCK)]
    return (torch.cat(largest) / 253.999).clamp(min=2.0**-126)


def of_topk(values: Tensor, arrived: Tensor) -> Tensor:
    """What is sent is off as float16 is, what is not sent is off by itself."""
    return torch.where(arrived == 0, values.abs(), of_float16(values, arrived))


BOUNDS: dict[str, Bound] = {
    "float32": lambda values, arrived: torch.zeros_like(values),
    "float16": of_float16,
    "bfloat16": lambda values, arrived: (2.0**-8 * values.abs()).clamp(min=2.0**-134),
    "int8": of_int8,
    "topk": of_topk,
}
"""How far each number may be off, given the finite ones (as float64) and what arrived of them."""


def spike(n: int, at: int, height: float = 1.0, rest: float = 0.0) -> Tensor:
    values = torch.full((n,), rest)
    values[at] = height
    return values


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


SPECIAL = {
    "zeros": torch.zeros(3000),
    "negative zeros": -torch.zeros(3000),
    "one number": torch.tensor([0.3]),
    "all equal": torch.full((5000,), -0.7),
    "a spike among zeros": spike(70_000, 66_000),
    "a spike among small ones": spike(5000, 4999, 1e6, 1e-6),
    "smallest subnormals": torch.full((2000,), 2.0**-149),
    "subnormals": noise(2000) * 2.0**-130,
    "largest": torch.tensor([1.0, -1.0]).repeat(2000) * LARGEST,
    "largest and smallest": torch.tensor([LARGEST, 2.0**-149]).repeat(1000),
    "from tiny to huge": torch.logspace(-38, 38, 4000),
    "as gradients are": noise(700_000) * 1e-3 * torch.logspace(-3, 0, 700_000),
    "a matrix of few busy columns": (
        noise(512 * 256).view(256, 512) * (torch.arange(512) % 32 == 7)
    )
    .flatten()
    .contiguous(),
    **{f"{n} numbers": noise(n) for n in (2, BLOCK - 1, BLOCK, BLOCK + 1, SECTION, SECTION + 1)},
}

floats = st.floats(-LARGEST, LARGEST, width=32)
vectors = st.one_of(
    st.lists(floats, min_size=1, max_size=300),
    st.builds(
        lambda numbers, times: numbers * times,
        st.lists(floats, min_size=1, max_size=20),
        st.integers(1, 200),
    ),
).map(lambda numbers: torch.tensor(numbers, dtype=torch.float32))


def check_bound(name: str, values: Tensor) -> None:
    arrived, residual = through(name, values)
    off = (arrived.double() - values).abs()
    allowed = BOUNDS[name](values.double(), arrived)
    worst = int((off - allowed).argmax())
    assert (off <= allowed).all(), f"{values[worst]} arrived as {arrived[worst]}"
    # Sent and not sent is all there was, but for the rounding of one subtraction.
    assert torch.allclose(arrived.double() + residual, values.double(), rtol=2.0**-22, atol=TINY)
    # What makes error feedback converge: what stays is no larger than what there was.
    assert residual.double().norm() <= values.double().norm() * (1 + 1e-6) + TINY * len(values)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
def test_what_is_lost_of_special_numbers_is_bounded(name: str, values: Tensor) -> None:
    check_bound(name, values)


@given(values=vectors)
@pytest.mark.parametrize("name", CODECS)
def test_what_is_lost_of_any_numbers_is_bounded(name: str, values: Tensor) -> None:
    check_bound(name, values)


# -------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1500, 69_999])
def test_what_is_not_finite_stays_visible(name: str, bad: float, at: int) -> None:
    values = noise(70_000)
    values[at] = bad
    arrived, _ = through(name, values)
    assert not math.isfinite(torch.linalg.vector_norm(arrived))
    assert not math.isfinite(arrived[at])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_finite_at_all_stays_visible(name: str, bad: float) -> None:
    arrived, _ = through(name, torch.full((3000,), bad))
    assert not math.isfinite(torch.linalg.vector_norm(arrived))


# ---------------------------------------------------------------------- topk: which, and how many


@pytest.mark.parametrize("name", ["as gradients are", "a matrix of few busy columns"])
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1])
def test_topk_sends_of_each_section_its_share_the_largest(name: str, ratio: float) -> None:
    values = SPECIAL[name]
    arrived, _ = through("topk", values, ratio)
    for part, came in zip(values.split(SECTION), arrived.split(SECTION), strict=True):
        sent, unsent = part[came != 0].abs(), part[came == 0].abs()
        assert len(sent) == min(max(1, round(ratio * len(part))), int(part.count_nonzero()))
        assert unsent.max() <= sent.min()


@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("ratio", [0.0, 1e-9, 0.01, 0.5, 1.0])
def test_topk_never_sends_more_than_its_share(values: Tensor, ratio: float) -> None:
    buffers, _ = encoded(TopK(ratio), values.clone())
    sections = -(-len(values) // SECTION)
    sent = (len(buffers[0]) - 4 * sections) // 4
    assert sent <= sum(max(1, round(ratio * len(part))) for part in values.split(SECTION))
    assert sent >= min(1, int(values.count_nonzero()))


@pytest.mark.parametrize(("level", "sent"), [(0.0, 0), (0.5, 655)])
def test_topk_sends_no_zeros(level: float, sent: int) -> None:
    """Not where a section has nothing else, nor beside one of which many are equally large."""
    values = torch.zeros(3 * SECTION)
    values[:SECTION] = level
    assert len(encoded(CODECS["topk"], values)[0][0]) == 3 * 4 + 4 * sent


def test_topk_of_everything_sends_everything_but_zeros() -> None:
    values = noise(100_000)
    values[::3] = 0.0
    arrived, residual = through("topk", values, 1.0)
    assert torch.equal(arrived != 0, values != 0)
    assert residual.abs().max() <= 2.0**-11 * values.abs().max()


# ---------------------------------------------------------------------- what comes from elsewhere


def test_the_setting_knows_every_codec() -> None:
    for setting in ("codec", "codec_down"):
        (allowed,) = KEYS[setting].ranges
        assert all(allowed.holds(name) for name in CODECS)
        assert allowed.must == f"must be one of {', '.join(CODECS)}"


@pytest.mark.parametrize("name", CODECS)
def test_buffers_of_another_number_or_length_do_not_fit(name: str) -> None:
    codec = CODECS[name]
    whole = encoded(codec, noise(5000))[0]
    assert codec.fits(5000, whole) is None
    for wrong in ([], [*whole, *whole], [whole[0][:-1]], [whole[0] + b"\0"], [bytearray()]):
        assert "bytes" in (codec.fits(5000, wrong) or "")
    if name != "topk":
        assert codec.fits(4999, whole) is not None


def packed(counts: list[int], positions: list[int], values: list[float]) -> list[bytearray]:
    """topk's buffer, whatever is in it."""
    parts = (
        torch.tensor(counts, dtype=torch.int32),
        torch.tensor(positions, dtype=torch.int32).to(torch.uint16),
        torch.tensor(values, dtype=torch.float16),
    )
    return [bytearray(b"".join(part.numpy().tobytes() for part in parts))]


ELEMENTS = SECTION + 10


@pytest.mark.parametrize(
    ("buffers", "complaint"),
    [
        (packed([2, 1], [0, 65535, 9], [1, 2, 3]), None),
        (packed([0, 0], [], []), None),
        (packed([0, 1], [10], [1]), f"position {ELEMENTS} of {ELEMENTS}"),
        (packed([0, 1], [65535], [1]), f"of {ELEMENTS}"),
        (packed([2, 0], [5, 5], [1, 2]), "do not rise"),
        (packed([2, 0], [5, 4], [1, 2]), "do not rise"),
        (packed([1, 0], [5, 6], [1, 2]), "2 numbers came, their counts say otherwise"),
        (packed([2**31 - 1, 2**31 - 1], [5], [1]), "counts"),
        (packed([3, -1], [1, 2], [1, 2]), "counts"),
        (packed([-(2**31), -(2**31)], [], []), "counts"),
        ([bytearray(4)], "bytes"),
        ([bytearray(8 + 4 * (ELEMENTS + 1))], "bytes"),
    ],
)
def test_a_topk_buffer_is_checked_before_it_is_used(
    buffers: list[bytearray], complaint: str | None
) -> None:
    wrong = CODECS["topk"].fits(ELEMENTS, buffers)
    assert (wrong is None) if complaint is None else (complaint in str(wrong))


@given(data=st.data())
@pytest.mark.parametrize("name", CODECS)
def test_no_bytes_write_beyond_the_bucket(name: str, data: st.DataObject) -> None:
    """Rubbish of the right length: `fits` refuses it, or it is decoded into its place alone."""
    codec, n = CODECS[name], data.draw(st.sampled_from([1, 2, 1023, 1025, SECTION + 3]))
    lengths = [len(b) for b in encoded(codec, noise(n))[0]]
    buffers = [bytearray(length) for length in lengths]
    for at, byte in data.draw(
        st.lists(st.tuples(st.integers(0, lengths[0] - 1), st.integers(0, 255)), max_size=40)
    ):
        buffers[0][at] = byte
    around = torch.full((n + 200,), 7.0)
    if codec.fits(n, buffers) is None:
        assert len(codec.decode(buffers, 0.5, around[100 : 100 + n])) == n
    assert (around[:100] == 7.0).all()
    assert (around[100 + n :] == 7.0).all()


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_keeps_nothing_from_one_bucket_to_the_next(name: str) -> None:
    first = through(name, noise(3000))
    through(name, noise(70_000, seed=1) * 1e6)
    again = through(name, noise(3000))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
