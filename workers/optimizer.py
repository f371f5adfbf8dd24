"""The optimizer that `Cluster.attach` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from paramserver.errors import UserError


class ClusterOptimizer(Optimizer):
    """The user's optimizer, whose `step` takes part in a round. Everything else is the user's.

    It is an `Optimizer`: schedules, among others, can be made for it.
    """

    def __init__(self, optimizer: Optimizer, step: Callable[[], None]) -> None:
        """`step` is the cluster's."""
        # Not Optimizer.__init__: groups and state are those of the wrapped one.
        self.wrapped = optimizer
        self._step_together = step
        self._released = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Send the remaining gradient, wait for the round's end, apply the update.

        Usually that is one update; none where the round was void, several where this worker was
        late. Raises `RunLost` when the server is gone, or has ended the run by an error.
        """
        if closure is not None:
            raise UserError("step(closure) cannot be done over a cluster", "call step()")
        self._step_together()

    def release(self) -> None:
        """The run is over for this worker: its state is the user's alone."""
        self._released = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients. They are always set to None: after a step `.grad` holds the run's
        average."""
        for group in self.wrapped.param_groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """That of the user's optimizer."""
        return self.wrapped.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """An error while the cluster trains: its state is the run's."""
        if self._released:
            self.wrapped.load_state_dict(state_dict)
            return
        raise UserError(
            "load_state_dict() on the optimizer of a run: its state is that of all workers",
            "load it before attach(), in the worker that gives the first weights",
        )

    def add_param_group(self, param_group: Any) -> None:
        """An error while the cluster trains: what is exchanged was fixed by `attach`."""
        if self._released:
            self.wrapped.add_param_group(param_group)
            return
        raise UserError(
            "a parameter group was added to the optimizer after attach()",
            "add it before, on every worker; to train parameters that were frozen, begin a new "
            "run: leave(), then join() and attach() again",
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What torch's GradScaler asks for first."""
        raise UserError(
            "a GradScaler has a scale of its own in every worker, and gradients leave scaled",
            "use autocast with bfloat16, which needs no scaler",
        )

    def __getattr__(self, name: str) -> Any:
        if "wrapped" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __repr__(self) -> str:
        return f"{self.wrapped!r}, by a cluster"
