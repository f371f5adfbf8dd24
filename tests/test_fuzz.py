"""Whatever lies in a file or comes from a peer: it is understood, or refused with the error that is
meant for it. Nothing crashes, and nothing is allocated because a number says so."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from paramserver.config.loading import load
from paramserver.errors import UserError
from paramserver.output import runfolder
from paramserver.output.runfolder import Past, Record, RunFolder
from paramserver.tensors.codec import CODECS
from paramserver.transport import shm
from workers.builtin import models, registry
from workers.builtin.own_code import OwnCode
from workers.replica import checkpoint
from workers.replica.replica import Replica
from workers.replica.state import flatten, unflatten

HERE = OwnCode((Path(tempfile.gettempdir()) / "no such folder",))
MARKS = st.sampled_from(["$tensor", "$tuple", "$pairs", "$float", "step", "samples", "run"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | MARKS, inner),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint as it should be."""
    model = nn.Linear(3, 2)
    replica = Replica(model, torch.optim.Adam(model.parameters()), bucket_mb=1.0, codec="float32")
    path = tmp_path_factory.mktemp("checkpoint") / "step-00000001.safetensors"
    checkpoint.save(path, replica, "run", {"learning_rate": 0.001})
    assert checkpoint.load(path).run == "run"
    return path.read_bytes()


def read_checkpoint(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-00000001.safetensors"
        path.write_bytes(content)
        try:
            found = checkpoint.load(path)
        except UserError as e:
            told = e.problem
        else:
            told = str(path) if isinstance(found.settings, dict) else "settings of another kind"
        assert str(path) in told


@given(seed=st.integers(0, 2**32), ways=st.integers(1, 4))
def test_a_damaged_checkpoint_is_refused_by_its_name(saved: bytes, seed: int, ways: int) -> None:
    source, content = random.Random(seed), bytearray(saved)
    for _ in range(ways):
        at = source.randrange(len(content)) if content else 0
        match source.randrange(4):
            case 0:
                del content[at:]
            case 1:
                content[at : at + 1] = source.randbytes(source.randrange(3))
            case 2:
                content[at:at] = source.randbytes(source.randrange(50))
            case 3:
                content[:8] = source.randbytes(8)  # the header's length
    read_checkpoint(bytes(content))


@given(content=st.binary(max_size=400))
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes) -> None:
    read_checkpoint(content)


@given(tree=JSON, count=st.integers(0, 3))
@example(tree={"$tensor": -1}, count=1)
@example(tree={"$pairs": [[{"$tensor": 0}, 1]]}, count=1)
def test_a_tree_is_a_state_or_refused(tree: Any, count: int) -> None:
    with suppress(ValueError):
        unflatten(json.dumps(tree), [torch.zeros(1)] * count)


def test_a_tree_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="saved state"):
        unflatten("[" * 100_000, [])


@given(st.integers(0, 5), st.floats(), st.text())
def test_what_flatten_makes_is_a_state(number: int, value: float, text: str) -> None:
    tree = {"step": number, "values": (value, [text]), number: text}
    again = unflatten(*flatten(tree))
    assert str(again) == str(tree)


@given(content=st.binary(max_size=300) | JSON.map(lambda v: json.dumps(v).encode()))
@example(content=b'{"run":"\xff","host":"h","port":1,"settings":{}}')
@example(content=b"[" * 100_000)
def test_a_run_json_of_any_content_is_passed_over(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "2026-11-22_12-00-09"
        folder.mkdir()
        (folder / "run.json").write_bytes(content)
        found = runfolder.unended(Path(name), 65432, {})
        if found is not None:
            assert isinstance(found.record, Record)
            found.folder.close()


@given(content=st.binary(max_size=300) | JSON.map(lambda v: json.dumps(v).encode() + b"\n"))
@example(content=b'{"step":1,"late":["\xff"]}\n')
@example(content=b"[" * 100_000 + b"\n")
def test_metrics_of_any_content_are_read_as_far_as_they_go(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        folder.metrics.write_bytes(content)
        assert isinstance(folder.take_up(), Past)


@settings(max_examples=50)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(content=b"model: [1, 2]")
@example(content=b"port: !!python/object:os.system x")
@example(content=b"a: &a [*a]")
@example(content=b"[" * 20_000)
def test_a_settings_file_is_read_or_told(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "cluster.yaml"
        path.write_bytes(content)
        with suppress(UserError):
            load([f"cluster={path}"], "server")


@given(place=st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 3))
def test_a_place_in_an_outbox_is_one_of_its_slots(place: tuple[int, int, int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        outbox = shm.Outbox(Path(folder) / "outbox", 100)
        with pytest.raises(ValueError, match="no such place"):
            outbox.buffer(place)


@given(
    codec=st.sampled_from(sorted(CODECS)),
    size=st.integers(1, 300),
    buffers=st.lists(st.binary(max_size=700), max_size=4),
    scale=st.floats(),
)
def test_a_payload_fits_its_bucket_or_is_refused(
    codec: str, size: int, buffers: list[bytes], scale: float
) -> None:
    """What `fits` lets pass can be decoded, whatever the bytes are."""
    views = [memoryview(bytearray(b)) for b in buffers]
    if CODECS[codec].fits(size, views) is None:
        out = torch.zeros(size)
        assert CODECS[codec].decode(views, scale, out).numel() == size


NAMES = st.text(max_size=30) | st.from_regex(r"[a-z_.]{0,20}:[A-Za-z_.]{0,10}", fullmatch=True)


@given(name=NAMES)
@example(name="os:system")
@example(name="torch.fx.graph_module:reduce_graph_module")
@example(name="antigravity:fly")
@example(name="this:s")
def test_a_name_from_a_server_imports_nothing(name: str) -> None:
    before = set(sys.modules)
    with suppress(UserError):
        registry.find("model.type", name, models.MODELS, nn.Module, "torch.nn.Module", HERE)
    assert set(sys.modules) == before
