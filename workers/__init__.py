"""Workers: replicas of the run's model that compute gradients. See `workers.cluster`.

Its names are imported when they are used, because PyTorch takes seconds.
"""

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
