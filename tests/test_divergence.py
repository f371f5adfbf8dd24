"""Which replica is right where they differ."""

from __future__ import annotations

import re

import pytest

from paramserver.rounds.divergence import BUFFERS, KEPT, WEIGHTS, Digests, cause

KIND = "cpu"


def told(digests: Digests, step: int, of: dict[int, str], expected: set[int]) -> list[int]:
    """All that are found wrong after these reports."""
    wrong: list[int] = []
    for id, digest in of.items():
        wrong += digests.report(step, KIND, id, digest, expected)
    return wrong


@pytest.mark.parametrize(
    ("of", "wrong"),
    [
        ({1: "a", 2: "a", 3: "a"}, []),
        ({1: "b", 2: "a", 3: "a"}, [1]),
        ({1: "a", 2: "b"}, [2]),  # the lowest id's is right
        ({0: "b", 1: "a"}, [1]),  # the observer's is
        ({2: "a", 1: "a", 0: "b"}, [0]),  # but not against most
        ({1: "a", 2: "b", 3: "b", 0: "a"}, [2, 3]),
        ({1: "a", 2: "b", 3: "c"}, [2, 3]),
    ],
    ids=str,
)
def test_most_are_right(of: dict[int, str], wrong: list[int]) -> None:
    assert told(Digests(), 10, of, set(of)) == wrong


def test_nobody_is_judged_before_all_have_told() -> None:
    digests = Digests()
    assert told(digests, 10, {1: "a", 2: "b"}, {0, 1, 2}) == []
    assert digests.report(10, KIND, 0, "b", {0, 1, 2}) == [1]


def test_other_kinds_and_other_steps_are_not_compared() -> None:
    digests = Digests()
    assert digests.report(10, "cuda", 1, "a", {1}) == []
    assert digests.report(10, "mps", 2, "b", {2}) == []
    assert digests.report(20, "cuda", 2, "c", {2}) == []


def test_who_never_tells_holds_up_only_so_much() -> None:
    digests = Digests()
    wrong = [told(digests, step, {1: "a", 2: "b"}, {1, 2, 3}) for step in range(1, 50)]
    assert wrong[:KEPT] == [[]] * KEPT and wrong[KEPT:] == [[2]] * (49 - KEPT)
    assert len(digests._reports) == KEPT
    assert len(digests._parts) == KEPT


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ((WEIGHTS, "lr"), "another lr: .*cluster.step"),
        ((WEIGHTS, BUFFERS, "lr", "betas"), "another betas, lr"),
        ((BUFFERS,), "buffers alone"),
        ((WEIGHTS,), "random or differs"),
        ((WEIGHTS, BUFFERS), "random or differs"),
        ((), "^$"),
    ],
    ids=str,
)
def test_the_parts_that_differ_tell_a_cause(changed: tuple[str, ...], words: str) -> None:
    right = dict.fromkeys((WEIGHTS, BUFFERS, "lr", "betas"), "a")
    wrong = right | dict.fromkeys(changed, "b")
    assert re.search(words, cause(wrong, right))
    digests = Digests()
    digests.report(10, KIND, 1, "a", {1, 2}, right)
    assert digests.report(10, KIND, 2, "b", {1, 2}, wrong) == [2]
    assert digests.causes == {2: cause(wrong, right)}
    assert cause({}, right) == "", "an older peer tells no parts"
