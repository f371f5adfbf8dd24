"""What runs on every change: the same commands in `.ci/run` and in the workflow of GitHub."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

CLONE = Path(__file__).resolve().parent.parent
WORKFLOW = CLONE / ".github/workflows/ci.yml"


def job() -> dict[str, Any]:
    """The one job of the workflow."""
    [found] = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    assert isinstance(found, dict)
    return found


def test_the_workflow_runs_the_commands_of_ci() -> None:
    here = re.findall(r"^(make (?!setup).+)$", (CLONE / ".ci/run").read_text(), re.MULTILINE)
    assert [step["run"] for step in job()["steps"] if "run" in step] == here
    assert {"make check", "make test", "make test-long"} <= set(here)


def test_the_workflow_runs_on_both_systems_and_the_outer_pythons() -> None:
    matrix = job()["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]
    project = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project["requires-python"])
    assert found, project["requires-python"]
    assert matrix["python"] == [f"3.{found[1]}", f"3.{int(found[2]) - 1}"]


def test_the_workflow_uses_what_the_matrix_names() -> None:
    assert job()["runs-on"] == "${{ matrix.os }}"
    with_python = [
        step["with"] for step in job()["steps"] if "setup-python" in step.get("uses", "")
    ]
    assert with_python == [{"python-version": "${{ matrix.python }}"}]


def test_the_workflow_starts_with_pushes_and_pull_requests() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert workflow[True] == ["push", "pull_request"]  # YAML 1.1 reads `on` as true
