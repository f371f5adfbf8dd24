"""What a run keeps of its problems."""

from __future__ import annotations

from paramserver.output.problems import CHARS, KEPT, Problems


def test_each_sentence_once_and_in_order() -> None:
    problems = Problems()
    assert problems.note("the disk is full")
    assert problems.note("W&B stopped")
    assert not problems.note("the disk is full")
    assert problems.all() == ["the disk is full", "W&B stopped"]


def test_what_is_kept_is_bounded() -> None:
    problems = Problems()
    for number in range(KEPT + 3):
        problems.note(f"{number} " + "x" * 10 * CHARS)
    kept = problems.all()
    assert len(kept) == KEPT + 1
    assert max(map(len, kept)) <= CHARS
    assert kept[-1] == "and 3 more: the server's output has them"
