"""A data set by its import path: its arguments, and its validation set."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paramserver.errors import UserError
from workers.builtin.own_data import OwnData

SETS = """
from torch.utils.data import Dataset, IterableDataset


class Base(Dataset):
    def __init__(self, **told):
        self.told = told

    def __len__(self):
        return self.told.get("count", 20)

    def __getitem__(self, index):
        return index, index


class Whole(Base):
    def __init__(self, count: int = 20, root: str = ""):
        super().__init__(count=count, root=root)


class Halves(Base):
    def __init__(self, train: bool, count: int = 20):
        super().__init__(train=train, count=count)


class Splits(Base):
    def __init__(self, split: str = "train", val: int = 0):
        super().__init__(split=split, val=val)


class Named(Base):
    def __init__(self, split: str = "train"):
        super().__init__(split=split)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


def made(count: int) -> Dataset:
    return Whole(count)


def elsewhere():
    return Whole()
"""


@pytest.fixture(autouse=True)
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "sets_of_ours.py").write_text(SETS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("sets_of_ours", None)


def own(name: str, seed: int = 1, **arguments: Any) -> OwnData:
    return OwnData({"name": f"sets_of_ours:{name}", "root": "data", **arguments}, seed, None)


def test_a_share_is_held_out_by_the_seed() -> None:
    seen = own("Whole", count=50)
    train, val = [[sample for sample, _ in part] for part in (seen.train, seen.val)]
    assert len(val) == 5 and sorted(train + val) == list(range(50))
    assert [sample for sample, _ in own("Whole", count=50).val] == val
    assert [sample for sample, _ in own("Whole", count=50, seed=2).val] != val
    assert len(own("Whole", val_share=0.5).val) == 10


def test_the_root_goes_to_whom_takes_it() -> None:
    assert own("Whole").train.dataset.told["root"] == "data"
    assert own("Halves").train.told == {"train": True, "count": 20}


def test_as_torchvisions_do() -> None:
    seen = own("Halves", count=7)
    assert seen.train.told == {"train": True, "count": 7}
    assert seen.val.told == {"train": False, "count": 7}


def test_other_arguments_to_validate() -> None:
    seen = own("Named", val={"split": "test"})
    assert (seen.train.told, seen.val.told) == ({"split": "train"}, {"split": "test"})
    seen = own("Halves", train=True, val={"count": 3})
    assert (len(seen.train), len(seen.val)) == (20, 3)


def test_a_name_that_the_class_takes_is_its_own() -> None:
    assert own("Splits", val=3).train.dataset.told == {"split": "train", "val": 3}


def test_a_function_may_make_it() -> None:
    assert len(own("made", count=30).train) == 27


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such": ("Wole", {}, "has no 'Wole'"),
    "no data set": ("elsewhere", {}, "neither a subclass of torch.utils.data.Dataset"),
    "argument": ("Whole", {"cuont": 3}, "dataset.cuont is no argument of sets_of_ours:Whole"),
    "missing": ("made", {}, "dataset.count is missing"),
    "a stream": ("Stream", {}, "has no length"),
    "empty": ("Halves", {"count": 0}, "has no samples"),
    "too small": ("Whole", {"count": 1}, "nothing to hold out"),
    "share": ("Whole", {"val_share": 2.0}, "dataset.val_share must be between 0 and 1"),
    "val": ("Named", {"val": "test"}, "dataset.val must be a mapping"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(name: str) -> None:
    kind, arguments, sentence = WRONG[name]
    with pytest.raises(UserError, match=sentence.replace(".", r"\.")):
        _ = own(kind, **arguments).train
