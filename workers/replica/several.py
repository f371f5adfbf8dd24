"""Several models, or optimizers of one model, that take turns: a GAN, an actor and its critic.

A **pair** is a model with its optimizer, and has what belongs to its step: a schedule, clipping,
hooks. Each update of the log is a step of one pair, with the parameters of its optimizer; the
buffers of all models belong to every update. `Several` is the replica that holds all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paramserver.errors import UserError
from paramserver.protocol import messages as wire

from .checks import (
    allow_step,
    check_optimizer,
    check_options,
    misfit,
    refuse_step,
    schedule_state,
)
from .groups import ByHand
from .replica import (
    SCHEDULE_BY,
    Replica,
    epochs_in,
    left_of_schedule,
    recipe_of,
    step_optimizer,
)
from .travel import stateful, there_and_back


class Pair:
    """A model with its optimizer; the arguments are as for `Replica`."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        before_step: Callable[[nn.Module], None] | None = None,
        after_step: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.name, self.model, self.optimizer = name, model, optimizer
        self.scheduler, self.clip_norm = scheduler, clip_norm
        self.before_step, self.after_step = before_step, after_step
        self.after = stateful(after_step)
        if any(self.after is module for module in model.modules()):
            self.after = None  # it is in the model's state
        self.by_hand = ByHand(optimizer)
        self.start = self.stop = 0
        """Which of the replica's parameters are its own."""
        self.local = False
        """It makes no local steps, see `Replica`."""
        self._schedule: Callable[[], None] | None = None
        self._groups = len(optimizer.param_groups)
        self._has_stepped = False

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def begin(self, *, own_schedule: bool) -> None:
        """Take the schedule from the loop; raises `UserError` for what a replica cannot step."""
        check_optimizer(self.optimizer, self.scheduler, own=own_schedule)
        check_options(self.clip_norm, self.before_step, self.after_step)
        if self.scheduler is not None:
            self._schedule = refuse_step(self.scheduler)

    def check_unchanged(self) -> None:
        if len(self.optimizer.param_groups) != self._groups:
            raise UserError(
                f"a parameter group was added to the optimizer of {self.name!r} after attach()",
                "add it before, on every worker",
            )

    def step(self, groups: wire.Groups, *, schedule: bool) -> None:
        """Step with the averaged gradients, with these values that a loop has set by hand."""
        self.by_hand.put(groups)
        step_optimizer(self, self.parameters)
        if schedule:
            self._step_schedule(1)
        if self.after_step is not None:
            self.after_step(self.model)
        self.by_hand.note()
        self.forget_gradient()
        if not self._has_stepped:
            self._has_stepped = True
            there_and_back("optimizer", self.optimizer.state_dict())

    def forget_gradient(self) -> None:
        for p in self.parameters:
            p.grad = None

    def ends_epochs(self, count: int) -> None:
        """Step a schedule by epoch, between two steps. What a loop has set for the next one
        stays."""
        if count and self._schedule is not None:
            changed = self.by_hand.changed()
            self.by_hand.put({})
            self._step_schedule(count)
            self.by_hand.note()
            self.by_hand.set(changed)

    def _step_schedule(self, count: int) -> None:
        if self._schedule is not None:
            for _ in range(left_of_schedule(self.scheduler, count)):
                self._schedule()


class Optimizers(Optimizer):
    """The optimizers of all pairs as one, for their state."""

    def __init__(self, pairs: Iterable[Pair]) -> None:
        # Not Optimizer.__init__: groups and state are those of the pairs.
        self._all = {pair.name: pair.optimizer for pair in pairs}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for one in self._all.values() for group in one.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        return {p: s for one in self._all.values() for p, s in one.state.items()}

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError("each pair steps its own")

    def state_dict(self) -> dict[str, Any]:
        states = {name: one.state_dict() for name, one in self._all.items()}
        groups = [group for state in states.values() for group in state["param_groups"]]
        others = {
            name: {k: v for k, v in state.items() if k != "param_groups"}
            for name, state in states.items()
        }
        return {"param_groups": groups, "pairs": others}

    def load_state_dict(self, state_dict: Any) -> None:
        groups = list(state_dict["param_groups"])
        for name, one in self._all.items():
            count = len(one.param_groups)
            its, groups = groups[:count], groups[count:]
            one.load_state_dict({**state_dict["pairs"][name], "param_groups": its})


class _ByHand(ByHand):
    """What loops change of the groups of all pairs, for the comparison of replicas."""

    def __init__(self, pairs: list[Pair]) -> None:
        self._pairs = pairs

    def note(self) -> None:
        for pair in self._pairs:
            pair.by_hand.note()

    def digests(self, most: int) -> dict[str, str]:
        share = most // len(self._pairs)
        return {
            f"{pair.name}.{name}": digest
            for pair in self._pairs
            for name, digest in pair.by_hand.digests(share).items()
        }


class Several(Replica):
    """The replica of several pairs, by name. `schedule_by` and `buffers` are for all of them."""

    def __init__(
        self,
        pairs: Iterable[Pair],
        *,
        bucket_mb: float,
        min_bucket_mb: float | None = None,
        codec: str,
        schedule_by: str = "step",
        own_schedule: bool = False,
        buffers: Mapping[str, str] | None = None,
    ) -> None:
        if schedule_by not in SCHEDULE_BY:
            raise UserError(f"schedule_by is one of {', '.join(SCHEDULE_BY)}, not {schedule_by!r}")
        self.pairs = {pair.name: pair for pair in pairs}
        self._numbers = _numbers(self.pairs.values())
        super().__init__(
            _together(self.pairs.values()),
            Optimizers(self.pairs.values()),
            bucket_mb=bucket_mb,
            min_bucket_mb=min_bucket_mb,
            codec=codec,
            schedule_by=schedule_by,
            own_schedule=own_schedule,
            buffers=buffers,
        )
        self.by_hand = _ByHand(list(self.pairs.values()))
        self.by_hand.note()
        for pair in self.pairs.values():
            pair.begin(own_schedule=own_schedule)

    def _pair_of(self, parameter: Tensor) -> int:
        return self._numbers[id(parameter)]

    def _count_pairs(self) -> tuple[wire.Pair, ...]:
        found, start = [], 0
        for number, pair in enumerate(self.pairs.values()):
            count = sum(self._numbers[id(p)] == number for _, p in self.params)
            if not count:
                raise UserError(f"no parameter of {pair.name!r} requires a gradient")
            pair.start, pair.stop = start, start + count
            found.append((pair.name, count))
            start += count
        return tuple(found)

    def check_unchanged(self) -> None:
        """Raise `UserError` where parameters that were frozen are trained now. A loop may switch
        those that are trained off for a while, around the backward of another pair, say."""
        for name, p in self._frozen:
            if p.requires_grad:
                raise UserError(
                    f"{name} was thawed in the middle of the run",
                    "what is exchanged was fixed by attach(): to train it, begin a new run",
                )
        for pair in self.pairs.values():
            pair.check_unchanged()

    def apply(self, close: wire.Close) -> None:
        """Apply the complete update: the step of one pair. Schedules by epoch go on before the
        first step of the next epoch, when all leases of the one before are settled."""
        self._averages.wait()
        for index in self._outs.keys() - set(close.buckets):
            self._outs[index].zero_()
        if self.schedule_by == "epoch":
            for one in self.pairs.values():
                one.ends_epochs(epochs_in(close.ledger) - self.epoch)
        pair = None if close.pair is msgspec.UNSET else self.pairs.get(close.pair)
        if pair is not None:
            self._give_averages(pair.start, pair.stop)
        self._update_buffers()
        if pair is not None:
            groups = {} if close.groups is msgspec.UNSET else close.groups
            pair.step(groups, schedule=self.schedule_by == "step")
            if pair.after_step is not None:
                self.buffers.hold()  # it may have written to some
        self._stands_at(close)

    # ------------------------------------------------------------------ its state

    def state(self) -> dict[str, Any]:
        state, pairs = super().state(), self.pairs.values()
        state["scheduler"] = {
            p.name: schedule_state(p.scheduler) for p in pairs if p.scheduler is not None
        }
        state["after_step"] = {p.name: p.after.state_dict() for p in pairs if p.after is not None}
        return state

    def _load_rest(self, state: dict[str, Any]) -> None:
        for name, pair in self.pairs.items():
            if pair.scheduler is not None:
                pair.scheduler.load_state_dict(state["scheduler"][name])
            if pair.after is not None:
                pair.after.load_state_dict(state["after_step"][name])

    def _refuse_misfit(self, state: dict[str, Any]) -> None:
        super()._refuse_misfit(state)
        for name, pair in self.pairs.items():
            if pair.scheduler is not None:
                own, where = schedule_state(pair.scheduler), f"scheduler of {name}"
                why = misfit(own, state["scheduler"].get(name), where, pair.scheduler)
                if why is not None:
                    raise ValueError(why)

    def give_back(self) -> None:
        for pair in self.pairs.values():
            if pair.scheduler is not None:
                allow_step(pair.scheduler)

    def recipe(self) -> str:
        return "; ".join(
            f"{name}: {recipe_of(pair, pair.parameters, self.schedule_by)}"
            for name, pair in self.pairs.items()
        )


def _numbers(pairs: Iterable[Pair]) -> dict[int, int]:
    """The pair of each parameter, by their ids and numbers."""
    found: dict[int, int] = {}
    names = list[str]()
    for number, pair in enumerate(pairs):
        names.append(pair.name)
        for p in pair.parameters:
            if found.setdefault(id(p), number) != number and p.requires_grad:
                raise UserError(
                    f"the optimizers of {names[found[id(p)]]!r} and {pair.name!r} have the same "
                    f"parameter, of shape {tuple(p.shape)}",
                    "give each parameter to one of them",
                )
    return found


def _together(pairs: Iterable[Pair]) -> nn.Module:
    """One module of all models, by the names of their pairs; one that several have, once."""
    together = nn.Module()
    seen: set[int] = set()
    pairs = list(pairs)
    for pair in pairs:
        if id(pair.model) not in seen:
            seen.add(id(pair.model))
            try:
                together.add_module(pair.name, pair.model)
            except KeyError:
                raise UserError(
                    f"{pair.name!r} is no name for a pair", "nn.Module has it already"
                ) from None
    here = {id(p) for p in together.parameters()}
    for pair in pairs:
        if any(p.requires_grad and id(p) not in here for p in pair.parameters):
            raise UserError(
                f"the optimizer of {pair.name!r} has a parameter that is in none of the models",
                "put it into a module, and that into the pair",
            )
    return together
