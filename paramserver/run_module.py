"""`python -P run_module.py MODULE words ...`: run a module of this installation as a program.

As `python -m MODULE` does, but the current folder and PYTHONPATH may hold another `paramserver` or
`workers`: the two packages are loaded from where this file is, and `-P` keeps the current folder
out of the places for imports. Our programs start each other so (`paramserver.program.command`).
"""

import importlib.util
import runpy
import sys
from pathlib import Path


def pin(name: str, folder: Path) -> None:
    """Load the package of this name from this folder, unless it is there already."""
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    root = Path(__file__).resolve().parents[1]
    for package in ("paramserver", "workers"):
        pin(package, root / package)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
