"""Series of any length in bounded memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paramserver.output.thinned import Thinned

Values = tuple[int, ...]


def series(most: int) -> Thinned[Values]:
    return Thinned(most, lambda a, b: a + b)


@given(st.integers(0, 3000), st.integers(1, 40))
def test_all_values_are_there_once_in_order_and_evenly(count: int, most: int) -> None:
    thinned = series(most)
    for value in range(count):
        thinned.add((value,))
    items = thinned.items
    assert sum(items, ()) == tuple(range(count))
    assert len(items) == min(count, len(items)) <= most
    assert {len(item) for item in items[:-1]} <= {thinned.stride}
    assert not items or len(items[-1]) <= thinned.stride
    assert count < 2 * most or len(items) >= most // 2


@given(st.integers(0, 200), st.integers(1, 9), st.integers(0, 200))
def test_the_last_items_are_dropped_and_it_goes_on(count: int, most: int, cut: int) -> None:
    thinned = series(most)
    for value in range(count):
        thinned.add((value,))
    before, changed = thinned.items[:], thinned.changed
    thinned.drop_last(lambda item: item[-1] >= cut)
    kept = [item for item in before if item[-1] < cut]
    assert thinned.items == kept and (thinned.changed > changed) is (kept != before)
    thinned.add((cut,))
    assert thinned.items[-1][-1] == cut and len(thinned.items) <= most


@given(st.integers(1, 300), st.integers(1, 20))
def test_a_change_before_the_last_item_is_counted(count: int, most: int) -> None:
    thinned = series(most)
    for value in range(count):
        before, changed = thinned.items[:], thinned.changed
        thinned.add((value,))
        if before[:-1] != thinned.items[: max(0, len(before) - 1)]:
            assert thinned.changed > changed
