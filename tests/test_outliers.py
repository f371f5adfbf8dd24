"""Which gradients are out of all proportion."""

from __future__ import annotations

import pytest

from paramserver.rounds.outliers import KEPT, NEEDED, Norms


def test_the_first_ones_tell_what_is_usual() -> None:
    norms = Norms(10.0)
    assert all(norms.judge(0, 1.0) is None for _ in range(NEEDED - 1))
    assert norms.judge(0, 1e9) is None
    assert norms.judge(0, 9.9) is None
    why = norms.judge(0, 10.5)
    assert why == ("its norm of 10.5 is 10.5 times the usual 1 (bucket 0; max_norm_ratio 10)")


def test_what_was_refused_does_not_become_usual() -> None:
    norms = Norms(10.0)
    for _ in range(NEEDED):
        norms.judge(0, 1.0)
    assert all(norms.judge(0, 11.0) for _ in range(2 * KEPT))
    assert norms.judge(0, 1.0) is None


def test_norms_that_grow_step_by_step_are_usual() -> None:
    norms = Norms(2.0)
    assert all(norms.judge(0, 1.001**step) is None for step in range(5000))


@pytest.mark.parametrize("before", [2.0, 1e-12], ids=["it has learned", "it came back like that"])
def test_a_model_that_fits_its_data_may_still_meet_what_it_does_not_know(before: float) -> None:
    """As in a run of 48,000 steps over small data: nearly all batches gave nothing any more, and
    the few that did were refused one after another, until the run ended."""
    norms = Norms(1000.0)
    for norm in (*[before] * KEPT, *[1e-12] * 10 * KEPT):
        assert norms.judge(0, norm) is None
    assert norms.judge(0, 5.0) is None and norms.judge(0, 1e-3) is None
    assert norms.judge(0, 1e12)


def test_each_bucket_has_its_own() -> None:
    norms = Norms(10.0)
    for _ in range(KEPT):
        norms.judge(0, 1.0)
        norms.judge(1, 1000.0)
    assert norms.judge(0, 1000.0) and norms.judge(1, 1000.0) is None


@pytest.mark.parametrize("ratio", [None, 10.0])
def test_zero_is_never_a_measure(ratio: float | None) -> None:
    norms = Norms(ratio)
    assert all(norms.judge(0, 0.0) is None for _ in range(KEPT))
    assert norms.judge(0, 5.0) is None
