"""Settings: where values come from, what is refused and in which words, what goes on the wire."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from paramserver.config import loading, schema
from paramserver.config.loading import check_worker_overrides, from_wire, load, save, to_wire
from paramserver.errors import UserError
from paramserver.settings import RunSettings, Settings
from paramserver.words import shown

CLONE = Path(__file__).resolve().parent.parent

CLUSTER = """\
host_ip: 10.10.0.1
port: 65432
num_workers: 4
timeout: 0.1
seed: 7
"""
MODEL = """\
batch_size: 16
learning_rate: 0.0001
num_epochs: 10
eval_steps: 50
track_gradients: True
model:
  type: SimpleNN
  input_dim: 784
  hidden: 64
  out: 10
  activation: relu
dataset:
  name: MNIST
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that the YAMLs of the clone are the shipped ones."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(path: str, text: str) -> str:
    """Write a file below the current folder."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return path


def refused(argv: list[str], program: schema.Program = "server") -> str:
    """The text of the error, hint and all."""
    with pytest.raises(UserError) as caught:
        load(argv, program)
    return str(caught.value)


# Where values come from


def test_shipped_files_hold_the_defaults() -> None:
    loaded = load([], "server")
    assert loaded.settings == Settings()
    assert loaded.given == {}
    assert [path.name for path in loaded.sources] == ["cluster.yaml", "model.yaml"]
    for path in loaded.sources:  # a link to the clone's; in an sdist a copy
        assert path.read_text() == (CLONE / "conf" / path.name).read_text()


def test_an_installed_package_has_its_own_files(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("site/paramserver/conf/cluster.yaml", "num_workers: 5")
    monkeypatch.setattr(loading, "__file__", str(here / "site/paramserver/config/loading.py"))
    loaded = load([], "server")
    assert loaded.settings.num_workers == 5
    assert [path.name for path in loaded.sources] == ["cluster.yaml"]


def test_known_files_load_unchanged() -> None:
    put("conf/cluster.yaml", CLUSTER)
    put("conf/model.yaml", MODEL)
    loaded = load([], "server")
    settings = loaded.settings
    assert loaded.sources == (Path("conf/cluster.yaml"), Path("conf/model.yaml"))
    assert (settings.host_ip, settings.num_workers, settings.timeout) == ("10.10.0.1", 4, 0.1)
    assert (settings.seed, settings.batch_size, settings.num_epochs) == (7, 16, 10)
    assert settings.model["hidden"] == 64
    assert settings.dataset == {"name": "MNIST", "root": "data"}


def test_precedence() -> None:
    put("conf/cluster.yaml", "seed: 1\nbatch_size: 1\nlearning_rate: 0.1\nwandb: {mode: offline}")
    put("conf/model.yaml", "batch_size: 2\nlearning_rate: 0.2\nwandb: {project: other}")
    settings = load(["learning_rate=0.3", "num_epochs=1", "num_epochs=9"], "server").settings
    assert (settings.seed, settings.batch_size, settings.learning_rate) == (1, 2, 0.3)
    assert settings.num_epochs == 9  # the last word
    assert (settings.wandb.mode, settings.wandb.project) == ("offline", "other")
    assert settings.port == 65432


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("seed=1 seed=1", ""),
        ("seed=1 seed=2", "seed is given twice: 2 counts, not 1"),
        ("optimizer=AdamW optimizer.name=SGD", "optimizer.name is given twice: SGD counts, not Ad"),
        ("model.type=CNN model.width=8", ""),
        ("cluster=conf/a.yaml cluster=conf/b.yaml", "cluster is given twice: conf/b.yaml counts"),
        ("id=1 join=psabc join=psabcd", "join is given twice: the last one counts"),
    ],
)
def test_a_word_with_two_values_is_told(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        put(f"conf/{name}.yaml", "batch_size: 8")
    load(words.split(), "worker" if "id=" in words else "server").tell_twice()
    told = capsys.readouterr()
    assert told.out.startswith(said) and bool(told.out) == bool(said) and not told.err
    assert "psabc" not in told.out


@pytest.mark.parametrize(
    ("path", "chosen"),
    [
        ("other.yaml", "model=other.yaml"),
        ("conf/resnet18.yaml", "model=resnet18"),
        ("conf/resnet18.yaml", "model=resnet18.yaml"),
        ("conf/resnet18.yaml", "model=conf/resnet18.yaml"),
        ("conf/model/resnet18.yaml", "model=resnet18"),
        ("conf/home.yaml", "cluster=home"),
        ("conf/cluster/home.yaml", "cluster=home"),
    ],
)
def test_files_by_path_or_name(path: str, chosen: str) -> None:
    put(path, "seed: 5")
    loaded = load([chosen, "batch_size=3"], "server")
    assert (loaded.settings.seed, loaded.settings.batch_size) == (5, 3)
    assert Path(path) in loaded.sources
    assert loaded.given == {"batch_size": 3}
    assert len(loaded.sources) == 2


def test_a_name_is_not_mistaken_for_a_folder() -> None:
    Path("home").mkdir()
    put("conf/home.yaml", "seed: 5")
    assert load(["cluster=home"], "server").settings.seed == 5


def test_an_empty_choice_is_none() -> None:
    assert load(["cluster=", "model="], "server").settings == Settings()


def test_empty_and_commented_files_are_fine() -> None:
    put("conf/cluster.yaml", "")
    put("conf/model.yaml", "# nothing\n")
    assert load([], "server").settings == Settings()


@pytest.mark.parametrize(
    ("yaml", "argv", "expected"),
    [
        ("type: SimpleNN\n  hidden: 3", [], {**Settings().model, "hidden": 3}),
        ("hidden: 3", ["model.out=2"], {**Settings().model, "hidden": 3, "out": 2}),
        ("type: CNN\n  width: 3", [], {"type": "CNN", "width": 3}),
        ("type: CNN\n  width: 3", ["model.type=CNN", "model.depth=2"],
         {"type": "CNN", "width": 3, "depth": 2}),
        ("hidden: 3", ["model.type=CNN"], {"type": "CNN"}),
        ("type: CNN\n  width: 3", ["model.deep=2", "model.type=my:ViT"],
         {"type": "my:ViT", "deep": 2}),
    ],
)  # fmt: skip
def test_a_model_of_another_type_is_replaced(
    yaml: str, argv: list[str], expected: dict[str, Any]
) -> None:
    put("conf/model.yaml", f"model:\n  {yaml}\n")
    assert load(argv, "server").settings.model == expected


def test_a_dataset_of_another_name_is_replaced_but_its_root_stays() -> None:
    put("conf/model.yaml", "dataset: {name: MNIST, root: /data, fold: 3}")
    assert load(["dataset.name=MNIST"], "server").settings.dataset["fold"] == 3
    other = load(["dataset.name=digits"], "server").settings.dataset
    assert other == {"name": "digits", "root": "/data"}
    moved = load(["dataset.name=digits", "dataset.root=/mnt"], "server").settings.dataset
    assert moved == {"name": "digits", "root": "/mnt"}


def test_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PS_PORT", "7000")
    put("conf/cluster.yaml", "port: ${oc.env:PS_PORT}\nmin_workers: ${num_workers}")
    settings = load(["num_workers=3", "run_dir=runs/${seed}"], "server").settings
    assert (settings.port, settings.min_workers, settings.run_dir) == (7000, 3, "runs/42")


SGD = {"name": "SGD", "momentum": 0.9}


@pytest.mark.parametrize(
    ("yaml", "argv", "expected"),
    [
        ("SGD", [], {"name": "SGD"}),
        ("{name: SGD, momentum: 0.9}", [], SGD),
        ("SGD", ["optimizer.momentum=0.9"], SGD),
        ("{name: SGD, momentum: 0.9}", ["optimizer=SGD"], SGD),
        ("{name: SGD, momentum: 0.9}", ["optimizer=Adam"], {"name": "Adam"}),
        ("Adam", ["optimizer={name: SGD, momentum: 0.9}"], SGD),
        ("Adam", ["optimizer=SGD", "optimizer.momentum=0.9"], SGD),
    ],
)
def test_an_optimizer_is_a_name_or_more(
    yaml: str, argv: list[str], expected: dict[str, Any]
) -> None:
    put("conf/model.yaml", f"optimizer: {yaml}\n")
    assert load(argv, "server").settings.optimizer == expected


@pytest.mark.parametrize("name", ["scheduler", "metric"])
def test_what_may_be_left_out(name: str) -> None:
    put("conf/model.yaml", f"{name}: {{name: x, y: 1}}\n")
    assert getattr(load([], "server").settings, name) == {"name": "x", "y": 1}
    assert getattr(load([f"{name}=null"], "server").settings, name) is None
    assert getattr(load([f"{name}="], "server").settings, name) is None
    assert f"{name} must be a name, or a mapping with a name or null" in refused([f"{name}=3"])
    put("conf/model.yaml", "")
    assert f"{name}.name must be text, got nothing" in refused([f"{name}.y=3"])
    assert "loss must be a name, or a mapping with a name, got nothing" in refused(["loss=null"])


# What values become


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seed=0", 0),
        ("checkpoint_steps=1e3", 1000),
        ("batch_size='8'", 8),
        ("learning_rate=1", 1.0),
        ("learning_rate=1e-3", 0.001),
        ("timeout=null", None),
        ("timeout=", None),
        ("track_gradients=false", False),
        ("track_gradients=no", False),
        ("host_ip=", None),
        ("host_ip=fe80::1", "fe80::1"),
        ("host_ip=mini1.local", "mini1.local"),
        ("device=cuda:1", "cuda:1"),
        ("wandb.name=007", "007"),
        ("wandb.name=on", "on"),
        ("wandb.name=a: b # c=d", "a: b # c=d"),
        ("wandb.name=null", None),
        ("model.hidden=256", 256),
        ("model.layers=[64, 32]", [64, 32]),
        ("model.activation=tanh", "tanh"),
        ("dataset.root=2024", "2024"),
        ("dataset={name: digits}", None),
    ],
)
def test_values_on_the_command_line(argument: str, value: object) -> None:
    name = argument.partition("=")[0]
    loaded = load([argument], "server")
    if name == "dataset":
        assert loaded.given == {"dataset.name": "digits"}
        return
    assert loaded.given == {name: value}
    assert type(loaded.given[name]) is type(value)
    assert schema.flatten(asdict(loaded.settings))[name] == value


def test_only_plain_values_leave() -> None:
    model = load(["model.layers=[1, {a: 2}]", "model.sub.x=1"], "server").settings.model
    assert type(model) is dict
    assert type(model["layers"]) is list
    assert [type(item) for item in model["layers"]] == [int, dict]
    assert type(model["sub"]) is dict


# What is refused

LEARNING_RATE = "unknown setting `lerning_rate`; did you mean `learning_rate`?"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["lerning_rate=0.1"], [LEARNING_RATE, "(command line)", "--help"]),
        (["wandb.mod=offline"], ["unknown setting `wandb.mod`; did you mean `wandb.mode`?"]),
        (["project=mine"], ["did you mean `wandb.project`?"]),
        (["root=/x"], ["did you mean `dataset.root`?"]),
        (["ID=1"], ["did you mean `id`?"]),
        (["batch-size=1"], ["did you mean `batch_size`?"]),
        (["xyzzy=1"], ["unknown setting `xyzzy` (command line)"]),
        (["wandb.mode.x=1"], ["unknown setting `wandb.mode.x`"]),
        (["model..x=1"], ["unknown setting `model..x`"]),
        (["train"], ["cannot read the argument 'train'", "key=value", "learning_rate=0.01"]),
        (["=3"], ["cannot read the argument '=3'"]),
        (["--batch_size=3"], ["cannot read the argument '--batch_size=3'", ": batch_size=3"]),
        (["--batch_size", "3"], ["without dashes: batch_size=3"]),
        (["batch_size=abc"], ["batch_size must be a whole number, got 'abc'", "samples per worker",
                              "default 32"]),
        (["batch_size=1.5"], ["batch_size must be a whole number, got 1.5"]),
        (["batch_size=true"], ["batch_size must be a whole number, got true"]),
        (["batch_size="], ["batch_size must be a whole number, got nothing"]),
        (["batch_size.a=1"], ["batch_size must be a whole number, got {a: 1}"]),
        (["batch_size=[1,"], ["cannot read the value in batch_size=[1,"]),
        (["run_dir=${"], ["cannot read the value in run_dir=${"]),
        (["learning_rate=fast"], ["learning_rate must be a number, got 'fast'"]),
        (["learning_rate=.nan"], ["learning_rate must be a number, got nan"]),
        (["learning_rate=.inf"], ["learning_rate must be a number, got inf"]),
        ([f"learning_rate={10**400}"], ["learning_rate must be a number, got 1000"]),
        (["timeout=soon"], ["timeout must be a number or null, got 'soon'", "[s]"]),
        (["track_gradients=1"], ["track_gradients must be true or false, got 1"]),
        (["dataset=digits"], ["dataset must be a mapping, got 'digits'", "dataset.name=digits"]),
        (["model.type="], ["model.type must be text, got nothing"]),
        (["model={type: 3}"], ["model={type: 3}: there is no such file", "model.type=CNN"]),
        (["optimizer={name:", "AdamW}"], ["cannot read the argument 'AdamW}'", "in quotes"]),
        (["dataset={name: 3}"], ["dataset.name must be text, got 3", "dataset.name: '3'"]),
        (["model.rate=.inf"], ["model.rate must be a plain, finite value, got inf"]),
        (["model.layers=[1, .nan]"], ["model.layers must be a plain, finite value, got nan"]),
        (["wandb=offline"], ["wandb must be a mapping, got 'offline'"]),
        (["dataset=[1]"], ["dataset must be a mapping, got [1]"]),
        (["model.a=[1]", "model.a.b=2"], ["command line: a list and a mapping"]),
        (["model.x=???"], ["cannot read model.x", "yet to be given (command line)"]),
        (["port=0"], ["port must be between 1 and 65534, got 0"]),
        (["port=65535"], ["port must be between 1 and 65534, got 65535"]),
        (["id=0"], ["id must be between 1 and 65535, got 0"]),
        (["id=65536"], ["id must be between 1 and 65535"]),
        (["threads=0"], ["threads must be 1 or more"]),
        (["host_ip=10.10.0.1:65432"], ["host_ip must be an address alone"]),
        (["host_ip=tcp://10.10.0.1"], ["host_ip must be an address alone"]),
        (["device=gpu"], ["device must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"]),
        (["device=cuda:"], ["device must be"]),
        (["num_workers=0"], ["num_workers must be between 1 and"]),
        (["min_workers=0"], ["min_workers must be 1 or more"]),
        (["min_workers=3"], ["min_workers must not exceed num_workers (2), got 3"]),
        (["num_workers=65"], ["num_workers must not exceed max_workers (64), got 65"]),
        (["timeout=0"], ["timeout must be more than 0, got 0"]),
        (["heartbeat_timeout=-1"], ["heartbeat_timeout must be more than 0, got -1"]),
        (["join_timeout=0"], ["join_timeout must be more than 0"]),
        (["idle_timeout=0"], ["idle_timeout must be more than 0"]),
        (["quorum=0"], ["quorum must be more than 0 and at most 1, got 0"]),
        (["quorum=1.1"], ["quorum must be more than 0 and at most 1, got 1.1"]),
        (["codec=int4"], ["codec must be one of float32, float16,", "topk, got 'int4'"]),
        (["bucket_mb=0"], ["bucket_mb must be more than 0 and at most 256"]),
        (["bucket_mb=257"], ["bucket_mb must be more than 0 and at most 256"]),
        (["history_mb=-1"], ["history_mb must be 0 or more"]),
        (["timeout=1e10"], ["timeout must be between 0 and 1e+09, got 10000000000"]),
        (["heartbeat_timeout=0.001"], ["heartbeat_timeout must be between 0.01 and 1e+09"]),
        (["bucket_mb=0.00001"], ["bucket_mb must be between 0.0001 and 256, got 1e-05"]),
        (["history_mb=1e10"], ["history_mb must be between 0 and 1e+09"]),
        (["max_workers=1025"], ["max_workers must be between 1 and 1024"]),
        (["seed=-1"], ["seed must be 0 or more"]),
        (["batch_size=0"], ["batch_size must be 1 or more"]),
        (["learning_rate=0"], ["learning_rate must be more than 0"]),
        (["num_epochs=0"], ["num_epochs must be 1 or more"]),
        (["eval_steps=-1"], ["eval_steps must be 0 or more"]),
        (["checkpoint_steps=-1"], ["checkpoint_steps must be 0 or more"]),
        (["keep_checkpoints=0"], ["keep_checkpoints must be 1 or more"]),
        (["wandb.mode=off"], ["wandb.mode must be one of online, offline, disabled, got 'off'"]),
        (["seed=${nope}"], ["cannot fill in seed", "there is no setting `nope`", "(command line)"]),
        (["model.x=${now:1}"], ["cannot fill in model.x", "there is no ${now:...}"]),
        (["model.x={null: 1}"], ["cannot read the value in model.x", "a name in it is no text"]),
        (["model.x=!!set {a}"], ["no setting takes a value of this kind"]),
        (["run_dir=${oc.env:PS_NO}"], ["cannot fill in run_dir", "no variable PS_NO", "oc.env"]),
        (["port=${seed}", "seed=${port}"], ["cannot fill in", "it stands for itself"]),
        (["model=resnet50"], ["model=resnet50: there is no such file", "cluster, model",
                              "model.type=resnet50"]),
        (["model=~nobody/x"], ["model=~nobody/x: there is no such file"]),
        ([f"model={'x' * 999}"], ["there is no such file"]),
        (["cluster=no/where.yaml"], ["cluster=no/where.yaml: there is no such file"]),
        (["PORT=44040"], ["unknown setting `PORT`; did you mean `port`?"]),
        (["LR=0.1"], ["did you mean `learning_rate`?"]),
        (["port", "44030"], ["cannot read the argument 'port'", "dashes: port=44030"]),
        (["--port", "44030"], ["cannot read the argument '--port'", "dashes: port=44030"]),
        (["port:", "44030"], ["cannot read the argument 'port:'", "dashes: port=44030"]),
        (["--lr=0.1"], ["cannot read the argument '--lr=0.1'", "learning_rate=0.1"]),
        (["--port", "seed=3"], ["dashes: port=VALUE"]),
        (["model.type=SimpelNN"], ["there is no model 'SimpelNN' (model.type)", "SimpleNN?"]),
        (["dataset.name=minst"], ["there is no data set 'minst' (dataset.name)", "MNIST?"]),
        (["id=2"], ["id belongs to a worker", "make worker ID=2"]),
        (["join=psa"], ["join belongs to a worker"]),
    ],
)  # fmt: skip
def test_refused_on_the_command_line(argv: list[str], parts: list[str]) -> None:
    text = refused(argv)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("yaml", "parts"),
    [
        ("seed: 1\nlerning_rate: 0.1", [LEARNING_RATE, "(conf/model.yaml, line 2)"]),
        ("seed: 1\nwandb:\n  mod: x", ["did you mean `wandb.mode`?", "(conf/model.yaml, line 3)"]),
        ("modle:\n  type: CNN", ["unknown setting `modle`; did you mean `model`?", "line 1"]),
        ("\nbatch_size: many", ["whole number, got 'many' (conf/model.yaml, line 2)"]),
        ("batch_size:\n", ["whole number, got nothing (conf/model.yaml, line 1)"]),
        ("host_ip:\n  a: 1", ["host_ip must be text or null, got {a: 1}", "line 1"]),
        ("wandb:\n  mode: off", ["wandb.mode must be text or null, got false", "line 2", "quotes"]),
        ("model:\n  type: 5", ["model.type must be text, got 5 (conf/model.yaml, line 2)"]),
        ("model: SimpleNN", ["model must be a mapping", "line 1", "model.type=SimpleNN"]),
        ("model:", ["model must be a mapping, got nothing (conf/model.yaml, line 1)"]),
        ("dataset:\n  name:", ["dataset.name must be text, got nothing", "line 2"]),
        ("model:\n  x: 1\n  rate: .nan", ["model.rate must be a plain, finite", "line 3"]),
        ("model:\n  x: !!binary aGk=", ["model.x must be a plain, finite value", "line 2"]),
        ("a: 1\n\tb: 2", ["cannot read conf/model.yaml, line 2", "spaces, not with tabs"]),
        ("seed: [1,", ["cannot read conf/model.yaml, line "]),
        ("seed: 1\nport: 2\nseed: 3", ["conf/model.yaml, line 3: found duplicate key seed"]),
        ("seed: 1\n---\nport: 2", ["cannot read conf/model.yaml, line 2"]),
        ("x: !!python/object/apply:os.getcwd []", ["cannot read conf/model.yaml, line 1"]),
        ("- 1\n- 2", ["conf/model.yaml holds no settings", "`key: value`"]),
        ("hello", ["conf/model.yaml holds no settings"]),
        ("seed: !!int x", ["cannot read conf/model.yaml"]),
        ("seed: \x01", ["cannot read conf/model.yaml"]),
        ("\nrun_dir: ${seed", ["cannot fill in run_dir", "(conf/model.yaml, line 2)"]),
        ("\nmodel:\n  x: ${no}", ["cannot fill in model.x", "(conf/model.yaml, line 3)"]),
        ("x: 1\nport: 3", ["unknown setting `x`"]),
    ],
)  # fmt: skip
def test_refused_in_a_file(yaml: str, parts: list[str]) -> None:
    put("conf/model.yaml", yaml)
    text = refused([])
    for part in parts:
        assert part in text


def test_a_file_that_is_no_text() -> None:
    Path("x.yaml").write_bytes(b"seed: \xff\xfe")
    assert "cannot read x.yaml" in refused(["model=x.yaml"])


def test_without_an_observer_a_model_is_named_as_one_likes() -> None:
    """A script may read it: nothing of ours builds it."""
    words = ["observer=false", "model.type=ViT", "dataset.name=photos"]
    assert load(words, "server").settings.model == {"type": "ViT"}


def test_a_bad_value_that_a_later_layer_mends_is_no_error() -> None:
    put("conf/model.yaml", "batch_size: many")
    assert load(["batch_size=8"], "server").settings.batch_size == 8


def test_the_blame_is_on_the_last_layer() -> None:
    put("conf/cluster.yaml", "seed: 1")
    put("conf/model.yaml", "seed: x")
    assert "(conf/model.yaml, line 1)" in refused([])
    assert "(command line)" in refused(["seed=y"])


WORDS = ["seed", "model", "model.type", "dataset", "wandb", "wandb.mode", "timeout", "x", "<<", "."]
TEXT = st.text(st.sampled_from("abe1.0-+:=[]{}${}!&*#'\"\\,| \n\t~?%@\x00\x85é\udcff"), max_size=12)


@examples(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.sampled_from(WORDS), TEXT).map("=".join) | TEXT, max_size=3))
@example(["model=~\x00"])
@example(["model=${é\t#"])
def test_any_command_line_is_settings_or_an_error_for_people(argv: list[str]) -> None:
    with contextlib.suppress(UserError):
        load([argument for argument in argv if argument != "-h"], "server")


@examples(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(st.sampled_from(WORDS), TEXT).map(": ".join) | TEXT, max_size=4))
def test_any_file_is_settings_or_an_error_for_people(lines: list[str]) -> None:
    Path("any.yaml").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        load(["model=any.yaml"], "server")


def test_names_of_files_are_listed() -> None:
    put("conf/home.yaml", "")
    put("conf/model/resnet18.yaml", "")
    assert "cluster, home, model, resnet18" in refused(["model=resnet50"])


# A worker


@pytest.mark.parametrize("argument", ["wandb.mode=offline", "checkpoint_steps=3", "resume=latest"])
def test_a_workers_command_line_has_none_of_the_servers(argument: str) -> None:
    text = refused(["id=1", argument], "worker")
    assert f"{argument.partition('=')[0]} belongs to the server" in text
    assert f"give it there: make server {argument}" in text
    load(["id=1", argument], "launch")
    put("conf/cluster.yaml", "wandb: {mode: offline}")  # one file may serve all machines
    assert load(["id=1"], "worker").settings.id == 1


@pytest.mark.parametrize(
    ("argument", "theirs"),
    [
        ("learning_rate=0.01", "0.001"),
        ("timeout=3", "null"),
        ("track_gradients=false", "true"),
        ("model.hidden=256", "128"),
        ("model.width=2", "no such argument"),
        ("dataset.name=digits", "MNIST"),
    ],
)
def test_a_worker_must_not_contradict_the_run(argument: str, theirs: str) -> None:
    name, _, mine = argument.partition("=")
    given = load([argument], "worker").given
    with pytest.raises(UserError, match=re.escape(name)) as caught:
        check_worker_overrides(given, Settings())
    assert mine in caught.value.problem
    assert f"has {theirs}" in caught.value.problem


def test_a_worker_may_agree_and_has_its_own() -> None:
    argv = ["learning_rate=1e-3", "seed=42", "model.hidden=128.0", "dataset.root=/elsewhere"]
    argv += ["id=3", "device=cpu", "port=7000"]
    check_worker_overrides(load(argv, "worker").given, Settings())


def test_the_wire_carries_what_is_run_wide() -> None:
    put("conf/cluster.yaml", "num_workers: 9")
    argv = ["learning_rate=0.5", "timeout=2", "model.type=CNN", "model.layers=[1, 2]"]
    argv += ["port=7000", "run_dir=/server", "dataset.root=/server", "wandb.project=server"]
    server = load(argv, "server").settings
    put("conf/cluster.yaml", "num_workers: 3\nlearning_rate: 0.7")
    argv = ["id=2", "port=8000", "device=cpu", "run_dir=/worker", "dataset.root=/worker"]
    worker = load(argv, "worker").settings

    wire = json.loads(json.dumps(to_wire(server)))
    assert "/server" not in json.dumps(wire)
    assert not {"port", "id", "device", "run_dir", "wandb", "resume"} & set(wire)
    both = from_wire(worker, wire)
    assert to_wire(both) == to_wire(server)
    assert (both.learning_rate, both.timeout, both.num_workers) == (0.5, 2.0, 9)
    assert both.model == {"type": "CNN", "layers": [1, 2]}
    assert both.dataset == {"name": "MNIST", "root": "/worker"}
    assert (both.id, both.port, both.device, both.run_dir) == (2, 8000, "cpu", "/worker")
    assert both.wandb == worker.wandb


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"new_key": 1}, "different settings: new_key"),
        ({"seed": ...}, "different settings: seed"),
        ({"port": 3}, "different settings: port"),
        ({"batch_size": "x"}, "batch_size must be a whole number, got 'x' (sent by the server)"),
        ({"batch_size": -1}, "batch_size must be 1 or more"),
        ({"dataset": []}, "dataset must be a mapping"),
        ({"model": {}}, "model.type must be text"),
    ],
)
def test_a_wrong_wire_is_refused(change: dict[str, object], part: str) -> None:
    wire = {k: v for k, v in (to_wire(Settings()) | change).items() if v is not ...}
    with pytest.raises(UserError, match=re.escape(part)):
        from_wire(Settings(), wire)


def test_the_settings_of_a_run_are_a_mapping_of_what_all_share_too() -> None:
    run = RunSettings.of(replace(Settings(), batch_size=7, port=3))
    assert run.batch_size == run["batch_size"] == run.get("batch_size") == 7
    assert set(run) == set(to_wire(Settings())) and len(dict(run)) == len(run)
    for name in ("port", "no_setting", "codec_of_averages"):
        assert name not in run and run.get(name, "none") == "none"
    assert from_wire(Settings(), {**run, "bucket_mb": 1.0}).batch_size == 7


def test_null_means_what_the_help_says() -> None:
    usual = Settings(codec="int8")
    assert usual.codec_of_averages == "int8"
    assert replace(usual, codec_down="float16").codec_of_averages == "float16"
    assert usual.bucket_size_mb == usual.with_bucket(linked=False).bucket_mb == 4.0
    assert usual.with_bucket(linked=True).bucket_mb == 2.0
    sharded = replace(usual, codec="float32")
    assert sharded.with_bucket(linked=True).bucket_mb == 1.0
    assert sharded.with_bucket(linked=True, fast=True).bucket_mb == 2.0
    assert replace(sharded, aggregate="median").with_bucket(linked=True).bucket_mb == 2.0
    assert sharded.with_bucket(linked=False).bucket_mb == 4.0
    assert replace(sharded, codec="float16").with_bucket(linked=True).bucket_mb == 2.0
    assert replace(sharded, shards=1).with_bucket(linked=True).bucket_mb == 2.0
    for codec, size in {"float32": 0.25, "float16": 0.5, "int8": 1.0, "topk": 2.0}.items():
        slow = replace(sharded, codec=codec).with_bucket(linked=True, slow=True)
        assert slow.bucket_mb == size and (slow.min_bucket_mb or 0) <= size
    for same in (
        replace(usual, shards=1),
        replace(sharded, deterministic=True),
    ):  # nothing measured chooses there
        assert same.with_bucket(linked=True, slow=True) == same.with_bucket(linked=True)
    chosen = replace(usual, bucket_mb=1.0)
    assert chosen.with_bucket(linked=True) == chosen.with_bucket(linked=False) == chosen


def test_what_goes_out_is_a_copy() -> None:
    settings = load([], "server").settings
    to_wire(settings)["model"]["hidden"] = 0
    assert settings.model["hidden"] == 128


# What was really used


def test_a_saved_configuration_loads_again(here: Path) -> None:
    put("conf/model.yaml", "batch_size: 99\nmodel: {type: 'my:ViT', depth: 3}")
    argv = ["learning_rate=1e-5", "batch_size=8", "timeout=0.5", "model.type=CNN", "model.k=[1, 2]"]
    argv += ["dataset.name=digits", "wandb.name=007", "wandb.project=null and void", "host_ip=::1"]
    settings = load(argv, "server").settings
    path = here / "runs/one/config.yaml"
    path.parent.mkdir(parents=True)
    save(settings, path)
    again = load([f"cluster={path}"], "server")
    assert again.settings == settings
    assert again.sources == (path,)  # it is whole: conf/model.yaml is left out
    assert load([f"model={path}"], "server").settings == settings
    changed = load([f"cluster={path}", "model=model", "seed=3"], "server").settings
    assert (changed.seed, changed.batch_size) == (3, 99)
    assert changed.model == {"type": "my:ViT", "depth": 3}


def test_a_chosen_cluster_file_without_a_model_leaves_the_model_file() -> None:
    put("conf/model.yaml", "batch_size: 99")
    put("conf/home.yaml", "seed: 3")
    assert load(["cluster=home"], "server").settings.batch_size == 99


# Programs


def test_every_default_is_in_its_range() -> None:
    assert set(schema.HEADINGS) <= set(schema.KEYS)
    assert {key.scope for key in schema.KEYS.values()} == {"run", "server", "local"}
    assert schema.build(asdict(Settings())) == Settings()


def test_settings_are_frozen() -> None:
    settings = load([], "server").settings
    with pytest.raises(AttributeError):
        settings.seed = 3  # type: ignore[misc]
    assert replace(settings, seed=3).seed == 3


def test_a_value_is_shown_as_it_is_written_and_no_more_of_it_than_a_line() -> None:
    value = {"name": "OneCycleLR", "max_lr": 0.01, "x": None, "y": [1, True, {"a": "b"}]}
    text = "{name: OneCycleLR, max_lr: 0.01, x: null, y: [1, true, {a: b}]}"
    assert shown(value, 80) == text and shown(value) == text[:57] + "..."
    deep: object = 1
    for _ in range(100_000):
        deep = [deep]
    assert len(shown(deep)) <= 60 and len(shown(list(range(10**6)))) == 60
    while isinstance(deep, list):  # to free it all at once would take as many frames
        deep = deep.pop()
