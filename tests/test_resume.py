"""A checkpoint that was changed, or is of another training, is refused with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from whole import Run, children

from paramserver.errors import UserError
from paramserver.rounds.ledger import Ledger
from paramserver.settings import Settings
from workers.builtin.builders import build_scheduler
from workers.replica import checkpoint
from workers.replica.replica import Replica
from workers.replica.resume import resume

SETTINGS = Settings(
    optimizer={"name": "Adam"}, scheduler={"name": "StepLR", "step_size": 5, "gamma": 0.5}
)


def replica(settings: Settings = SETTINGS, width: int = 4) -> Replica:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
    kind = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}[settings.optimizer["name"]]
    optimizer = kind(model.parameters(), lr=settings.learning_rate)
    return Replica(
        model, optimizer, bucket_mb=1.0, codec="float32",
        scheduler=build_scheduler(optimizer, settings, None),
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of step 7."""
    trained = replica()
    trained.model(torch.randn(8, 3)).sum().backward()
    trained.optimizer.step()
    trained.step, trained.ledger = 7, Ledger(100, 2).state()
    path = tmp_path / checkpoint.name(7)
    checkpoint.save(path, trained, "run", asdict(SETTINGS))
    return path


def change(path: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """Edit metadata (with the tree and the settings taken apart) and tensors."""
    with safe_open(path, framework="pt") as f:
        metadata: dict[str, Any] = dict(f.metadata())
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    for name in ("tree", "settings"):
        metadata[name] = json.loads(metadata[name])
    edit(metadata, tensors)
    for name in ("tree", "settings"):
        metadata[name] = json.dumps(metadata[name])
    save_file(tensors, path, metadata)


def test_a_whole_one_is_resumed_and_trains_on(path: Path) -> None:
    fresh = replica()
    resume(fresh, path, SETTINGS)
    assert fresh.step == 7 and fresh.optimizer.state_dict()["state"]
    for p in fresh.model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in fresh.model.parameters()]
    fresh.optimizer.step()
    assert not any(torch.equal(b, p) for b, p in zip(before, fresh.model.parameters(), strict=True))


def state_of(metadata: dict[str, Any], index: int = 0) -> dict[str, Any]:
    """The optimizer's state of a parameter, in the tree."""
    pairs = metadata["tree"]["optimizer"]["state"]["$dict"]
    return pairs[index][1]  # type: ignore[no-any-return]


def weight(metadata: dict[str, Any]) -> str:
    return str(metadata["tree"]["model"]["0.weight"]["$tensor"])


WRONG: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "no step": (lambda m, t: m.pop("step"), "its step is ''"),
    "a negative step": (lambda m, t: m.update(step="-5"), "its step is '-5'"),
    "an absurd step": (lambda m, t: m.update(step="9" * 13), "no run has so many"),
    "no lineage": (lambda m, t: m.pop("lineage"), "lineage"),
    "a lineage of another kind": (lambda m, t: m.update(lineage="\x1b[2J"), "lineage"),
    "settings of another kind": (lambda m, t: m.update(settings=[1]), "settings"),
    "an optimizer that is a number": (
        lambda m, t: m["settings"].update(optimizer=5),
        "its settings: Expected `object`",
    ),
    "a learning rate that is a text": (
        lambda m, t: m["settings"].update(learning_rate="fast"),
        "its settings: Expected `float`",
    ),
    "a learning rate of 0": (
        lambda m, t: m["settings"].update(learning_rate=0.0),
        "its learning rate is 0",
    ),
    "another optimizer": (
        lambda m, t: m["settings"].update(optimizer={"name": "SGD"}),
        "was trained with optimizer=SGD",
    ),
    "another schedule": (
        lambda m, t: m["settings"].update(scheduler=None),
        "was trained with scheduler=",
    ),
    "a tree that is a list": (lambda m, t: m.update(tree=[]), "no model"),
    "no model": (lambda m, t: m["tree"].pop("model"), "no model"),
    "a model without a layer": (
        lambda m, t: m["tree"]["model"].pop("0.weight"),
        r"model\.0\.weight is missing",
    ),
    "a layer more": (
        lambda m, t: m["tree"]["model"].update(x=m["tree"]["model"]["0.bias"]),
        r"model\.x is not in",
    ),
    "a weight that is a number": (
        lambda m, t: m["tree"]["model"].update({"0.weight": 5}),
        "model.0.weight is a int, not 4x3",
    ),
    "a weight of another shape": (
        lambda m, t: t.update({weight(m): torch.zeros(4, 2)}),
        "is 4x2 float32, not 4x3 float32",
    ),
    "a weight of another dtype": (
        lambda m, t: t.update({weight(m): torch.zeros(4, 3, dtype=torch.int64)}),
        "is 4x3 int64",
    ),
    "a tensor that is not there": (
        lambda m, t: m["tree"]["model"].update({"0.weight": {"$tensor": 999}}),
        "cannot be read",
    ),
    "a tensor less": (lambda m, t: t.pop("0"), "cannot be read"),
    "no optimizer": (
        lambda m, t: m["tree"].update(optimizer=None),
        "its optimizer's state cannot be read",
    ),
    "groups of another number": (
        lambda m, t: m["tree"]["optimizer"].update(param_groups=[]),
        "other parameter groups",
    ),
    "a group that is a text": (
        lambda m, t: m["tree"]["optimizer"].update(param_groups=["x"]),
        "param_groups.0 is a str",
    ),
    "a group's rate that is a text": (
        lambda m, t: m["tree"]["optimizer"]["param_groups"][0].update(lr="x"),
        "learning rate is x",
    ),
    "a group's betas that are none": (
        lambda m, t: m["tree"]["optimizer"]["param_groups"][0].update(betas=1),
        "cannot be used|is no list",
    ),
    "state of another optimizer": (lambda m, t: state_of(m).pop("exp_avg"), "cannot be used"),
    "state of another shape": (
        lambda m, t: t.update({str(state_of(m)["exp_avg"]["$tensor"]): torch.zeros(7)}),
        "cannot be used",
    ),
    "state that is a list": (
        lambda m, t: m["tree"]["optimizer"].update(state=[]),
        "its optimizer's state cannot be read",
    ),
    "no schedule": (lambda m, t: m["tree"].update(scheduler=None), "no scheduler"),
    "a schedule that stands at a text": (
        lambda m, t: m["tree"]["scheduler"].update(last_epoch="x"),
        "last_epoch is a str, not a number",
    ),
    "a schedule that stands before its start": (
        lambda m, t: m["tree"]["scheduler"].update(last_epoch=-3),
        "stands nowhere",
    ),
    "no ledger": (lambda m, t: m["tree"].update(ledger=None), "no ledger"),
    "a ledger that cannot be": (
        lambda m, t: m["tree"]["ledger"].update(done=-1),
        "cannot be right|>= 0",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_resumed_is_an_error_with_its_reason(path: Path, what: str) -> None:
    edit, reason = WRONG[what]
    change(path, edit)
    fresh = replica()
    with pytest.raises(UserError, match=reason) as error:
        resume(fresh, path, SETTINGS)
    assert str(path) in error.value.problem


def test_another_model_is_refused(path: Path) -> None:
    with pytest.raises(UserError, match="does not fit this run's model"):
        resume(replica(width=5), path, SETTINGS)


# --------------------------------------------------------------------------------- whole runs


def test_nobody_who_could_resume_is_an_error(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("resume=latest", "observer=false")
        assert server.end() == 2
        assert "nobody would load the checkpoint" in server.output


def test_an_observer_killed_before_it_gave_its_state_is_followed_by_one_that_resumes(
    tmp_path: Path,
) -> None:
    small = ("batch_size=200", "eval_steps=0", "heartbeat_timeout=3")
    with Run(tmp_path) as run:
        server, worker = run.server(*small, "num_workers=1", "num_epochs=1"), run.worker(1)
        assert (server.end(), worker.end()) == (0, 0), server.output
        before = run.summary()["steps"]
        server = run.server(*small, "num_workers=1", "num_epochs=2", "resume=latest")
        while not (observers := children(server)):
            assert server.process.poll() is None, server.output
        observers[0].kill()
        server.wait_for("the observer ended .* starting it again")
        worker = run.worker(1)
        assert (server.end(), worker.end()) == (0, 0), server.output
        assert f"the first state comes from the observer, at step {before}" in server.output
        assert run.steps()[0]["step"] == before + 1
        assert run.summary()["steps"] == 2 * before and run.summary()["samples_done"] == 8000


def test_a_checkpoint_that_kills_each_observer_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    """Its loading raises an unexpected exception: no observer can be kept, and nothing is
    trained."""
    (tmp_path / "falls").mkdir()
    (tmp_path / "falls" / "__init__.py").touch()
    (tmp_path / "falls" / "net.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
        "    def forward(self, x):\n"
        "        return self.layers(x)\n"
        "    def load_state_dict(self, *args, **kwargs):\n"
        "        if 'observe' in sys.argv[0] and Path(__file__).with_name('now').exists():\n"
        "            print('this one falls', flush=True)\n"
        "            os._exit(1)\n"
        "        return super().load_state_dict(*args, **kwargs)\n"
    )
    with Run(tmp_path) as run:
        words = ["-m", "paramserver", "dataset.name=digits", "wandb.mode=disabled", "plain=true"]
        words += [f"port={run.port}", "run_dir=runs", "model.type=falls.net:Net", "num_workers=1"]
        words += ["batch_size=200", "eval_steps=0"]
        server, worker = run.start("server", *words, "num_epochs=1"), run.worker(1)
        assert server.end() in (0, 3), server.output
        worker.end()
        (tmp_path / "falls" / "now").touch()
        server, worker = run.start("server", *words, "resume=latest"), run.worker(1)
        assert server.end() == 2, server.output
        assert re.search(
            r"error: the observer ended 4 times in a row.*\n.*this one falls", server.output
        )
        assert worker.end() != 0
        assert not (run.runs[-1] / "metrics.jsonl").exists()
