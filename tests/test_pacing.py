"""workers/pace.py: who runs ahead waits for the averages, and never for long."""

from hypothesis import given
from hypothesis import strategies as st

from paramserver.protocol.pacing import Pace


def test_a_window_of_buckets_is_under_way_and_each_average_lets_one_more_go() -> None:
    pace: Pace[str] = Pace(window=2, patience_s=1.0)
    for bucket in range(4):
        pace.add(bucket, f"push {bucket}", now=0.0)
    assert pace.due(0.0) == ["push 0", "push 1"]
    assert pace.due(0.9) == []
    pace.averaged(1, 0.9)
    assert pace.due(0.9) == ["push 2"]
    pace.averaged(7, 1.0)  # one that was never sent, of a round before
    assert pace.due(1.0) == []


def test_where_no_average_comes_everything_is_sent() -> None:
    pace: Pace[int] = Pace(window=1, patience_s=1.0)
    for bucket in range(3):
        pace.add(bucket, bucket, now=5.0)
    assert pace.due(5.0) == [0]
    assert pace.due(6.0) == []
    assert pace.due(6.1) == [1, 2]
    pace.add(3, 3, now=6.2)  # and what is complete later too
    assert pace.due(6.2) == [3]


def test_an_average_starts_the_patience_anew() -> None:
    pace: Pace[int] = Pace(window=1, patience_s=1.0)
    for bucket in range(3):
        pace.add(bucket, bucket, now=0.0)
    assert pace.due(0.0) == [0]
    pace.averaged(0, 0.9)
    assert pace.due(0.9) == [1]
    assert pace.due(1.8) == []
    assert pace.due(2.0) == [2]


def test_a_round_that_is_over_takes_what_waits_with_it() -> None:
    pace: Pace[int] = Pace(window=1, patience_s=1.0)
    for bucket in range(3):
        pace.add(bucket, bucket, now=0.0)
    pace.due(0.0)
    assert pace.begin() == [1, 2]
    assert pace.begin() == []
    pace.add(0, 10, now=50.0)  # time that passed between rounds is nobody's fault
    pace.add(1, 11, now=50.0)
    assert pace.due(50.0) == [10]


@given(
    st.lists(st.sampled_from(["add", "average", "time"]), max_size=60),
    st.integers(1, 5),
)
def test_each_push_is_sent_once_in_its_order_and_in_the_end_all_are(
    events: list[str], window: int
) -> None:
    pace: Pace[int] = Pace(window, patience_s=1.0)
    now, added, sent, averaged = 0.0, 0, list[int](), 0
    for event in events:
        if event == "add":
            pace.add(added, added, now)
            added += 1
        elif event == "average" and averaged < len(sent):
            pace.averaged(sent[averaged], now)
            averaged += 1
        else:
            now += 0.3
        sent += pace.due(now)
    sent += pace.due(now + 1.1)
    assert sent == list(range(added))
