"""What a server checks before it listens and makes a folder; a user's own code is only read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from whole import Run

from paramserver.config import schema
from paramserver.config.schedule import too_short
from paramserver.errors import UserError
from paramserver.settings import DATASETS, Settings
from paramserver.tensors.annotations import misfit
from workers.builtin import beforehand, data, reading
from workers.builtin.beforehand import check

CLONE = Path(__file__).resolve().parent.parent

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
Second = Net


@dataclass(frozen=True)
class Flats(Dataset[int]):
    count: int
    split: str = "train"
    rooms: list[int] = field(default_factory=list)


class Whole(nn.Module):
    @torch.no_grad()
    def __init__(self, width: int) -> None: ...


def register(kind):
    return kind
"""
PACKAGE = """
from .nets import Net as Exported
from .nets import Gone
from . import nets
try:
    from .faster import Quick
except ImportError:
    from .nets import Net as Quick
"""
NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int) -> None: ...
"""
"""A module that a package has its names from."""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("class Net(:\n")
    (tmp_path / "dynamic.py").write_text("globals()['Net'] = object\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "package" / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert {"mine", "package", "package.nets"}.isdisjoint(sys.modules)


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
    (model("mine:Second", width="x"), "model.width must be a whole number"),
    (model("mine:Whole", wide=2), "model.wide is no argument of mine:Whole"),
    (dataset("mine:Flats", count="x"), "dataset.count must be a whole number"),
    (dataset("mine:Flats", count=2, rooms=["x"]), "dataset.rooms must be a list of whole numbers"),
    (model("package:Exported", width="x"), "model.width must be a whole number"),
    (
        model("package:Gone"),
        "package has Gone from elsewhere, but module package.nets has no 'Gone'",
    ),
    (model("package.nets:Nett"), "module package.nets has no 'Nett'"),
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
        model("mine:Second", width=2, depth=3),
        dataset("mine:Flats", count=2, rooms=[1], val={"split": "val"}),
        model("package:Exported", width=2),
        model("package:Quick", anything=1),
        model("package:nets", anything=1),
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


@pytest.mark.parametrize(("given", "problem"), [
    *((given, problem) for given, problem in WRONG if not any(
        word in problem for word in ("must be 1 or more", "no activation", "GiB", "below 1",
            "device=", "no module 'nowhere'"))),
    ({"optimizer": "Adm"}, "there is no optimizer 'Adm'"),
    ({"optimizer": {"name": "SGD", "momentun": 0.9}}, "optimizer.momentun is no argument of SGD"),
    ({"optimizer": {"name": "Adam", "betas": [0.9]}}, "optimizer.betas must be a list of 2"),
    ({"optimizer": {"name": "Adam", "lr": 0.1}}, "optimizer.lr is a setting of its own"),
    ({"scheduler": "StepLR"}, "scheduler.step_size is missing"),
    ({"scheduler": "ReduceLROnPlateau"}, "ReduceLROnPlateau follows a metric"),
    ({"loss": {"name": "MSELoss", "reduction": "sum"}}, "it must be a mean"),
    ({"metric": "acuracy"}, "there is no metric 'acuracy'"),
    (model("SimpleMN"), "there is no model 'SimpleMN'"),
])  # fmt: skip
def test_names_and_types_are_told_by_reading(
    given: dict[str, Any], problem: str, desk: Path
) -> None:
    with pytest.raises(UserError) as caught:
        reading.check(settings(**given))
    assert problem in caught.value.problem


def test_what_the_machines_may_have_is_not_asked_here(desk: Path) -> None:
    for given in (
        model("nowhere:Net"),
        model("SimpleNN", hidden=10**12),
        {"device": "cuda:99"},
        {"optimizer": {"name": "SGD", "momentum": 0.9}, "scheduler": {"name": "StepLR",
            "step_size": 3}, "loss": "MSELoss", "metric": "accuracy"},
    ):  # fmt: skip
        beforehand.check_for_others(settings(**given))
    with pytest.raises(UserError, match="must be 1 or more, not 0"):
        beforehand.check_for_others(settings(**model("SimpleNN", hidden=0)))


def test_the_table_is_that_of_the_pinned_torch() -> None:
    """`make docs` would change nothing."""
    pinned = json.loads(reading.TABLE.read_text())["torch"]
    assert f"torch=={pinned}\n" in (CLONE / "constraints.txt").read_text()
    if torch.__version__.partition("+")[0] == pinned:
        assert reading.TABLE.read_text() == reading.written(), "make docs"


@pytest.mark.parametrize("without_torch", [True, False])
def test_make_up_says_it_before_it_asks_a_machine(tmp_path: Path, without_torch: bool) -> None:
    tool = tmp_path / "ssh"
    tool.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    tool.chmod(0o755)
    main = "from paramserver.launch.__main__ import main; main()"
    block = "import sys; sys.modules['torch'] = None; " if without_torch else ""
    for command, setting in (("up", "model.hiden=3"), ("plan", "optimizer.name=Adm")):
        done = subprocess.run(
            [sys.executable, "-c", block + main, command, "hosts=one,two", setting],
            cwd=CLONE, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and setting.partition("=")[2] in done.stderr + "3", done.stderr
        assert ("is no argument of" in done.stderr) or ("there is no optimizer" in done.stderr)
        assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 124}, "has about 125 steps"),
        ({"name": "OneCycleLR", "max_lr": 0.1, "epochs": 2, "steps_per_epoch": 62}, "is 124, but"),
        ({"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 125}, ""),
        ({"name": "StepLR", "step_size": 2}, ""),
    ],
)
def test_a_schedule_that_ends_before_the_run_is_said(schedule: dict[str, Any], said: str) -> None:
    given = settings(scheduler=schedule, num_epochs=2, num_workers=2, batch_size=32)
    sentence = too_short(given, 4000)
    assert (said in sentence) if said else sentence == ""


def test_our_data_sets_have_as_many_samples_as_is_said() -> None:
    for name in ("digits",):
        assert len(data.load({"name": name}, 1).train) == DATASETS[name]
