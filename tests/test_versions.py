"""Which versions of PyTorch, Python and this program train together."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest
from whole import Served

import paramserver
from paramserver.errors import PeerError, UserError
from paramserver.net import machine
from paramserver.protocol import messages as wire
from paramserver.protocol import versions
from workers.link.connection import Connection

CLONE = Path(__file__).resolve().parent.parent
OURS = {"paramserver": "0.1.2", "torch": "2.15.0", "python": "3.12.3"}


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({}, None),
        (OURS, None),
        ({"torch": "2.6.0", "python": "3.11.0", "paramserver": "0.1.9"}, None),
        ({"torch": "2.13.0+cpu"}, None),
        ({"torch": "2.16.0a0+git1234"}, None),
        ({"torch": "of my own"}, None),
        ({"numpy": "1.0"}, None),
        ({"torch": "2.5.1"}, "has PyTorch 2.5.1, the server's machine 2.15.0: a run takes 2.6 or "),
        ({"torch": "3.0.0"}, "newer, below 3.0 / install PyTorch 2.15.0 there"),
        ({"torch": "1.13.1"}, "has PyTorch 1.13.1"),
        ({"python": "3.10.4"}, "has Python 3.10.4, the server's machine 3.12.3: a run takes 3.11"),
        ({"python": "3.14.0"}, "3.11 or newer, below 3.14 / install Python 3.12.3 there"),
        (
            {"paramserver": "0.2.0"},
            "has paramserver 0.2.0, the server's machine 0.1.2 / "
            "install paramserver 0.1 on both machines",
        ),
        ({"paramserver": "1.1.2"}, "has paramserver 1.1.2"),
    ],
)
def test_a_range_decides(theirs: dict[str, str], said: str | None) -> None:
    unfit = versions.misfit(theirs, OURS)
    if said is None:
        assert unfit is None
    else:
        assert unfit is not None and said in " / ".join(unfit)


def test_the_versions_of_the_server_itself_are_always_right() -> None:
    future = {"torch": "3.1.0", "python": "3.15.0", "paramserver": "1.0.0"}
    assert versions.misfit(future, future) is None
    assert versions.misfit({"paramserver": "1.7.0"}, future) is None  # from 1.0 on the major counts
    assert versions.misfit({"torch": "2.4.0"}, {}) is not None


def test_the_ranges_are_those_of_the_package() -> None:
    package = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]
    low, high = versions.RANGES["python"]
    assert package["requires-python"] == f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
    low, high = versions.RANGES["torch"]
    assert f"torch>={low[0]}.{low[1]},<{high[0]}" in package["dependencies"]
    table = (CLONE / "docs/cluster.md").read_text()
    assert f"| PyTorch | {low[0]}.{low[1]} or newer, below {high[0]}.{high[1]} |" in table


def test_what_this_process_has_loaded() -> None:
    import torch

    found = machine.versions()
    assert found["torch"] == torch.__version__
    assert found["paramserver"] == paramserver.__version__
    assert re.fullmatch(r"3\.1[1-3]\.\d+\S*", found["python"])


@pytest.mark.parametrize(
    "many", [{f"v{n}": "1" for n in range(17)}, {"v" * 65: "1"}, {"v": "1" * 65}]
)
def test_what_is_told_is_bounded(many: dict[str, str]) -> None:
    hello = wire.Hello(protocol=wire.PROTOCOL, role="worker", id=1, nonce="n", host="h", pid=1)
    told = msgspec.structs.replace(hello, versions=many)
    with pytest.raises(PeerError):
        wire.from_frames(wire.to_frames(told))


def test_a_server_refuses_a_worker_with_too_old_a_pytorch() -> None:
    with Served() as served:
        connection = Connection("127.0.0.1", served.port)
        old = {**connection.hello.versions, "torch": "2.4.1\x1b[31m"}
        connection.hello = msgspec.structs.replace(connection.hello, versions=old, host="mini2")
        try:
            with pytest.raises(
                UserError, match=r"^mini2 has PyTorch 2\.4\.1[^\x1b]*, the server's"
            ) as e:
                connection.connect(10.0)
            assert e.value.hint.startswith("install PyTorch 2.")
        finally:
            connection.close()
