"""The pacer: a worker that runs ahead waits for averages, and never for long."""

from hypothesis import given
from hypothesis import strategies as st

from paramserver.protocol.pacing import STALLED_MAX_S, Pacer


def test_a_window_of_buckets_is_under_way_and_each_average_lets_one_more_go() -> None:
    pacer: Pacer[str] = Pacer(window=2, patience_s=1.0)
    for bucket in range(4):
        pacer.add(bucket, f"push {bucket}", now=0.0)
    assert pacer.due(0.0) == ["push 0", "push 1"]
    assert pacer.due(0.9) == []
    pacer.averaged(1, 0.9)
    assert pacer.due(0.9) == ["push 2"]
    pacer.averaged(7, 1.0)  # one that was never sent, of a round before
    assert pacer.due(1.0) == []


def test_where_no_average_comes_everything_is_sent() -> None:
    pacer: Pacer[int] = Pacer(window=1, patience_s=1.0)
    for bucket in range(3):
        pacer.add(bucket, bucket, now=5.0)
    assert pacer.due(5.0) == [0]
    assert pacer.due(6.0) == []
    assert pacer.due(6.1) == [1, 2]
    pacer.add(3, 3, now=6.2)  # and what is complete later too
    assert pacer.due(6.2) == [3]


def test_what_no_round_waits_for_is_sent_at_once() -> None:
    pacer: Pacer[int] = Pacer(window=1, patience_s=1.0)
    for bucket in range(3):
        pacer.add(bucket, bucket, now=0.0)
    assert pacer.due(0.0) == [0]
    pacer.hurry()
    assert pacer.due(0.0) == [1, 2]
    assert pacer.begin() == []
    for bucket in range(2):
        pacer.add(bucket, bucket, now=0.1)
    assert pacer.due(0.1) == [0], "the next round is as usual"


def test_an_average_starts_the_patience_anew() -> None:
    pacer: Pacer[int] = Pacer(window=1, patience_s=1.0)
    for bucket in range(3):
        pacer.add(bucket, bucket, now=0.0)
    assert pacer.due(0.0) == [0]
    pacer.averaged(0, 0.9)
    assert pacer.due(0.9) == [1]
    assert pacer.due(1.8) == []
    assert pacer.due(2.0) == [2]


def test_on_a_slow_link_patience_is_what_averages_took_in_the_round_before() -> None:
    pacer: Pacer[int] = Pacer(window=1, patience_s=1.0)

    def rounds_of_three(gap_s: float, now: float) -> float:
        """When everything was let go in a round whose first averages come after that, in vain."""
        for bucket in range(4):
            pacer.add(bucket, bucket, now)
        assert pacer.due(now) == [0]
        for bucket in range(2):
            now += gap_s
            pacer.averaged(bucket, now)
            assert pacer.due(now) == [bucket + 1]
        waited = 0
        while pacer.due(now + waited / 10) == []:
            waited += 1
        pacer.begin()
        return waited / 10

    assert rounds_of_three(0.75, 0.0) == 1.1
    assert rounds_of_three(0.75, 100.0) == 2.3, "three times what they took"
    assert rounds_of_three(0.125, 200.0) == 2.3
    assert rounds_of_three(0.125, 300.0) == 1.1, "at least as long as ever"
    assert rounds_of_three(0.75, 400.0) == 1.1
    assert rounds_of_three(2.5, 500.0) == 2.3
    assert rounds_of_three(2.5, 600.0) == STALLED_MAX_S + 0.1


def test_a_round_that_is_over_takes_what_waits_with_it() -> None:
    pacer: Pacer[int] = Pacer(window=1, patience_s=1.0)
    for bucket in range(3):
        pacer.add(bucket, bucket, now=0.0)
    pacer.due(0.0)
    assert pacer.begin() == [1, 2]
    assert pacer.begin() == []
    pacer.add(0, 10, now=50.0)  # time between rounds does not count
    pacer.add(1, 11, now=50.0)
    assert pacer.due(50.0) == [10]


@given(
    st.lists(st.sampled_from(["add", "average", "time"]), max_size=60),
    st.integers(1, 5),
)
def test_each_push_is_sent_once_in_its_order_and_in_the_end_all_are(
    events: list[str], window: int
) -> None:
    pacer: Pacer[int] = Pacer(window, patience_s=1.0)
    now, added, sent, averaged = 0.0, 0, list[int](), 0
    for event in events:
        if event == "add":
            pacer.add(added, added, now)
            added += 1
        elif event == "average" and averaged < len(sent):
            pacer.averaged(sent[averaged], now)
            averaged += 1
        else:
            now += 0.3
        sent += pacer.due(now)
    sent += pacer.due(now + 1.1)
    assert sent == list(range(added))
