"""Workers: replicas of the run's model that compute gradients. See `workers.cluster`.

Its names are imported when they are used, because PyTorch takes seconds.
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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster import Cluster, RunLost, UserError, join, trials

__all__ = ["Cluster", "RunLost", "UserError", "join", "trials"]


def __getattr__(name: str) -> Any:
    if name in __all__ or name == "cluster":
        cluster = import_module(f"{__name__}.cluster")
        return cluster if name == "cluster" else getattr(cluster, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
