"""Robust averages: which statistic they are, and that one broken worker moves them only so far."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paramserver.config.schema import build
from paramserver.errors import UserError
from paramserver.rounds.aggregate import described, trimmed_of
from paramserver.settings import Settings
from paramserver.tensors import robust

Array = npt.NDArray[Any]
RULES = ("trimmed", "median", "clipped")
KINDS = (np.float32, np.float64)


def average(
    rule: str,
    rows: Sequence[Array],
    weights: Sequence[int] | None = None,
    *,
    trim: float = 0.25,
    tau: float | None = None,
    centre: Array | None = None,
) -> Array:
    """What the server makes of these pushes of one bucket."""
    weights = [1] * len(rows) if weights is None else weights
    out = np.full_like(rows[0], np.nan)
    if rule == "clipped":
        robust.clipped(rows, weights, np.zeros_like(out) if centre is None else centre, tau, out)
    else:
        few = robust.lost_weight(weights, trimmed_of(trim, len(rows)))
        lost = few if rule == "trimmed" else robust.most_lost(weights)
        robust.middle(rows, weights, lost, out)
    return out


def gradients(seed: int, count: int, size: int = 40, kind: Any = np.float64) -> list[Array]:
    rng = np.random.default_rng(seed)
    same = rng.normal(size=size)
    return [(same + rng.normal(size=size)).astype(kind) for _ in range(count)]


def close(a: Array, b: Array, *, within: float = 1e-6) -> bool:
    return bool(np.abs(a - b).max() <= within * max(1.0, float(np.abs(b).max())))


# ---------------------------------------------------------------------- what others compute


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 16, 33])
def test_at_equal_weights_they_are_what_byzfl_computes(count: int, kind: Any) -> None:
    byzfl = pytest.importorskip("byzfl", reason="byzfl is not installed: make setup")
    for seed in range(3):
        rows = gradients(seed, count, kind=kind)
        for trim in (0.1, 0.25, 0.4):
            theirs = byzfl.TrMean(trimmed_of(trim, count))(rows)
            assert close(average("trimmed", rows, [32] * count, trim=trim), theirs)
        assert close(average("median", rows, [7] * count), byzfl.Median()(rows))
        theirs_clipped = byzfl.CenteredClipping(L=1, tau=3.0)
        centre = np.zeros_like(rows[0])
        for part in (rows, gradients(seed + 9, count, kind=kind)):  # its centre is the one before
            ours = average("clipped", part, tau=3.0, centre=centre)
            assert close(ours, theirs_clipped(part))
            centre = ours


def plain_middle(rows: Sequence[Array], weights: Sequence[int], lost: float) -> Array:
    """The same number by number, in Python."""
    inside = []
    for column in np.stack(rows).T:
        total, at = 0.0, 0.0
        for value, weight in sorted(zip(column.tolist(), weights, strict=True)):
            kept = min(at + weight, sum(weights) - lost) - max(at, lost)
            total, at = total + value * max(0.0, kept), at + weight
        inside.append(total / (sum(weights) - 2 * lost))
    return np.array(inside)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(0, 99), st.data())
def test_a_weight_is_a_part_of_the_order(
    weights: list[int], seed: int, data: st.DataObject
) -> None:
    rows = gradients(seed, len(weights), 12)
    most = robust.most_lost(weights)
    lost = data.draw(st.floats(0.0, most)) if most else 0.0
    out = np.empty(12)
    robust.middle(rows, weights, lost, out)
    assert close(out, plain_middle(rows, weights, _whole_where_equal(weights, lost)))


def _whole_where_equal(weights: Sequence[int], lost: float) -> float:
    """Of equal workers none is cut in two, but for the two in the middle."""
    if len(set(weights)) > 1:
        return lost
    return weights[0] * min(math.floor(lost / weights[0]), (len(weights) - 1) // 2)


# ---------------------------------------------------------------------- what must hold of each


@given(st.sampled_from(RULES), st.permutations(range(6)), st.integers(0, 99), st.booleans())
def test_workers_have_no_order(rule: str, order: list[int], seed: int, weighted: bool) -> None:
    rows, weights = gradients(seed, 6), [3, 1, 4, 1, 5, 9] if weighted else [2] * 6
    again = average(rule, [rows[i] for i in order], [weights[i] for i in order])
    assert close(again, average(rule, rows, weights), within=1e-12)


@given(st.sampled_from(RULES), st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_equal_pushes_give_the_push(rule: str, weights: list[int]) -> None:
    row = gradients(1, 1, kind=np.float32)[0]
    assert close(average(rule, [row] * len(weights), weights), row, within=1e-6)


@given(st.sampled_from(RULES), st.integers(1, 9), st.integers(1, 99), st.integers(0, 99))
def test_equal_weights_are_none(rule: str, count: int, weight: int, seed: int) -> None:
    rows = gradients(seed, count)
    assert close(average(rule, rows, [weight] * count), average(rule, rows), within=1e-15 * count)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_a_weight_counts_as_so_many_workers(weights: list[int], seed: int) -> None:
    rows = gradients(seed, len(weights))
    repeated = [row for row, weight in zip(rows, weights, strict=True) for _ in range(weight)]
    assert close(average("median", rows, weights), average("median", repeated), within=1e-12)
    lost = robust.lost_weight(weights, trimmed_of(0.25, len(rows)))
    once, many = np.empty(40), np.empty(40)
    robust.middle(rows, weights, lost, once)
    robust.middle(repeated, [1] * len(repeated), lost, many)
    if lost == int(lost):
        assert close(once, many, within=1e-12)


@given(
    st.sampled_from(RULES),
    st.lists(st.integers(10, 19), min_size=3, max_size=9),
    st.sampled_from([1e3, 1e12, -3e38]),
    st.integers(0, 99),
    st.integers(0, 2),
)
def test_one_liar_moves_them_only_so_far(
    rule: str, weights: list[int], lie: float, seed: int, liar: int
) -> None:
    """Whatever it sends, the average is among what the others sent (by number, or by distance), if
    no worker weighs as much as half of all."""
    if 2 * weights[liar] >= sum(weights):
        return
    rows = gradients(seed, len(weights), kind=np.float32)
    honest = [row for i, row in enumerate(rows) if i != liar]
    rows[liar] = np.full_like(rows[liar], lie)
    with np.errstate(over="ignore"):
        got = average(rule, rows, weights)
    if rule == "clipped":
        longest = max(float(np.linalg.norm(row)) for row in honest)
        assert np.linalg.norm(got) <= longest
    else:
        assert (got <= np.max(honest, axis=0) + 1e-6).all()
        assert (got >= np.min(honest, axis=0) - 1e-6).all()


def test_of_equal_values_each_counts() -> None:
    rows = [np.array([v]) for v in (1.0, 1.0, 1.0, 5.0, 9.0)]
    assert average("trimmed", rows)[0] == pytest.approx(7 / 3)
    assert average("median", rows)[0] == 1.0
    weights = [1, 2, 1, 2, 2]  # 1 1 1 1 5 5 9 9
    assert average("median", rows, weights)[0] == 3.0
    assert average("trimmed", rows, weights)[0] == 3.0  # the heaviest weighs 2: 1 1 5 5 are left


@pytest.mark.parametrize("rule", RULES)
def test_a_weight_may_be_any_number(rule: str) -> None:
    """Whoever weighs more than all others decides alone, but nothing is divided by zero."""
    rows = gradients(1, 3)
    for weights in ([2**62, 1, 1], [2**62, 2**62 - 1, 3], [2**53 + 1, 2**53, 2**53 - 1]):
        assert np.isfinite(average(rule, rows, weights)).all()
    if rule != "clipped":
        assert close(average(rule, rows, [2**62, 1, 1]), rows[0])


@pytest.mark.parametrize("rule", RULES)
def test_blocks_are_seams_that_do_not_show(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    rows = gradients(3, 5, 1000)
    whole = [average(rule, rows, weights) for weights in ([1] * 5, [1, 2, 3, 4, 5])]
    monkeypatch.setattr(robust, "BLOCK_BYTES", 1 << 10)
    parts = [average(rule, rows, weights) for weights in ([1] * 5, [1, 2, 3, 4, 5])]
    assert all(close(a, b, within=1e-12) for a, b in zip(whole, parts, strict=True))


# ---------------------------------------------------------------------- few workers


@pytest.mark.parametrize(
    ("count", "lost"), [(1, 0), (2, 0), (3, 1), (4, 1), (7, 1), (8, 2), (9, 2)]
)
def test_each_side_loses_a_quarter_at_least_one_and_never_half(count: int, lost: int) -> None:
    assert trimmed_of(0.25, count) == lost
    assert 2 * trimmed_of(0.5, count) < count


def test_where_one_of_two_is_far_off_the_other_says_how_far_is_usual() -> None:
    near, far = np.full(4, 1.0), np.full(4, 1e6)  # norms 2 and 2e6
    out = np.empty(4)
    factors = robust.clipped([near, far], [1, 1], np.zeros(4), None, out)
    assert factors == [1.0, pytest.approx(1e-6)]
    assert np.linalg.norm(out) == pytest.approx(2)


def test_a_worker_that_sends_the_centre_does_not_silence_the_others() -> None:
    rows = [np.zeros(4), np.zeros(4), np.full(4, 3.0)]
    assert (average("clipped", rows) == 1.0).all()


def test_of_two_counters_the_higher_one_and_of_more_one_in_the_middle() -> None:
    def count(*values: int, weights: Sequence[int] = ()) -> int:
        rows = [np.array([v]) for v in values]
        return int(robust.upper_median(rows, weights or [1] * len(rows))[0])

    assert count(7) == 7 and count(5, 7) == 7
    assert count(5, 2**60, 7) == 7 and count(7, 7, 8, 2**60) == 8
    assert count(5, 7, 9, weights=[9, 1, 1]) == 5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (Settings(), ""),
        (Settings(aggregate="trimmed", num_workers=8), "of 8 workers each side loses 2"),
        (Settings(aggregate="trimmed", num_workers=2), "the mean of two; aggregate=clipped limits"),
        (Settings(aggregate="median", num_workers=2), "the mean of two; aggregate=clipped limits"),
        (Settings(aggregate="clipped", num_workers=2), "nobody can tell which one is wrong"),
        (Settings(aggregate="median", num_workers=1), "one worker's gradient is the average"),
        (Settings(local_steps=8, scale_to_median=True), "mean, each worker's local steps scaled"),
    ],
)
def test_a_run_says_at_its_start_what_so_few_workers_can_do(settings: Settings, told: str) -> None:
    said = described(settings)
    assert told in said and bool(said) == bool(told)


# ---------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"aggregate": "Multi-Krum"}, "Multi-Krum compares whole gradients with each other"),
        ({"aggregate": "bulyan"}, "must be one of mean, trimmed, .*: bulyan compares whole"),
        ({"aggregate": "geometric_median"}, "it averages each bucket while others are still"),
        ({"aggregate": "krumm"}, "must be one of mean, trimmed, median, clipped, got 'krumm'"),
        ({"aggregate": "trimmed", "codec": "topk"}, "must be mean or clipped with codec=topk"),
        ({"aggregate": "median", "codec": "topk"}, "must be mean or clipped with codec=topk"),
        ({"trim": 0.0}, "trim must be more than 0 and at most 0.5"),
        ({"trim": 0.6}, "trim must be more than 0 and at most 0.5"),
        ({"clip_tau": 1.0}, "clip_tau must be null unless aggregate=clipped"),
        ({"aggregate": "clipped", "clip_tau": 0}, "clip_tau must be more than 0"),
        ({"scale_to_median": True}, "scale_to_median must be false with local_steps=1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        built(settings)


def test_settings_that_go_together() -> None:
    for codec in ("float32", "int8"):
        assert built({"aggregate": "trimmed", "codec": codec}).aggregate == "trimmed"
    assert built({"aggregate": "clipped", "codec": "topk", "clip_tau": 2}).clip_tau == 2.0
    assert built({"local_steps": "auto", "scale_to_median": True}).aggregate == "mean"


def built(settings: dict[str, Any]) -> Settings:
    tree = {**copy.deepcopy(vars(Settings())), **settings}
    tree["wandb"] = vars(tree["wandb"])
    return build(tree)
