"""What an installation and an sdist hold, and how extras are had."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_SOURCES = shutil.ignore_patterns(
    ".git", ".venv", ".setup.lock", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info",
    "runs", "data", "wandb", "build", "dist", "results",
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tarfile.TarFile]:
    """A copy of this clone, and the sdist that was made of it."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("sdist") / "clone"
    shutil.copytree(CLONE, copy, ignore=NOT_SOURCES, symlinks=True)
    build = "from setuptools import build_meta; build_meta.build_sdist('made')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    [made] = (copy / "made").iterdir()
    return copy, tarfile.open(made)


def test_an_sdist_has_all_that_its_tests_need(built: tuple[Path, tarfile.TarFile]) -> None:
    copy, archive = built
    there = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        str(path.relative_to(copy))
        for folder in ("paramserver", "workers", "tests", "benchmarks", "conf", "docs", "examples")
        for path in (copy / folder).rglob("*")
        if path.is_file() and "egg-info" not in str(path)
    }
    wanted |= {"Makefile", "README.md", "constraints.txt", ".ci/run", "paramserver/conf/model.yaml"}
    wanted |= {".github/workflows/ci.yml", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "setup.py"}
    assert len(wanted) > 200 and wanted - there == set()


def test_the_page_of_an_index_has_no_link_to_a_file(built: tuple[Path, tarfile.TarFile]) -> None:
    """The files are not there; their names stay."""
    archive = built[1]
    [name] = [n for n in archive.getnames() if n.count("/") == 1 and n.endswith("/PKG-INFO")]
    info = archive.extractfile(name)
    assert info is not None
    page = info.read().decode().partition("\n\n")[2]
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert page.startswith("# paramserver") and "docs/cluster.md" in page


def test_every_python_that_it_runs_on_is_a_classifier() -> None:
    versions = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: 3." in c]
    assert versions == ["3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


@pytest.mark.parametrize(
    ("extra", "told_in"),
    [
        ("ray", ("paramserver/launch/ray.py", "docs/cluster.md")),
        ("tensorboard", ("workers/observer/loggers.py",)),
    ],
)
def test_an_extra_is_told_as_it_can_be_had(extra: str, told_in: tuple[str, ...]) -> None:
    """This project is on no index, so `paramserver[ray]` cannot be installed from one."""
    [needed] = PROJECT["optional-dependencies"][extra]
    for file in told_in:
        assert f"pip install '{needed}'" in (CLONE / file).read_text(encoding="utf-8"), file


def test_the_tests_of_an_sdist_run_where_it_was_unpacked(
    built: tuple[Path, tarfile.TarFile], tmp_path: Path
) -> None:
    built[1].extractall(tmp_path, filter="data")
    [folder] = tmp_path.iterdir()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_config.py", "-k", "shipped"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
