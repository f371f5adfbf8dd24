"""Whom a server that was started again waits for."""

from __future__ import annotations

from paramserver.rounds.recovery import NOTHING, UNKNOWN, Recovery


def recovery(noted: str = "of step 8") -> Recovery:
    return Recovery(noted, 100.0, timeout_s=10.0, limit_s=60.0, most=3)


def test_who_holds_the_noted_step_holds_all_there_is() -> None:
    c = recovery()
    assert not c.over((), False, 101.0)
    assert not c.over({"of step 7"}, False, 101.0)
    assert not c.over({"of another step 8", "of step 9"}, False, 101.0)
    assert c.over({"of step 7", "of step 8"}, False, 101.0)
    assert c.over({"of step 8"}, True, 101.0)


def test_where_nobody_does_all_have_their_time() -> None:
    c = recovery()
    assert not c.over({"of step 7"}, False, 109.9)
    assert c.over({"of step 7"}, False, 110.0)
    assert not recovery().over((), False, 109.9) and recovery().over((), False, 110.0)


def test_where_the_step_is_not_known_all_have_their_time() -> None:
    assert not recovery(UNKNOWN).over({"of step 7"}, False, 109.9)
    assert recovery(UNKNOWN).over({"of step 7"}, False, 110.0)


def test_where_no_step_was_closed_anybody_will_do() -> None:
    assert not recovery(NOTHING).over((), False, 101.0)
    assert recovery(NOTHING).over({"of step 0"}, False, 101.0)


def test_who_beats_is_awaited_but_not_for_ever() -> None:
    c = recovery()
    for now in range(101, 160, 5):
        c.beats("slow", float(now))
        assert not c.over({"of step 7"}, False, float(now))
    assert c.over({"of step 7"}, False, 160.0)


def test_who_stops_beating_or_has_come_is_not_awaited() -> None:
    c = recovery()
    c.beats("slow", 105.0)
    assert not c.over({"of step 7"}, False, 115.0)
    assert c.over({"of step 7"}, False, 115.1)
    c.beats("slow", 116.0)
    c.greeted("slow")
    assert c.over({"of step 7"}, False, 116.0)


def test_who_has_not_told_where_it_stands_is_awaited() -> None:
    c = recovery()
    assert not c.over({"of step 7"}, True, 159.9)
    assert c.over({"of step 7"}, True, 160.0)


def test_beats_of_many_who_fell_silent_do_not_hide_those_that_beat() -> None:
    c = recovery()
    for number in range(3):
        c.beats(f"gone {number}", 101.0)
    c.beats("alive", 112.0)
    assert not c.over({"of step 7"}, False, 121.9)
    assert c.over({"of step 7"}, False, 122.1)


def test_what_is_remembered_is_bounded() -> None:
    c = recovery()
    for number in range(100):
        c.beats(f"process {number}", 101.0)
    assert len(c._beating) == 3
