"""A parameter server for PyTorch over ZeroMQ.

Training is a log of updates: the server decides what enters the log, and every replica that applies
it holds the same model. This package is the server and what both sides share; the workers and the
observer live in `workers`.

A script takes part by `from paramserver import join`. That is `workers.join`, but it is found also
where the script's own folder holds another `workers`. PyTorch is not imported before it is used.
"""

import _signal  # type: ignore[import-not-found]  # `signal` itself takes time to be imported
import sys

if sys.argv[:1] == ["-m"]:  # `python -m` imports this for a program of ours, or of a user's
    _program = getattr(sys, "orig_argv", [__name__])[-len(sys.argv)]
    if _program.partition(".")[0] == __name__:
        # Until `paramserver.program` handles it, Ctrl-C ends this process without a traceback.
        if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
            _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
        from paramserver.unfit import refuse

        refuse(_program)

from pathlib import Path
from typing import Any

from paramserver.errors import RunLost, UserError

__version__ = "0.1.0"
__all__ = ["Cluster", "RunLost", "UserError", "join", "trials"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(workers_package(), name)


def workers_package() -> Any:
    """The package `workers` beside this one. Under its own name if that stands for it here, else,
    because the name is taken by another, as `paramserver.workers`."""
    import importlib.util

    from paramserver.run_module import pin

    folder = Path(__file__).resolve().parents[1] / "workers"
    if (taken := sys.modules.get("workers")) is not None:
        file = getattr(taken, "__file__", None)
    else:
        found = importlib.util.find_spec("workers")
        file = None if found is None else found.origin
    if file is not None and Path(file).resolve() == folder / "__init__.py":
        return importlib.import_module("workers")
    pin(own := f"{__name__}.workers", folder)
    return sys.modules[own]
