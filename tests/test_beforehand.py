"""What a server checks before it listens and makes a folder; a user's own code is only read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from whole import Run

from paramserver.config import schema
from paramserver.errors import UserError
from paramserver.settings import Settings
from paramserver.tensors.annotations import misfit
from workers.builtin.beforehand import check

MODULE = """
from elsewhere import Borrowed
from torch import Tensor, nn
from torch.utils.data import Dataset

raise SystemError("imported")


class Net(nn.Module):
    def __init__(self, width: int, depth: int = 2, act: "str | None" = None) -> None: ...


class Deeper(Net):
    pass


class Houses(Dataset):
    def __init__(self, count: int, split: str = "train") -> None: ...


@registered
class Registered(nn.Module):
    def __init__(self, width: int) -> None: ...


if True:
    def made(width: int = 2, *, sizes: list[int] = []) -> nn.Module: ...


def bare(width):
    return Net(width)


def off(outputs: Tensor, targets: Tensor, power: float = 1.0) -> Tensor: ...


def count(batch: list[Tensor], each: int = 1) -> int: ...


class Own(SGD):
    def __init__(self, params, lr: float, drag: float = 0.0) -> None: ...


class Schedule(LRScheduler):
    def __init__(self, optimizer, every: int) -> None: ...


Alias = nn.Linear
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("class Net(:\n")
    (tmp_path / "dynamic.py").write_text("globals()['Net'] = object\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert {"mine", "package"}.isdisjoint(sys.modules)


def settings(**given: Any) -> Settings:
    return schema.build({**vars(Settings()), "wandb": vars(Settings().wandb), **given})


def model(name: str, **arguments: Any) -> dict[str, Any]:
    return {"model": {"type": name, **arguments}}


def dataset(name: str, **arguments: Any) -> dict[str, Any]:
    return {"dataset": {"name": name, "root": "data", **arguments}}


WRONG: list[tuple[dict[str, Any], str]] = [
    (model("SimpleNN", hiden=3), "model.hiden is no argument of SimpleNN"),
    (model("SimpleNN", hidden=0), "model.hidden must be 1 or more, not 0"),
    (model("SimpleNN", activation="rleu"), "there is no activation 'rleu'"),
    (model("SimpleNN", hidden=10**12), "GiB, more than this machine has"),
    (model("CNN", dropout=2), "model.dropout must be from 0 to below 1"),
    (model("ResNet18", out=0), "model.out must be 1 or more"),
    (model("ResNet18", out="ten"), "model.out must be a whole number, not 'ten'"),
    (model("mine:Net"), "model.width is missing"),
    (model("mine:Net", width="wide"), "model.width must be a whole number, not 'wide'"),
    (model("mine:Net", width=2, act=3), "model.act must be text or null, not 3"),
    (model("mine:Net", width=2, heigth=1), "model.heigth is no argument of mine:Net"),
    (model("mine:Deeper", wide=2), "model.wide is no argument of mine:Deeper"),
    (model("mine:made", sizes=[1, "two"]), "model.sizes must be a list of whole numbers"),
    (model("mine:bare", width=2), "mine:bare is neither a subclass of torch.nn.Module nor"),
    (model("mine:Nett", width=2), "module mine has no 'Nett'"),
    (model("nowhere:Net"), "there is no module 'nowhere'"),
    (model("package.nowhere:Net"), "there is no module 'package.nowhere'"),
    (model("broken:Net"), "importing 'broken' failed: SyntaxError"),
    (dataset("digits", size=3), "unknown setting dataset.size"),
    (dataset("mine:Houses"), "dataset.count is missing"),
    (dataset("mine:Houses", count=4, val_share=2), "dataset.val_share must be between 0 and 1"),
    (dataset("mine:Houses", count=4, val={"splt": "test"}), "dataset.splt is no argument"),
    ({"loss": {"name": "mine:off", "power": "two"}}, "loss.power must be a number, not 'two'"),
    ({"loss": {"name": "mine:off", "reduction": "sum"}}, "it must be a mean"),
    ({"metric": {"name": "mine:off", "pow": 2}}, "metric.pow is no argument of mine:off"),
    ({"samples": {"name": "mine:count", "every": 2}}, "samples.every is no argument"),
    ({"optimizer": {"name": "mine:Own", "drg": 0.1}}, "optimizer.drg is no argument of mine:Own"),
    ({"optimizer": {"name": "mine:Own", "lr": 0.1}}, "optimizer.lr is a setting of its own"),
    ({"scheduler": "mine:Schedule"}, "scheduler.every is missing"),
    (
        {"scheduler": {"name": "SequentialLR", "milestones": [2], "schedulers": [
            {"name": "StepLR", "step_size": 2}, {"name": "mine:Schedule", "every": "x"}]}},
        "scheduler.every must be a whole number",
    ),
    ({"device": "cuda:99"}, "device=cuda:99 is not on this machine"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "problem"), WRONG)
def test_what_is_wrong_is_said(given: dict[str, Any], problem: str, desk: Path) -> None:
    with pytest.raises(UserError) as caught:
        check(settings(**given))
    assert problem in caught.value.problem


@pytest.mark.parametrize(
    "given",
    [
        {},
        model("CNN", dropout=0.5, batch_norm=True),
        model("ResNet18", in_channels=3, out=100),
        model("mine:Net", width=2, act="relu"),
        model("mine:Deeper", width=2, depth=1),
        model("mine:made", sizes=[1, 2]),
        dataset("mine:Houses", count=4, val={"split": "test"}),
        {"loss": {"name": "mine:off", "power": 2}, "metric": "mine:off", "samples": "mine:count"},
        {"optimizer": {"name": "mine:Own", "drag": 1}, "scheduler": {"name": "mine:Schedule",
            "every": 3}},
        # Only importing would tell what these take:
        model("mine:Registered", anything=1),
        model("mine:Borrowed", anything=1),
        model("mine:Alias", anything=1),
        model("dynamic:Net", anything=1),
        model("torchvision.models:resnet18", anything=1),
    ],
)  # fmt: skip
def test_what_can_be_passes(given: dict[str, Any], desk: Path) -> None:
    check(settings(**given))


def test_a_module_that_another_finder_has_passes(
    desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of editable installations."""

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            from importlib.machinery import ModuleSpec

            return ModuleSpec(name, None) if name == "nowhere" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    check(settings(**model("nowhere:Net")))


@pytest.mark.parametrize(
    ("value", "annotation", "must"),
    [
        (True, int, "a whole number"),
        (1, float, None),
        ("x", "float | Tensor", "a number or a list of numbers"),
        ([[1, 2.5]], "float | Tensor", None),
        (None, "typing.Optional[float]", None),
        ("x", "Optional[float]", "a number or null"),
        ([0.9, 0.99], tuple[float, float], None),
        ([0.9], tuple[float, float], "a list of 2 numbers"),
        ([1, 2, 3], "tuple[int, ...]", None),
        ("c", "Literal['a', 'b']", "a or b"),
        (["a"], "collections.abc.Iterable[int]", "a list of whole numbers"),
        ("x", "int | Path", None),
        (3, "Callable[[int], float]", None),
        (3, "no Python", None),
        (3, "'str'", "text"),
    ],
)
def test_values_and_annotations(value: object, annotation: object, must: str | None) -> None:
    assert misfit(value, annotation) == must


def test_a_server_makes_no_folder_for_what_cannot_be(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("model.hiden=3", "scheduler.name=StepLR", "scheduler.step_size=8")
        assert server.end() == 2
        assert "error: model.hiden is no argument of SimpleNN" in server.output
        assert "server at" not in server.output and not (tmp_path / "runs").exists()
