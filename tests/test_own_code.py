"""What a server names is imported only where it is this worker's own code; nothing runs before that
is clear. Each module here leaves a mark in a file when it is imported."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from liar import FakeServer
from torch import nn
from whole import Run

from paramserver.config.loading import load
from paramserver.config.schema import allowed
from paramserver.errors import UserError
from paramserver.settings import Settings
from workers.builtin import builders, models, own_code
from workers.builtin.own_code import OwnCode

MODULE = """
from __future__ import annotations
import os
from pathlib import Path
with open(os.environ["MARKS"], "a") as marks:
    marks.write(__name__ + "\\n")
from torch import Tensor, nn
from torch.fx.graph_module import reduce_graph_module
from torch.utils.data import Dataset


class Net(nn.Linear):
    def __init__(self, width: int = 3) -> None:
        super().__init__(width, 2)


class Words(Dataset):
    def __len__(self) -> int:
        return 4


def made(width: int = 2) -> nn.Module:
    return Net(width)


def off(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean()


def unannotated():
    raise SystemError("called")


Alias = nn.Linear
Here = Path
"""


class Desk:
    """The folder where a worker was started, and others beside it."""

    def __init__(self, folder: Path) -> None:
        self.here, self.elsewhere, self.marks = folder / "here", folder / "other", folder / "marks"
        self.here.mkdir()
        self.elsewhere.mkdir()
        self.marks.touch()

    def write(self, name: str, folder: Path | None = None, text: str = MODULE) -> Path:
        path = (folder or self.here) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    @property
    def imported(self) -> list[str]:
        return self.marks.read_text().split()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    found = Desk(tmp_path)
    monkeypatch.setenv("MARKS", str(found.marks))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(found.here)
    monkeypatch.setattr(sys, "path", [str(found.here), *sys.path])
    before = set(sys.modules)
    yield found
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", "x") is None or str(tmp_path) in str(
            getattr(sys.modules[name], "__file__", "")
        ):
            del sys.modules[name]


def code(**own: Any) -> OwnCode:
    return own_code.of_worker(replace(Settings(), **own))


def build(name: str, own: OwnCode | None = None, **arguments: Any) -> nn.Module:
    return models.build({"type": name, **arguments}, 0, own or code())


def refused(name: str, sentence: str, own: OwnCode | None = None) -> UserError:
    with pytest.raises(UserError, match=sentence) as told:
        build(name, own)
    return told.value


# ------------------------------------------------------------------------- what may be imported


def test_a_module_in_the_folder_where_the_worker_was_started(desk: Desk) -> None:
    desk.write("mine.py")
    desk.write("pack/__init__.py", text="")
    desk.write("pack/nets.py")
    desk.write("plain/nets.py")  # without __init__.py
    assert build("mine:Net", width=5).in_features == 5
    assert type(build("mine:made")).__name__ == "Net"
    assert type(build("pack.nets:Net")).__module__ == "pack.nets"
    assert type(build("plain.nets:Net")).__module__ == "plain.nets"
    assert desk.imported == ["mine", "pack.nets", "plain.nets"]
    assert type(build("pack.nets:Net")).__module__ == "pack.nets"  # imported already


def test_data_loss_metric_optimizer_and_schedule_go_the_same_way(desk: Desk) -> None:
    desk.write("mine.py")
    settings = replace(Settings(), dataset={"name": "mine:Words", "root": "data"})
    assert len(builders.load_data(settings, code()).train) == 3
    model = nn.Linear(2, 1)
    samples = torch.utils.data.TensorDataset(torch.zeros(4, 2), torch.zeros(4, 1))
    settings = replace(settings, loss={"name": "mine:off"}, metric={"name": "mine:off"})
    made = builders.build_criterion(settings, model, samples, torch.device("cpu"), code())
    assert made.name == "off"
    theirs = "torch.fx.graph_module:reduce_graph_module"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    many = {"name": "SequentialLR", "schedulers": [{"name": theirs}], "milestones": []}
    for group, make in {
        "dataset": lambda s: builders.load_data(s, code()),
        "optimizer": lambda s: builders.build_optimizer(model, s, code()),
        "scheduler": lambda s: builders.build_scheduler(optimizer, s, code()),
        "loss": lambda s: builders.build_criterion(s, model, samples, torch.device("cpu"), code()),
        "metric": lambda s: builders.build_criterion(
            s, model, samples, torch.device("cpu"), code()
        ),
        "samples": lambda s: builders.build_criterion(
            s, model, samples, torch.device("cpu"), code()
        ),
    }.items():
        ok = replace(settings, dataset={"name": "digits"}, loss={"name": "MSELoss"}, metric=None)
        with pytest.raises(UserError, match="comes from the server and is not imported"):
            make(replace(ok, **{group: {"name": theirs}}))
    with pytest.raises(UserError, match="comes from the server and is not imported"):
        builders.build_scheduler(optimizer, replace(settings, scheduler=many), code())


def test_a_folder_of_the_environments_pythonpath(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied code is found in this way, and code that the user named for this process."""
    desk.write("carried.py", desk.elsewhere)
    monkeypatch.setattr(sys, "path", [*sys.path, str(desk.elsewhere)])
    refused("carried:Net", "carried lies in .*other")
    monkeypatch.setenv("PYTHONPATH", f"{os.pathsep}../other")
    assert type(build("carried:Net")).__module__ == "carried"


@pytest.mark.parametrize("entry", ["far", "far.nets", "far.nets:Net"])
def test_what_the_worker_allows(desk: Desk, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    desk.write("far/__init__.py", desk.elsewhere, text="from far.nets import Net\n")
    desk.write("far/nets.py", desk.elsewhere)
    monkeypatch.setattr(sys, "path", [*sys.path, str(desk.elsewhere)])
    assert type(build("far.nets:Net", code(allow=[entry]))).__module__ == "far.nets"
    own = code(allow=[entry])
    if entry == "far":
        assert type(build("far:Net", own)).__module__ == "far.nets"  # of the allowed package
        with pytest.raises(UserError, match=r"is defined in torch.fx.graph_module, not in far"):
            build("far.nets:reduce_graph_module", own)
    else:
        refused("far:Net", "far lies in", own)
    refused("farther:Net", "there is no module", own)


def test_a_name_that_is_allowed_alone_may_come_from_elsewhere() -> None:
    own = code(allow=["torch.nn:Linear"])
    assert isinstance(build("torch.nn:Linear", own, in_features=2, out_features=1), nn.Linear)
    refused("torch.nn:Bilinear", "torch is installed", own)


def test_what_the_worker_itself_names_is_its_owners() -> None:
    own = code(model={"type": "torch.nn:Identity"})
    assert isinstance(build("torch.nn:Identity", own), nn.Identity)
    refused("torch.nn:Linear", "torch is installed", own)


# ------------------------------------------------------------------------------ what may not


def test_a_module_that_lies_elsewhere(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write("far/__init__.py", desk.elsewhere)
    desk.write("far/nets.py", desk.elsewhere)
    monkeypatch.setattr(sys, "path", [*sys.path, str(desk.elsewhere)])
    told = refused("far.nets:Net", "model.type=far.nets:Net comes from the server and is not impor")
    assert "allow=far.nets:Net" in told.hint
    assert desk.imported == [] and "far" not in sys.modules  # the parent neither


def test_one_that_was_imported_already(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write("far.py", desk.elsewhere)
    monkeypatch.setattr(sys, "path", [*sys.path, str(desk.elsewhere)])
    __import__("far")
    refused("far:Net", "far lies in")
    refused("__main__:Net", "not imported")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("torch.fx.graph_module:reduce_graph_module", "torch is installed"),
        ("torch.hub:load", "torch is installed"),
        ("os:system", "os is installed|os is a part of Python"),
        ("builtins:eval", "builtins is a part of Python"),
        ("posix:system", "posix is a part of Python"),
        ("subprocess:Popen", "subprocess is installed"),
        ("antigravity:fly", "antigravity is installed"),
        ("workers.builtin.registry:make", "workers is a part of this program"),
        ("paramserver.fleet.supervisor:main", "paramserver is a part of this program"),
        ("no_such.module:Net", "there is no module 'no_such.module'"),
        ("../x:Net", "not of the form package.module:Name"),
        ("mine:Net.__init__", "not of the form"),
        (".mine:Net", "not of the form"),
        (":Net", "not of the form"),
        ("mine:", "not of the form"),
    ],
)
def test_what_no_server_may_name(desk: Desk, name: str, why: str) -> None:
    before = set(sys.modules)
    refused(name, why)
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("reduce_graph_module", "has it from torch.fx.graph_module:reduce_graph_module"),
        ("nn", "has it from torch:nn"),
        ("Path", "has it from pathlib:Path"),
        ("Alias", "has no 'Alias'"),
        ("Nett", "has no 'Nett'"),
        ("unannotated", "neither a class nor a function annotated"),
    ],
)
def test_only_what_a_module_itself_defines(desk: Desk, name: str, why: str) -> None:
    desk.write("mine.py")
    refused(f"mine:{name}", why)
    assert desk.imported == []


def test_a_definition_that_is_replaced_by_something_from_elsewhere(desk: Desk) -> None:
    desk.write("mine.py", text=MODULE + "\nNet = nn.Linear\n")
    refused("mine:Net", "is defined in torch.nn.modules.linear, not in mine")


def test_links_out_of_the_folder(desk: Desk) -> None:
    (desk.here / "linked.py").symlink_to(desk.write("far.py", desk.elsewhere))
    (desk.here / "folder").symlink_to(desk.elsewhere)
    refused("linked:Net", "linked lies in")
    refused("folder.far:Net", "folder.far lies in")
    assert desk.imported == []


def test_installed_packages_below_the_folder(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = desk.here / "env" / "lib" / "site-packages"
    desk.write("installed.py", packages)
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    refused("installed:Net", "installed is installed")
    desk.write("pyvenv.cfg", desk.here / "tools", text="")
    desk.write("bin/tool.py", desk.here / "tools")
    refused("tools.bin.tool:Net", "an environment of Python's")
    assert desk.imported == []


def test_archives_and_what_is_no_source(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = desk.here / "code.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("zipped.py", MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(archive)])
    (desk.here / "binary.pyc").write_bytes(b"x")
    refused("zipped:Net", "zipped is no source file")
    refused("binary:Net", "binary is no source file")
    refused("folder_only:Net", "there is no module")
    assert desk.imported == []


def test_a_package_of_two_folders(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without __init__.py it has parts in both: each is judged by where its file lies."""
    desk.write("shared/near.py")
    desk.write("shared/far.py", desk.elsewhere)
    monkeypatch.setattr(sys, "path", [*sys.path, str(desk.elsewhere)])
    refused("shared.far:Net", "shared.far lies in")
    assert desk.imported == []
    assert type(build("shared.near:Net")).__module__ == "shared.near"


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="files of others")
def test_files_of_others_where_everybody_may_write(desk: Desk) -> None:
    desk.here.chmod(0o1777)
    path = desk.write("mine.py")
    os.chown(path, 4711, 4711)
    refused("mine:Net", "another user's")
    desk.here.chmod(0o755)
    assert type(build("mine:Net")).__module__ == "mine"


def test_a_script_that_defines_no_such_name_is_not_run(desk: Desk) -> None:
    desk.write("danger.py", text="import os\nopen(os.environ['MARKS'], 'w').write('ran')\n")
    desk.write("broken.py", text="def f(:\n")
    refused("danger:Net", "has no 'Net'")
    refused("broken:Net", "importing 'broken' failed: SyntaxError")
    assert desk.imported == []


def test_how_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "here.yaml"
    file.write_text("allow: [mine, mine.nets, 'mine.nets:Net']\n")
    assert load([f"cluster={file}"], "worker").settings.allow == [
        "mine",
        "mine.nets",
        "mine.nets:Net",
    ]
    assert load(["allow=mine, other:Net"], "worker").settings.allow == ["mine", "other:Net"]
    for wrong in ("allow=../mine", "allow=[1]", "allow=mine:", "allow=mine.nets:Net.inner"):
        with pytest.raises(UserError, match="allow must be"):
            load([wrong], "worker")
    settings = replace(
        Settings(),
        allow=["x"],
        model={"type": "a:B"},
        scheduler={"name": "SequentialLR", "schedulers": [{"name": "c.d:E"}, {"name": "StepLR"}]},
    )
    assert allowed(settings) == ("x", "a:B", "c.d:E")


# ------------------------------------------------------------------------------ whole programs


def told(model: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "dataset": {"name": "digits"}}


def test_a_worker_runs_nothing_that_a_fake_server_names(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    evil = {
        "type": "torch.fx.graph_module:reduce_graph_module",
        "body": {"_code": "def forward(self, x):\n    return x\n"},
        "import_block": f"import os\nos.system('touch {mark}')\n",
    }
    with FakeServer(told(evil)) as server, Run(tmp_path) as run:
        worker = run.worker(1, f"port={server.port}")
        assert worker.end() == 2
        assert "comes from the server and is not imported: torch is installed" in worker.output
        assert "allow=torch.fx" in worker.output
        assert "Traceback" not in worker.output
    assert not mark.exists()


def test_a_real_run_with_code_in_the_workers_folder_alone(tmp_path: Path) -> None:
    """The server's name for it is taken where the worker has it, and refused where it has not."""
    (tmp_path / "mine.py").write_text(
        "from torch import Tensor, nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, hidden: int) -> None:\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(784, 10)\n"
        "    def forward(self, images: Tensor) -> Tensor:\n"
        "        return self.layer(images.flatten(1))\n"
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    with Run(tmp_path) as run:
        server = run.server("model.type=mine:Net", "num_workers=1", "num_epochs=1", "eval_steps=0")
        server.wait_for("server at")
        port = ("-m", "workers", f"port={run.port}")
        lost = run.start("worker 2", *port, "id=2", folder=bare)
        assert lost.end() == 2
        assert "there is no module 'mine' of this worker's own" in lost.output
        worker = run.worker(1)
        assert (worker.end(), server.end()) == (0, 0)
        assert "the run is over" in worker.output
