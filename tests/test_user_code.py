"""Which modules of a user's own go to the machines: those that settings name, and neighbours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from paramserver.errors import UserError
from paramserver.fleet.commands import Checked
from paramserver.fleet.up import Job, check_modules
from paramserver.fleet.user_code import (
    Script,
    UserCode,
    absent,
    find_user_code,
    modules,
    place_of,
)
from paramserver.settings import Settings

CLONE = Path("/clone")
OURS = Path(__file__).resolve().parents[1]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with modules, and much else."""
    for name, text in {
        "carry_nets.py": "import torch\nfrom carry_layers import Block\nimport json, carry_nets\n",
        "carry_layers.py": "def late():\n    import carry_parts.deep\nimport carry_pictures\n",
        "carry_parts/__init__.py": "from . import deep\nfrom .carry_nothing import x\n",
        "carry_parts/deep.py": "import carry_extra\n",
        "carry_extra.py": "this is no python (\n",
        "carry_nothing.py": "",
        "carry_pictures/one.png": "",
        "films/film.mov": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def named(model: str = "SimpleNN", **others: str) -> Settings:
    given = {group: {"name": name} for group, name in others.items()}
    return replace(Settings(), model={"type": model}, **given)


def test_which_modules_settings_name() -> None:
    found = modules(named("a.b:C", dataset="d:E", loss="MSELoss", metric="a:f"))
    assert found == {"a": "model.type=a.b:C", "d": "dataset.name=d:E"}
    assert modules(Settings()) == {}


def test_a_module_goes_with_the_neighbours_that_it_imports(desk: Path) -> None:
    [own] = find_user_code(named("carry_nets:Net"), CLONE)
    names = ("carry_extra.py", "carry_layers.py", "carry_nets.py", "carry_parts")
    assert own == UserCode(desk, names)
    assert str(own) == f"{', '.join(names)} from {desk}"


def test_a_package_goes_whole(desk: Path) -> None:
    [own] = find_user_code(named("carry_parts.deep:Net"), CLONE)
    assert own.names == ("carry_extra.py", "carry_parts")


def test_modules_of_two_folders(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = desk / "films"
    (other / "carry_data.py").write_text("import carry_nets\n")  # not beside it
    monkeypatch.syspath_prepend(other)
    own = find_user_code(named("carry_extra:Net", dataset="carry_data:Films"), CLONE)
    assert own == (UserCode(desk, ("carry_extra.py",)), UserCode(other, ("carry_data.py",)))


def test_a_script_goes_with_its_neighbours_too(desk: Path) -> None:
    script = Script.find(str(desk / "carry_layers.py"), ["--lr", "1"])
    own = find_user_code(named(), CLONE, script)
    assert own == (UserCode(desk, ("carry_extra.py", "carry_layers.py", "carry_parts")),)
    assert place_of(script, own, CLONE) == "own/0/carry_layers.py"
    [both] = find_user_code(named("carry_nothing:Net"), CLONE, script)  # all of one folder
    assert both.names == (*own[0].names[:2], "carry_nothing.py", "carry_parts")
    assert find_user_code(named(), desk, script) == ()  # in the clone
    assert place_of(script, (), desk) == "code/carry_layers.py"


def test_settings_beside_a_script_come_before_those_that_are_typed(desk: Path) -> None:
    script = Script.find(str(desk / "carry_nets.py"), [])
    assert script.settings(["seed=1"]) == ["observer=false", "seed=1"]
    (desk / "carry_nets.yaml").touch()
    beside = f"model={desk / 'carry_nets.yaml'}"
    assert script.settings(["observer=true"]) == [beside, "observer=true"]
    with pytest.raises(UserError, match="there is no script"):
        Script.find(str(desk / "carry_no_such.py"), [])


def test_what_is_there_anyway_stays(desk: Path) -> None:
    assert find_user_code(named("carry_nets:Net"), desk) == ()  # in the clone itself
    assert (
        find_user_code(named("torchvision.models:resnet18", loss="torch.nn:MSELoss"), CLONE) == ()
    )
    assert find_user_code(named("json:JSONDecoder", dataset="carry_no_such:Thing"), CLONE) == ()
    assert find_user_code(named("sys:Nothing"), CLONE) == ()


def test_a_module_that_is_nowhere_is_said_before_anything_is_copied(desk: Path) -> None:
    settings = named("carry_no_such:Net", loss="torch.nn:MSELoss", dataset="carry_nets:Films")
    assert absent(settings, OURS) == {"carry_no_such": "model.type=carry_no_such:Net"}
    job = Job(settings, ())
    installed = Checked(has=frozenset({"environment"}))  # perhaps with that module
    check_modules(job, {"mini1": installed}, OURS)
    with pytest.raises(UserError, match=r"no module 'carry_no_such' here, and nothing is .* mini2"):
        check_modules(job, {"mini1": installed, "mini2": Checked()}, OURS)
