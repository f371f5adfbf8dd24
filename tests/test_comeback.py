"""Whom a server that was started again waits for."""

from __future__ import annotations

from paramserver.comeback import Comeback
from paramserver.wire import Join, Layout

LAYOUT = Layout(tensors=())


def at(step: int, *contributors: int) -> Join:
    return Join(
        layout=LAYOUT, step=step, lineage=f"{step}", device="cpu", contributors=contributors
    )


def comeback(noted: int = 0) -> Comeback:
    return Comeback(noted, 100.0, timeout_s=10.0, limit_s=60.0, most=3)


def test_when_all_of_the_newest_update_are_back_nobody_else_is_awaited() -> None:
    c = comeback()
    assert not c.over({}, False, 101.0)
    assert not c.over({1: at(7, 1, 2)}, False, 101.0)
    assert c.over({1: at(7, 1, 2), 2: at(7, 1, 2)}, False, 101.0)
    # One has seen another update, which a third one is part of.
    assert not c.over({1: at(7, 1, 2), 2: at(8, 2, 3)}, False, 101.0)


def test_a_newer_step_that_the_killed_server_noted_is_awaited() -> None:
    c = comeback(noted=8)
    both = {1: at(7, 1, 2), 2: at(7, 1, 2)}
    assert not c.over(both, False, 109.9)
    assert c.over({**both, 3: at(8, 3)}, False, 101.0)
    assert c.over(both, False, 110.0)


def test_who_gives_no_sign_has_its_time() -> None:
    c = comeback()
    assert not c.over({1: at(7, 1, 2)}, False, 109.9)
    assert c.over({1: at(7, 1, 2)}, False, 110.0)
    assert not comeback().over({}, False, 109.9) and comeback().over({}, False, 110.0)


def test_who_beats_is_awaited_but_not_for_ever() -> None:
    c = comeback()
    for now in range(101, 160, 5):
        c.beats("slow", float(now))
        assert not c.over({1: at(7, 1, 2)}, False, float(now))
    assert c.over({1: at(7, 1, 2)}, False, 160.0)


def test_who_stops_beating_or_has_come_is_not_awaited() -> None:
    c = comeback()
    c.beats("slow", 105.0)
    assert not c.over({1: at(7, 1, 2)}, False, 115.0)
    assert c.over({1: at(7, 1, 2)}, False, 115.1)
    c.beats("slow", 116.0)
    c.greeted("slow")
    assert c.over({1: at(7, 1, 2)}, False, 116.0)


def test_who_has_not_told_where_it_stands_is_awaited() -> None:
    c = comeback()
    assert not c.over({1: at(7, 1, 2)}, True, 159.9)
    assert c.over({1: at(7, 1, 2)}, True, 160.0)


def test_of_whom_nothing_is_known_beside_its_step_the_others_have_their_time() -> None:
    c = comeback()
    assert not c.over({1: at(7)}, False, 101.0)
    assert c.over({1: at(7)}, False, 110.0)


def test_what_is_remembered_is_bounded() -> None:
    c = comeback()
    for number in range(100):
        c.beats(f"process {number}", 101.0)
    assert len(c._beating) == 3
