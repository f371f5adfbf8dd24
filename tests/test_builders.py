"""A training without a loop of one's own: model, data set, optimizer, schedule, loss and metric by
their names in the settings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import Rounding, rounding_bound
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset, TensorDataset
from whole import Run

from paramserver.config import schema
from paramserver.errors import UserError
from paramserver.output.curves import read
from paramserver.output.picture import Columns
from paramserver.settings import Settings
from paramserver.tensors.torch_names import check_named
from workers.builtin import builders
from workers.builtin.data import order, permutation
from workers.replica.replica import Replica

CPU = torch.device("cpu")
HOUSES = '''
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Houses(Dataset):
    """Prices that nearly follow from sizes, of so many houses."""

    def __init__(self, count: int, noise: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(5)
        self.sizes = torch.randn(count, 3, generator=generator)
        prices = self.sizes @ torch.tensor([1.0, -2.0, 0.5])
        self.prices = (prices + noise * torch.randn(count, generator=generator))[:, None]

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sizes[index], self.prices[index]


class Price(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, sizes: Tensor) -> Tensor:
        return self.layers(sizes)


def off(outputs: Tensor, targets: Tensor, power: float = 1.0) -> Tensor:
    """How far off the prices are."""
    return ((outputs - targets).abs() ** power).mean()


def count(batch: list[Tensor], each: int = 1) -> int:
    """Write down what is counted, too."""
    with open("counted", "a") as file:
        print(len(batch[1]), file=file)
    return each * len(batch[1])
'''
REGRESSION = """
model: {type: ours.houses:Price, width: 16}
dataset: {name: ours.houses:Houses, count: 400, noise: 0.1, val_share: 0.2}
optimizer: {name: AdamW, weight_decay: 0.05, betas: [0.8, 0.99]}
learning_rate: 0.01
scheduler: {name: StepLR, step_size: 15, gamma: 0.5}
clip_norm: 1.0
loss: {name: HuberLoss, delta: 0.7}
metric: L1Loss
samples: {name: ours.houses:count, each: 3}
ema: 0.9
batch_size: 16
num_epochs: 3
num_workers: 1
eval_steps: 20
wandb: {mode: disabled}
"""


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a package of a user's own, and settings that name what is in it."""
    folder = tmp_path / "desk"
    (folder / "ours").mkdir(parents=True)
    (folder / "ours" / "__init__.py").touch()
    (folder / "ours" / "houses.py").write_text(HOUSES)
    (folder / "prices.yaml").write_text(REGRESSION)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("ours", "ours.houses"):
        sys.modules.pop(name, None)


def plain_loop(
    epochs: int = 3, rounding: Rounding | None = None, averaged: bool = False
) -> nn.Module:
    """What the settings above mean, in plain torch: the same samples in the same order. The model,
    or the average of its weights."""
    from ours.houses import Houses, Price

    houses = Houses(400, noise=0.1)
    train = [int(i) for i in permutation(400, "split, seed 42")[80:]]
    torch.manual_seed(42)
    model = Price(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05, betas=(0.8, 0.99))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 15, 0.5)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    criterion = nn.HuberLoss(delta=0.7)
    for epoch in range(epochs):
        for batch in order(320, 42, epoch).split(16):
            indices = [train[int(i)] for i in batch]
            optimizer.zero_grad()
            parts = [(houses.sizes[indices], houses.prices[indices])]
            for sizes, prices in parts if rounding is None else rounding(parts):
                (criterion(model(sizes), prices) * (len(prices) / len(indices))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
    return average.module if averaged else model


def test_a_regression_by_names_alone_equals_a_plain_loop(ours: Path) -> None:
    with Run(ours) as run:
        server = run.start(
            "the server", "-m", "paramserver", "model=prices.yaml", f"port={run.port}", "plain=true"
        )
        worker = run.worker(1)
        assert (server.end(), worker.end()) == (0, 0), server.output + worker.output
        model = plain_loop()
        written = load_file(run.runs[-1] / "model.safetensors")
        bound = rounding_bound(lambda rounding: plain_loop(rounding=rounding))
        torch.testing.assert_close(written, dict(model.state_dict()), rtol=0, atol=bound)
        assert bound < 1e-2
        model.load_state_dict(written)

        average = plain_loop(averaged=True)
        bound = rounding_bound(lambda rounding: plain_loop(rounding=rounding, averaged=True))
        kept = load_file(run.runs[-1] / "ema.safetensors")
        torch.testing.assert_close(kept, dict(average.state_dict()), rtol=0, atol=bound)
        counted = (ours / "counted").read_text().split()
        assert counted.count("16") == 3 * 20 and counted.count("80") >= 4  # batches; evaluations

        from ours.houses import Houses

        houses = Houses(400, noise=0.1)
        held_out = permutation(400, "split, seed 42")[:80]
        with torch.no_grad():
            outputs, targets = model(houses.sizes[held_out]), houses.prices[held_out]
            of_average = average(houses.sizes[held_out])
        error = float(nn.functional.l1_loss(outputs, targets))
        summary = run.summary()
        assert summary["val_accuracy"] is None
        assert summary["metrics"] == {
            "L1Loss": pytest.approx(error, abs=1e-5),
            "ema_loss": pytest.approx(
                float(nn.functional.huber_loss(of_average, targets, delta=0.7)), abs=1e-5
            ),
            "ema_L1Loss": pytest.approx(
                float(nn.functional.l1_loss(of_average, targets)), abs=1e-5
            ),
        }
        loss = float(nn.functional.huber_loss(outputs, targets, delta=0.7))
        assert summary["val_loss"] == pytest.approx(loss, abs=1e-5)
        assert re.search(rf"validation +│ L1Loss {summary['metrics']['L1Loss']:.4g}", server.output)
        lines = [json.loads(x) for x in (run.runs[-1] / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "metrics" in line] == [20, 40, 60]
        drawn = Columns(read(run.runs[-1] / "metrics.jsonl"))
        assert drawn.metric == "L1Loss" and len(drawn.val_metric) == 3
        assert (run.runs[-1] / "curves.png").stat().st_size > 10_000

        again = ["model=prices.yaml", "optimizer=SGD", "resume=latest", f"port={run.port}"]
        other = run.start("another server", "-m", "paramserver", *again, "plain=true")
        assert other.end() == 2
        assert "was trained with optimizer=AdamW, this run has SGD" in other.output


def test_a_server_has_none_of_the_code(ours: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with Run(ours) as run:
        server = run.start(
            "the server", "-m", "paramserver", f"model={ours / 'prices.yaml'}",
            f"port={run.port}", "plain=true", "observer=false", "num_epochs=1",
            folder=elsewhere,
        )  # fmt: skip
        worker = run.worker(1)
        assert (server.end(), worker.end()) == (0, 0), server.output + worker.output
        [folder] = (elsewhere / "runs").glob("2*")
        assert json.loads((folder / "summary.json").read_text())["steps"] == 20


def test_a_wrong_name_ends_the_server_with_code_2(tmp_path: Path) -> None:
    with Run(tmp_path) as run:
        server = run.server("scheduler.name=StepLR", "scheduler.step=3")
        assert server.end() == 2
        assert "error: scheduler.step is no argument of StepLR" in server.output
        assert "did you mean step_size?" in server.output and "Traceback" not in server.output


# ------------------------------------------------------------------------------- names and errors


def settings(**given: Any) -> Settings:
    """Checked as those of a program are."""
    return schema.build({**vars(Settings()), "wandb": vars(Settings().wandb), **given})


MODEL = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
CLASSES = TensorDataset(torch.randn(20, 4), torch.arange(20) % 3)
NUMBERS = TensorDataset(torch.randn(20, 4), torch.randn(20))


class Dictionaries(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.zeros(4)}


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "optimizer": ({"optimizer": "Adm"}, "there is no optimizer 'Adm'", "did you mean Adam?"),
    "its argument": (
        {"optimizer": {"name": "SGD", "momentun": 0.9}},
        "optimizer.momentun is no argument of SGD",
        "did you mean momentum?",
    ),
    "its type": (
        {"optimizer": {"name": "SGD", "nesterov": 1}},
        "optimizer.nesterov must be true or false, not 1",
        "SGD takes",
    ),
    "its value": (
        {"optimizer": {"name": "SGD", "momentum": -1}},
        "SGD cannot be built from these arguments: Invalid momentum value: -1",
        "",
    ),
    "its rate": ({"optimizer": {"name": "SGD", "lr": 1}}, "optimizer.lr is a setting", "rate=1"),
    "schedule": ({"scheduler": "StepLr"}, "no scheduler 'StepLr'", "did you mean StepLR?"),
    "missing": ({"scheduler": "StepLR"}, "scheduler.step_size is missing", "StepLR takes"),
    "loss": ({"loss": "CrossEntropy"}, "there is no loss 'CrossEntropy'", "CrossEntropyLoss?"),
    "a sum": ({"loss": {"name": "MSELoss", "reduction": "sum"}}, "it must be a mean", "averaged"),
    "metric": ({"metric": "acuracy"}, "there is no metric 'acuracy'", "did you mean accuracy?"),
    "schedule's list": (
        {"scheduler": {"name": "MultiStepLR", "milestones": ["ten", "twenty"]}},
        "scheduler.milestones must be a list of whole numbers, not [ten, twenty]",
        "MultiStepLR takes",
    ),
    "schedule's word": (
        {"scheduler": {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1, "mode": "triangel"}},
        "scheduler.mode must be triangular or triangular2 or exp_range, not 'triangel'",
        "",
    ),
    "schedule of another optimizer": (
        {"scheduler": {"name": "CyclicLR", "base_lr": 0.1, "max_lr": 1}, "optimizer": "Adagrad"},
        "must support momentum",
        "",
    ),
    "a pair": (
        {"optimizer": {"name": "Adam", "betas": [0.9]}},
        "optimizer.betas must be a list of 2 numbers, not [0.9]",
        "",
    ),
    "no module": ({"loss": "nowhere.at:all"}, "loss=nowhere.at:all: there is no module", ""),
    "not one": ({"optimizer": "os:system"}, "neither a subclass of torch.optim.Optimizer", ""),
    "a count with an argument": (
        {"samples": {"name": "ours.houses:count", "all": 2}},
        "samples.all is no argument of ours.houses:count",
        "",
    ),
    "no count": (
        {"samples": {"name": "ours.houses:count", "each": 0}},
        "samples=ours.houses:count: a batch of 0 samples",
        "",
    ),
    "a count that is none": ({"samples": "ours.houses:off"}, "annotated to return", ""),
    "other shapes": (
        {"loss": "L1Loss"},
        "this loss does not take these samples",
        "outputs are float32 [2, 3], targets int64 [2]",
    ),
}


def test_an_evaluation_weighs_its_batches_by_what_their_losses_are_means_of(ours: Path) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean().expand(len(x))

    def mean_of_mean(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    x = torch.cat([torch.zeros(500, 1), torch.ones(100, 1)])  # batches of 500, and a rest
    samples = TensorDataset(x, x[:, 0])
    plain = builders.Criterion(mean_of_mean, mean_of_mean)
    assert builders.evaluate(Mean(), samples, CPU, plain) == pytest.approx((1 / 6, 1 / 6))
    weighed = builders.Criterion(
        mean_of_mean, mean_of_mean, samples=lambda batch: int(1 + 9 * batch[0].mean())
    )
    assert builders.evaluate(Mean(), samples, CPU, weighed) == pytest.approx((10 / 11, 10 / 11))


def test_an_average_that_nothing_has_gone_into_is_the_model() -> None:
    model = nn.Linear(2, 1)
    average = builders.build_average(model, settings(ema=0.5))
    assert average is not None and builders.build_average(model, settings()) is None
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        model.weight.add_(2)
    assert builders.averaged(average, model.state_dict())["weight"].equal(model.weight)
    average.update_parameters(model)  # the first one is the model, too
    with torch.no_grad():
        model.weight.add_(2)
    average.update_parameters(model)
    state = builders.averaged(average, model.state_dict())
    torch.testing.assert_close(state["weight"], before["weight"] + 3)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_names_setting_and_argument(
    name: str, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ours)
    given, problem, hint = WRONG[name]
    with pytest.raises(UserError) as caught:
        built(settings(**given), CLASSES)
    assert problem in caught.value.problem and hint in caught.value.hint


@pytest.mark.parametrize("name", list(WRONG)[: list(WRONG).index("no module")])
def test_a_server_finds_it_before_it_listens(name: str) -> None:
    """The same sentence; what is a user's own is not imported there."""
    given, problem, hint = WRONG[name]
    with pytest.raises(UserError) as caught:
        check_named(settings(**given))
    assert problem in caught.value.problem and hint in caught.value.hint


def test_a_server_tries_the_first_steps_of_a_schedule() -> None:
    """Torch divides by `step_size` only there, when all workers would end by it."""
    with pytest.raises(UserError, match="StepLR cannot be stepped with these arguments: Zero") as e:
        check_named(settings(scheduler={"name": "StepLR", "step_size": 0}))
    assert "StepLR takes" in e.value.hint


@pytest.mark.parametrize(
    "given",
    [
        {"optimizer": {"name": "SGD", "momentum": 0.9, "nesterov": True}},
        {"optimizer": {"name": "AdamW", "betas": [0.8, 0.99], "weight_decay": 0, "fused": True}},
        {"optimizer": {"name": "ours:SGD", "lr": 1}, "loss": {"name": "ours:off", "reduction": 1}},
        {"loss": {"name": "CrossEntropyLoss", "weight": [1.0, 2.0]}, "metric": "accuracy"},
        {"metric": {"name": "HuberLoss", "delta": 0.5}, "scheduler": {"name": "ours:Own", "x": 1}},
        {"scheduler": {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 9}},
        {"scheduler": {"name": "ChainedScheduler", "schedulers": [{"name": "StepLR",
            "step_size": 3}]}},
        {"scheduler": {"name": "SequentialLR", "milestones": [2], "schedulers": [
            {"name": "LinearLR", "total_iters": 2}, {"name": "ours:Own", "x": 1}]}},
        *({"optimizer": name} for name in builders.OPTIMIZERS),
    ],
)  # fmt: skip
def test_a_server_takes_what_can_be_built(given: dict[str, Any]) -> None:
    check_named(settings(**given))


def test_a_schedule_within_a_schedule_is_looked_at_too() -> None:
    parts = [{"name": "StepLR", "step": 3}]
    given = {"name": "SequentialLR", "schedulers": parts, "milestones": [2]}
    with pytest.raises(UserError, match=r"scheduler\.step is no argument of StepLR"):
        check_named(settings(scheduler=given))


def built(s: Settings, samples: Any) -> tuple[Any, ...]:
    criterion = builders.build_criterion(s, MODEL, samples, CPU, None)
    optimizer = builders.build_optimizer(MODEL, s, None)
    return criterion, optimizer, builders.build_scheduler(optimizer, s, None)


def test_targets_that_would_be_stretched_are_told() -> None:
    with pytest.raises(UserError, match="Using a target size") as caught:
        built(settings(loss="MSELoss"), NUMBERS)
    assert caught.value.hint == "outputs are float32 [2, 3], targets float32 [2]"


def test_samples_that_are_no_pairs_are_told() -> None:
    with pytest.raises(UserError, match="not one dict"):
        built(settings(), Dictionaries())


def test_a_fault_in_ones_own_loss_is_told_with_its_place(ours: Path) -> None:
    with pytest.raises(UserError, match=r"houses\.py, line \d+"):
        built(settings(loss="ours.houses:off"), NUMBERS)  # [2, 3] - [2]


def test_accuracy_goes_without_saying_where_targets_are_classes() -> None:
    assert built(settings(), CLASSES)[0].metric is builders.accuracy
    each = TensorDataset(torch.randn(20, 4), torch.randn(20, 3))
    assert built(settings(loss="MSELoss"), each)[0].metric is None
    with pytest.raises(UserError, match="accuracy is of classes"):
        built(settings(loss="MSELoss", metric="accuracy"), each)


def test_what_is_evaluated_are_means_over_samples(ours: Path) -> None:
    samples = TensorDataset(torch.randn(701, 4), torch.randn(701, 3))  # not whole batches
    s = settings(loss="MSELoss", metric={"name": "ours.houses:off", "power": 2})
    criterion = builders.build_criterion(s, MODEL, samples, CPU, None)
    loss, metric = builders.evaluate(MODEL, samples, CPU, criterion)
    with torch.no_grad():
        expected = nn.functional.mse_loss(MODEL(samples.tensors[0]), samples.tensors[1])
    assert criterion.name == "off"
    assert loss == pytest.approx(float(expected), abs=1e-6)
    assert metric == pytest.approx(loss, abs=1e-6)


def test_a_metric_of_ones_own_is_not_taken_for_ours(ours: Path) -> None:
    (ours / "ours" / "houses.py").write_text(HOUSES.replace("def off", "def accuracy"))
    s = settings(loss="MSELoss", metric="ours.houses:accuracy")
    samples = TensorDataset(torch.randn(4, 4), torch.randn(4, 3))
    assert builders.build_criterion(s, MODEL, samples, CPU, None).name == "ours.houses.accuracy"


def test_weights_of_classes_are_a_list() -> None:
    loss = built(settings(loss={"name": "CrossEntropyLoss", "weight": [1.0, 2.0, 3.0]}), CLASSES)[0]
    assert torch.equal(loss.loss.weight, torch.tensor([1.0, 2.0, 3.0]))


def test_schedules_one_after_another() -> None:
    parts = [{"name": "LinearLR", "start_factor": 0.1, "total_iters": 2}, {"name": "ExponentialLR",
             "gamma": 0.5}]  # fmt: skip
    given = {"name": "SequentialLR", "schedulers": parts, "milestones": [2]}
    _, optimizer, scheduler = built(settings(scheduler=given, learning_rate=1), CLASSES)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.55, 1.0, 0.5])


def test_every_optimizer_that_replicas_can_have_is_built() -> None:
    for name in {*builders.OPTIMIZERS} - {"LBFGS", "SparseAdam", "Muon"}:
        optimizer = builders.build_optimizer(MODEL, settings(optimizer=name, learning_rate=0.3))
        assert type(optimizer).__name__ == name and optimizer.param_groups[0]["lr"] == 0.3


def test_a_newly_chosen_learning_rate_moves_the_schedule() -> None:
    def make(rate: float) -> Replica:
        model = nn.Linear(2, 2)
        optimizer = SGD(model.parameters(), lr=rate)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return Replica(model, optimizer, scheduler=scheduler, bucket_mb=1, codec="float32")

    old, new = make(0.1), make(0.4)
    for _ in range(2):
        old.optimizer.step()
        old._schedule()
    new.load(old.state(), 2, "")
    new.change_learning_rate(0.1, 0.4)
    assert new.optimizer.param_groups[0]["lr"] == pytest.approx(0.2)
    for _ in range(2):
        new.optimizer.step()
        new._schedule()
    assert new.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert new.scheduler.base_lrs == pytest.approx([0.4])
