"""What a server sends to its workers is data: it is checked before it is used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from liar import FakeServer
from torch import nn
from torch.optim.lr_scheduler import StepLR
from whole import LOOPBACK

import workers
from paramserver.config.loading import from_wire, to_wire
from paramserver.errors import UserError
from paramserver.settings import Settings
from paramserver.transport import private_dir, sockets
from paramserver.transport.private_dir import PrivateFolder
from workers.builtin import models
from workers.link.client import Client
from workers.replica.replica import Replica

HONEST = json.loads(json.dumps(to_wire(Settings())))

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "a size of nothing": ({"bucket_mb": 0}, "bucket_mb must be more than 0 and at most 256"),
    "a huge size": ({"bucket_mb": 1e9}, "bucket_mb must be more than 0 and"),
    "crumbs": ({"bucket_mb": 1e-9}, "bucket_mb must be between 0.0001 and 256"),
    "no size": ({"bucket_mb": None}, "bucket_mb must be a number"),
    "a history without end": ({"history_mb": 1e300}, "history_mb must be between"),
    "a text for a number": ({"history_mb": "\x1b[2J"}, r"history_mb must be a number, got '\\x1b"),
    "a codec that there is not": ({"codec": "os.system"}, "codec must be one of float32"),
    "a list for a codec": ({"codec_down": ["float32"]}, "codec_down must be text or null"),
    "no time": ({"heartbeat_timeout": 1e-9}, "heartbeat_timeout must be between"),
    "an endless time": ({"idle_timeout": 1e200}, "idle_timeout must be between"),
    "a number without end": ({"batch_size": 10**40}, r"batch_size must be below 2\*\*63"),
    "a list for the model": ({"model": ["SimpleNN"]}, "model must be a mapping"),
    "a name with escapes": ({"model": {"type": "CNN", "\x1b[2J": 1}}, "have a name that is none"),
    "one deep inside": ({"loss": {"name": "x", "a": [{"b\n": 1}]}}, "have a name that is none"),
    "an unknown setting": ({"\x1b[2J": 1}, "know different settings: \N{REPLACEMENT CHARACTER}"),
    "a setting of the worker's own": ({"allow": ["os"]}, "know different settings: allow"),
}


@pytest.mark.parametrize("name", LIES)
def test_settings_that_cannot_be(name: str) -> None:
    lie, sentence = LIES[name]
    with pytest.raises(UserError, match=sentence) as told:
        from_wire(Settings(), HONEST | lie)
    assert "\x1b" not in str(told.value)


def test_a_setting_that_is_missing_or_nested_without_end() -> None:
    with pytest.raises(UserError, match="know different settings: codec"):
        from_wire(Settings(), {k: v for k, v in HONEST.items() if k != "codec"})
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(UserError, match="nested too deeply"):
        from_wire(Settings(), HONEST | {"model": {"type": "CNN", "a": deep}})


@pytest.mark.parametrize("own", [{"name": "MNIST", "root": "mine"}, {"name": "MNIST"}])
def test_where_data_lie_is_the_workers_own(own: dict[str, Any]) -> None:
    """A server does not choose a folder to read from or to write downloads into."""
    base = Settings(dataset=own)
    wire = HONEST | {"dataset": {"name": "digits", "root": "/etc"}}
    if "root" in own:
        assert from_wire(base, wire).dataset == {"name": "digits", "root": "mine"}
    else:
        with pytest.raises(UserError, match=r"dataset\.root must be text, got nothing"):
            from_wire(base, wire)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(name=st.sampled_from(sorted(HONEST)), value=VALUES)
@example(name="dataset", value={"name": "digits", "root": "/etc"})
def test_any_value_is_a_setting_or_refused(name: str, value: Any) -> None:
    sentence = ""
    try:
        run = from_wire(Settings(), HONEST | {name: value})
        assert run.dataset["root"] == "data" and isinstance(run.history_mb, float)
    except UserError as e:
        sentence = str(e)
    assert all(line.isprintable() for line in sentence.split("\n"))


# ------------------------------------------------------------------------------- the welcome


def connect(**welcome: Any) -> None:
    """Greet a server that says this."""
    with FakeServer(**welcome) as server:
        client = Client(LOOPBACK, server.port)
        try:
            client.connect(20)
            assert client.welcome is not None
        finally:
            client.close()


@pytest.mark.parametrize(
    ("welcome", "sentence"),
    [
        ({"session": "../../tmp/x"}, "sent no session"),
        ({"session": "/tmp/x"}, "sent no session"),
        ({"session": ""}, "sent no session"),
        ({"session": "a\n"}, "sent no session"),
        ({"id": -1}, "sent no worker's number"),
        ({"id": 2**40}, "sent no worker's number"),
        ({"pub_port": 0}, "sent no port of its PUB socket"),
        ({"pub_port": 70_000}, "sent no port of its PUB socket"),
        ({"told": {"history_mb": -1}}, "history_mb must be 0 or more"),
    ],
)
def test_a_welcome_that_cannot_be(welcome: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        connect(**welcome)


def test_a_loop_of_ones_own_is_told_in_the_same_way() -> None:
    lie = {"seed": "no number"}
    with (
        FakeServer(lie) as server,
        pytest.raises(UserError, match="seed must be a whole number, got 'no number'"),
    ):
        workers.join(LOOPBACK, port=server.port, say=lambda line: None)


def test_folders_that_are_none_of_ours(tmp_path: Path) -> None:
    """A server of another user on this machine names folders of ours."""
    real = PrivateFolder(tmp_path)
    assert private_dir.is_private(str(real.path)) and sockets.ipc_usable(str(real.path))
    secret = tmp_path / "secret"
    secret.mkdir(mode=0o700)
    link = tmp_path / "paramserver-link"
    link.symlink_to(real.path)
    named = tmp_path / "paramserver-named"
    named.mkdir(mode=0o700)  # without a lock
    for path in (secret, link, named, tmp_path / "paramserver-none", "paramserver-x", "\0"):
        assert not private_dir.is_private(str(path))
    os.chmod(real.path, 0o755)
    assert not private_dir.is_private(str(real.path))
    real.close()


def test_nothing_is_made_or_removed_where_a_server_says(tmp_path: Path) -> None:
    (tmp_path / "keep-0").write_text("mine")
    connect(ipc=str(tmp_path), shared=str(tmp_path))  # goes through TCP
    with pytest.raises(UserError, match="sent no session"):
        connect(session=str(tmp_path / "keep"), ipc=str(tmp_path), shared=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["keep-0"]


# ------------------------------------------------------------------------------- sizes and states


@pytest.mark.parametrize(
    "model",
    [
        {"type": "SimpleNN", "hidden": 10**12},
        {"type": "CNN", "width": 10**6},
        {"type": "SimpleNN", "hidden": 10**40},
    ],
)
def test_a_model_that_no_machine_holds(model: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"more than this machine has|cannot be built"):
        models.build(model, 0)


LOADED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a method": ("scheduler", {"get_lr": 1}, "scheduler.get_lr is no part of a state"),
    "the optimizer": (
        "scheduler",
        {"optimizer": None},
        "scheduler.optimizer is no part of a state",
    ),
    "a text": ("scheduler", {"gamma": "0.1"}, "scheduler.gamma is a str"),
    "a number for a list": ("scheduler", {"base_lrs": 3}, "scheduler.base_lrs is no list"),
    "a rate that is none": ("group", {"lr": "fast"}, "optimizer.0.lr is a str"),
}


@pytest.mark.parametrize("name", LOADED)
def test_a_state_takes_over_only_what_it_is_of(name: str) -> None:
    where, lie, sentence = LOADED[name]
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = StepLR(optimizer, 3)
    replica = Replica(model, optimizer, bucket_mb=1, codec="float32", scheduler=schedule)
    state = replica.state()
    goal = state["scheduler"] if where == "scheduler" else state["optimizer"]["param_groups"][0]
    replica.load(state, 1, "honest")
    goal |= lie
    with pytest.raises(ValueError, match=sentence):
        replica.load(state, 2, "lie")
    assert (replica.step, replica.lineage) == (1, "honest")
