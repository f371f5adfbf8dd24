"""A replica: model, optimizer, schedule and step, and how an update of the log is applied to them.

Every replica runs the same code on the same bytes, so replicas of one kind stay equal bit by bit.
The layout lists what is exchanged: parameters that require a gradient, last layer first (the order
in which backward makes them), then buffers (`workers.replica.buffers`): running statistics of
normalisation layers, their counters, and the buffers of all other layers. Frozen parameters travel
in snapshots only, and buffers that are not in the model's state do not travel.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from paramserver.errors import PeerError, UserError
from paramserver.protocol import messages as wire
from paramserver.protocol.messages import PARTS_MAX
from paramserver.rounds.divergence import BUFFERS, WEIGHTS
from paramserver.rounds.ledger import check_counts, optimizer_steps
from paramserver.rounds.local_steps import OuterStep
from paramserver.tensors.bucket import Bucket, plan
from paramserver.tensors.codec import CODECS, codec_of
from paramserver.tensors.whole import unpacked

from .buffers import Buffers, sent
from .checks import (
    allow_step,
    check,
    check_options,
    misfit,
    refuse_step,
    schedule_state,
)
from .device_copies import Averages
from .groups import ByHand
from .names import load_own, own_names, own_state
from .outer import Outer
from .state import as_bytes, dtype_name
from .travel import HINTS, stateful, there_and_back

SCHEDULE_BY = ("step", "epoch")


class Replica:
    """A model with everything that turns an averaged gradient into its next step.

    `before_step(model)` runs on the averaged gradients of every update, before the optimizer, and
    `after_step(model)` after it and after the schedule; `clip_norm` clips the gradients' total
    norm. They run in every replica alike. If `after_step` belongs to an object with `state_dict`
    and `load_state_dict`, such as the method of an averaged model, that is a part of the replica's
    state. The schedule goes on with every update or, with `schedule_by` "epoch", where an update
    ends an epoch of samples; with `own_schedule` the loop may step one of its own instead.
    `buffers` gives by name the rule for a buffer that forwards write, where it is not the usual one
    (`workers.replica.buffers`). `bucket_mb` and `min_bucket_mb` are the sizes of its buckets
    (`paramserver.tensors.bucket.plan`), `codec` is that of the averages. `outer`: how the run's
    local steps are taken together, if it has any; `before_step` and `clip_norm` act on these steps
    then. Raises `UserError` for what cannot be equal on all machines.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        bucket_mb: float,
        min_bucket_mb: float | None = None,
        codec: str,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        before_step: Callable[[nn.Module], None] | None = None,
        after_step: Callable[[nn.Module], Any] | None = None,
        schedule_by: str = "step",
        own_schedule: bool = False,
        buffers: Mapping[str, str] | None = None,
        outer: OuterStep | None = None,
    ) -> None:
        if schedule_by not in SCHEDULE_BY:
            raise UserError(f"schedule_by is one of {', '.join(SCHEDULE_BY)}, not {schedule_by!r}")
        check(model, optimizer, scheduler, own=own_schedule)
        check_options(clip_norm, before_step, after_step)
        # The first optimizer step imports this, for a second or more: not in the middle of a round.
        importlib.import_module("torch._dynamo")
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.schedule_by = schedule_by
        self._schedule = None if scheduler is None else refuse_step(scheduler)
        self.clip_norm = clip_norm
        self.before_step = before_step
        self.after_step = after_step
        self._after = stateful(after_step)
        if any(self._after is module for module in model.modules()):
            self._after = None  # it is in the model's state
        self.by_hand = ByHand(optimizer)
        """What a loop changes of the optimizer's groups."""
        self.step = 0
        self.lineage = uuid.uuid4().hex  # not that of a run's state: only the origin's becomes that
        self.ledger: dict[str, Any] | None = None
        """The ledger as of this step, from the `Close`."""
        own = own_names(_plain(model))
        named = [(own(name), p) for name, p in _plain(model).named_parameters()]
        trained = [(name, p) for name, p in reversed(named) if p.requires_grad]
        self.params = sorted(
            trained, key=lambda item: (self._pair_of(item[1]), sent(item[1], "grad"))
        )
        self._in_order = [p for _, p in named if p.requires_grad]  # as a script clips them
        self._frozen = [(name, p) for name, p in named if not p.requires_grad]
        self._groups = len(optimizer.param_groups)
        self._outer_step = outer
        self._outer: Outer | None = None  # from the first round of local steps on
        self.local = False
        """The model is on its way from the anchor, by local steps of the open round."""
        self._strayed = False  # it is not at the anchor
        self._at_anchor: tuple[Any, list[dict[str, Any]]] | None = None  # schedule and groups there
        self._taken: list[Tensor] | None = None  # what the last steps came to, see `run_ahead`
        self._steps_ahead = 0  # made since then
        self.made = 0
        """Local steps on the way from the anchor."""
        there_and_back("model", own_state(_plain(model)))  # before anything else is made from it
        self.buffers = Buffers(_plain(model), buffers or {})
        self.layout = wire.Layout(
            tuple(
                wire.Tensor(name, tuple(t.shape), dtype_name(t.dtype), kind, as_what)
                for name, t, kind, as_what in (
                    *((name, p, "grad", sent(p, "grad")) for name, p in self.params),
                    *((b.name, b.tensor, b.kind, b.sent) for b in self.buffers.all),
                )
            ),
            self._count_pairs(),
        )
        self.plan = plan(self.layout, bucket_mb, min_bucket_mb)
        self._codec = CODECS[codec]
        self._make_room()
        self._begin_as_others_will()
        self._has_stepped = False  # the optimizer's state is complete after its first step

    def _pair_of(self, parameter: Tensor) -> int:
        """Of several pairs, the number of the one that steps this parameter."""
        return 0

    def _count_pairs(self) -> tuple[wire.Pair, ...]:
        """For the layout, where there are several."""
        return ()

    def _make_room(self) -> None:
        """Make the memory for the averages of the next update: one vector for each run of equal
        dtypes."""
        self._averages = Averages({p.device for _, p in self.params})
        self._outs: dict[int, Tensor] = {}
        self._flat: dict[str, Tensor] = {}  # the vectors of the parameters, by dtype
        self._first: dict[str, int] = {}  # where each begins in the plan's vector
        places: dict[int, tuple[Tensor, int, int]] = {}  # of each tensor: in which vector, where
        numbers = [b for b in self.plan.buckets if b.kind != "whole"]
        for as_what in dict.fromkeys((b.kind, b.sent) for b in numbers):
            buckets = [b for b in numbers if (b.kind, b.sent) == as_what]
            first, stop = buckets[0].start, buckets[-1].stop
            dtype, pinned = getattr(torch, as_what[1]), self._averages.pinned
            flat = torch.zeros(stop - first, dtype=dtype, pin_memory=pinned)
            if as_what[0] == "grad":
                self._flat[as_what[1]], self._first[as_what[1]] = flat, first
            self._outs |= {b.index: flat[b.start - first : b.stop - first] for b in buckets}
            for index in dict.fromkeys(i for b in buckets for i in b.tensors):
                start, end = self.plan.offsets[index : index + 2]
                places[index] = flat, start - first, end - first
        self._places = places
        self._views = {
            i: flat[start:end].view(self.layout.tensors[i].shape)
            for i, (flat, start, end) in places.items()
        }
        self._came: dict[int, Tensor] = {}  # bytes of the whole buffers
        self._present = [0] * len(self.layout.tensors)  # buckets with a gradient, by tensor

    def _average(self, index: int, device: torch.device) -> Tensor:
        """The memory for a tensor's average; on a device, a copy."""
        if index not in self._places:  # it is empty
            return torch.zeros(self.layout.tensors[index].shape, device=device)
        if device.type == "cpu":
            return self._views[index]
        flat, start, end = self._places[index]
        return self._averages.on(device, flat)[start:end].view(self._views[index].shape)

    def _begin_as_others_will(self) -> None:
        """Convert the state once as if it had been sent: a state that cannot travel raises
        `UserError` now, and numbers change as they do in other replicas (numpy's become
        Python's)."""
        own = self.state()
        state = {part: there_and_back(part, own[part]) for part in HINTS if part in own}
        try:
            self.load({**state, "ledger": None}, self.step, self.lineage)
        except ValueError as e:
            raise UserError(
                f"its own state cannot be loaded again: {e}",
                "what state_dict() gives must be what load_state_dict() takes",
            ) from None

    @property
    def least(self) -> int:
        """Samples that each batch must have: batch statistics need two."""
        found = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules())
        return 2 if found else 1

    @property
    def learning_rate(self) -> float | None:
        """Of the optimizer's first group; None where it has none that can be read at once."""
        rate = self.optimizer.param_groups[0].get("lr")
        return float(rate) if isinstance(rate, int | float) else None

    def check_unchanged(self) -> None:
        """Raise `UserError` where the trained parameters are not those of this replica any more."""
        for trained, parameters in ((True, self.params), (False, self._frozen)):
            for name, p in parameters:
                if p.requires_grad == trained:
                    continue
                if trained:
                    raise UserError(
                        f"{name} was frozen in the middle of the run",
                        "what is exchanged was fixed by attach(): to hold a parameter for some "
                        "steps, let before_step set its grad to None, or freeze it for a backward "
                        "and thaw it before step(); models that take turns, as in a GAN, are "
                        "attached by name: attach(generator=(G, opt_g), critic=(D, opt_d))",
                    )
                raise UserError(
                    f"{name} was thawed in the middle of the run",
                    "what is exchanged was fixed by attach(): to train others, begin a new run; "
                    "or attach with it thawed, and let before_step set its grad to None until then",
                )
        if len(self.optimizer.param_groups) != self._groups:
            raise UserError(
                "a parameter group was added to the optimizer after attach()",
                "add it before, on every worker",
            )

    # ------------------------------------------------------------------ the log

    def take(self, average: wire.Average, buffers: Sequence[Any]) -> None:
        """Decode the average of one bucket into the memory for it; apply nothing yet."""
        b = self.bucket(average.bucket)
        absent = set(average.absent)
        if b.kind == "whole":
            came = unpacked(self.plan, b, buffers, absent)
            if isinstance(came, str):
                raise PeerError(f"bucket {b.index}: {came}")
            self._came = came
            return
        codec = codec_of(b.kind, b.sent, self._codec)
        wrong = codec.fits(b.size, buffers)
        if wrong is not None:
            raise PeerError(f"bucket {b.index}: {wrong}")
        out = self._outs[b.index]
        self._averages.wait()
        values = codec.decode(buffers, average.scale, out)
        if values.data_ptr() != out.data_ptr():
            out.copy_(values)
        for index in b.tensors:
            self._present[index] += index not in absent

    def apply(self, close: wire.Close) -> None:
        """Apply the complete update: step the optimizer with the averaged gradients, or the anchor
        by what the workers' local steps came to; set the buffers; step the schedule."""
        self._averages.wait()
        for index in self._outs.keys() - set(close.buckets):
            self._outs[index].zero_()
        ahead = 0
        if close.local_steps > 1:
            ahead = self._step_outer(close)
        else:
            self._step_together()
        self._update_buffers()
        if close.local_steps == 1:
            self.by_hand.put({} if close.groups is msgspec.UNSET else close.groups)
            self._step_optimizer()
        if self._schedule is not None:
            for _ in range(self._due(close)):
                self._schedule()
        if ahead:
            self._mark()
            for _ in range(ahead):
                self._step_schedule()
        if self.after_step is not None:
            self._step_after(self.after_step)
        self.by_hand.note()
        self._stands_at(close)
        if not self._has_stepped and close.local_steps == 1:
            self._has_stepped = True
            there_and_back("optimizer", self.optimizer.state_dict())

    def _step_together(self) -> None:
        """Give each parameter the averaged gradient. Rounds of local steps are over: the workers'
        optimizers have parted, so all begin with fresh moments."""
        if self._outer is not None:
            self.come_back()
            self._outer = None
            self.optimizer.state.clear()
        self._give_averages(0, len(self.params))

    def _update_buffers(self) -> None:
        for index, buffer in enumerate(self.buffers.all, len(self.params)):
            if buffer.kind == "whole":
                values = self._came.get(index)
            else:
                values = self._average(index, buffer.held.device) if self._present[index] else None
            if values is not None:
                self.buffers.update(buffer, values)
        self.reset_statistics()

    def _stands_at(self, close: wire.Close) -> None:
        self.step, self.lineage, self.ledger = close.step, close.lineage, close.ledger
        self.forget_averages()

    def _give_averages(self, start: int, stop: int) -> None:
        """Make the averages the gradients of these parameters."""
        for index, (_, p) in enumerate(self.params[start:stop], start):
            if not self._present[index]:
                p.grad = None
                continue
            average = self._average(index, p.device)
            p.grad = average if average.dtype == p.dtype else average.to(p.dtype)

    def _step_outer(self, close: wire.Close) -> int:
        """Move the anchor. The model goes there, unless it runs ahead; returns the steps that it is
        ahead then."""
        outer, taken = self._anchored(), self._taken
        if taken is None:
            self._end_local()
        buckets = [self.plan.buckets[i] for i in close.buckets]
        # An absent tensor's zeros are no weights.
        whole = [
            b for b in buckets if b.kind == "grad" and all(self._present[i] for i in b.tensors)
        ]
        outer.step(whole, self._outs)
        for _, p in self.params:
            p.grad = None
        if taken is None:
            outer.write()
            return 0
        self._restore_schedule()
        outer.carry(taken)
        self._taken = None
        self.made = self._steps_ahead
        return self.made

    def _step_optimizer(self) -> None:
        step_optimizer(self, self._in_order)

    def _step_after(self, after_step: Callable[[nn.Module], Any]) -> None:
        after_step(self.model)
        self.buffers.hold()  # it may have written to some

    # ------------------------------------------------------------------ local steps

    @property
    def steps(self) -> int:
        """Optimizer steps in this state; `step` counts updates."""
        return optimizer_steps(self.ledger, self.step)

    def begin_local(self) -> Outer:
        """A round of local steps begins: at the anchor, unless the model runs ahead."""
        outer = self._anchored()
        if self._taken is None:
            self.come_back()
        self.local = True
        return outer

    def run_ahead(self) -> None:
        """The steps of this round are on their way. The next ones begin at once, from where these
        ended; what they do is carried over to the anchor when the update comes (`apply`)."""
        self._taken = [p.detach().clone() for _, p in self.params]
        self._steps_ahead = 0

    def step_locally(self) -> None:
        """One optimizer step with this worker's own gradient, which no other replica makes."""
        if self._at_anchor is None:
            self._mark()
        self._strayed = True
        self._steps_ahead += 1
        self.made += 1
        self._step_optimizer()
        self._step_schedule()

    def _step_schedule(self) -> None:
        if self._schedule is not None and self.schedule_by == "step" and self._left_of_schedule(1):
            self._schedule()

    def _mark(self) -> None:
        """Keep where the schedule stands at the anchor."""
        groups = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in self.optimizer.param_groups
        ]
        schedule = None if self.scheduler is None else schedule_state(self.scheduler)
        self._at_anchor = copy.deepcopy(schedule), groups

    def come_back(self) -> None:
        """Leave the local steps of a round: the model, and the schedule, stand at the anchor. The
        optimizer keeps its moments."""
        if self._end_local() and self._outer is not None:
            self._outer.write()

    def _end_local(self) -> bool:
        """No more local steps: all but the model's weights stands at the anchor. Do these not?"""
        self._restore_schedule()
        strayed, self._strayed, self.local = self._strayed, False, False
        self._taken, self.made = None, 0
        return strayed

    def _restore_schedule(self) -> None:
        if self._at_anchor is None:
            return
        schedule, groups = self._at_anchor
        self._at_anchor = None
        if self.scheduler is not None:
            self.scheduler.load_state_dict(schedule)
        for group, there in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(there)

    def _anchored(self) -> Outer:
        if self._outer is None:
            if self._outer_step is None:
                raise UserError(
                    "the server has a round of local steps, in a run without them",
                    "is it this program, in the same version?",
                )
            self._outer = self._new_outer(self._outer_step)
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # a schedule asks
        return self._outer

    def _new_outer(self, step: OuterStep) -> Outer:
        places = []
        for index, (_, p) in enumerate(self.params):
            as_what = self.layout.tensors[index].sent
            begin, end = (i - self._first[as_what] for i in self.plan.offsets[index : index + 2])
            places.append((p, as_what, begin, end))
        return Outer(step, self._flat, places, self._first)

    def _due(self, close: wire.Close) -> int:
        """How many steps the schedule makes with this update. A schedule with a last step stays
        there, because the number of a run's steps is not known in advance."""
        due = optimizer_steps(close.ledger, close.step) - self.steps
        if self.schedule_by == "epoch":
            due = epochs_in(close.ledger) - self.epoch
        return self._left_of_schedule(due)

    def _left_of_schedule(self, steps: int) -> int:
        return left_of_schedule(self.scheduler, steps)

    @property
    def epoch(self) -> int:
        """Number of whole epochs in this step."""
        return 0 if self.ledger is None else epochs_in(self.ledger)

    def forget_averages(self) -> None:
        """Drop the averages that were taken: they are applied, or their round is void."""
        self._present = [0] * len(self._present)
        self._came = {}
        self._averages.forget()

    def bucket(self, index: int) -> Bucket:
        if not 0 <= index < len(self.plan.buckets):
            raise PeerError(f"there is no bucket {index}")
        return self.plan.buckets[index]

    # ------------------------------------------------------------------ its state

    def state(self) -> dict[str, Any]:
        """Everything another process needs to be this replica. The tensors are not copies.

        After local steps these are anchor and outer momentum: whoever loads them begins with fresh
        moments of its own."""
        model = own_state(_plain(self.model))
        for name, buffer in self.buffers.by_name.items():
            if name in model:
                model[name] = buffer.held
        optimizer = self.optimizer.state_dict()
        schedule = None if self.scheduler is None else schedule_state(self.scheduler)
        state = {
            "model": model,
            "optimizer": optimizer,
            "scheduler": schedule,
            "ledger": self.ledger,
        }
        if self._after is not None:
            state["after_step"] = self._after.state_dict()
        if self._outer is None:
            return state
        optimizer["state"] = {}
        if self._strayed:
            for name, value in model.items():
                there = self._outer.in_place_of(value) if isinstance(value, Tensor) else None
                model[name] = value if there is None else there
        if self._at_anchor is not None:
            state["scheduler"], groups = self._at_anchor
            optimizer["param_groups"] = [
                {**group, **there}
                for group, there in zip(optimizer["param_groups"], groups, strict=True)
            ]
        state["outer"] = self._outer.state()
        return state

    def tensors(self) -> list[Tensor]:
        """The tensors of the model's state and of the optimizer's."""
        state: list[Any] = [*_plain(self.model).state_dict().values()]
        for values in self.optimizer.state.values():
            state += values.values()
        return [t for t in state if isinstance(t, Tensor)]

    def load(self, state: dict[str, Any], step: int, lineage: str) -> None:
        """Become the replica that `state` was taken from. Raises ValueError if it does not fit."""
        self.come_back()
        self.buffers.give_back()
        try:
            self._refuse_misfit(state)
            if state["ledger"] is not None:
                check_counts(state["ledger"])
            self.lineage = uuid.uuid4().hex  # a state that is loaded in part is no state of the log
            load_own(_plain(self.model), state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self._load_rest(state)
            self.by_hand.note()
            self.ledger = state["ledger"]
            self._outer = None
            outer = state.get("outer")
            if outer is not None and self._outer_step is not None:
                self._anchored().load(outer)
        except ValueError:
            raise
        except Exception as e:  # the user's own load_state_dict may raise anything
            raise ValueError(f"{type(e).__name__}: {e}") from None
        with torch.no_grad():
            self.buffers.hold()
        self.step, self.lineage = step, lineage
        self.forget_averages()

    def _load_rest(self, state: dict[str, Any]) -> None:
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self._after is not None and state.get("after_step") is not None:
            self._after.load_state_dict(state["after_step"])

    def give_back(self) -> None:
        """End the training: the user may step the schedule again."""
        if self.scheduler is not None:
            allow_step(self.scheduler)

    def _refuse_misfit(self, state: dict[str, Any]) -> None:
        """Raise ValueError where a tensor has another shape than here, or where optimizer or
        schedule would load what is not theirs."""
        for told in self.layout.tensors:
            given = state["model"].get(told.name)
            if isinstance(given, Tensor) and tuple(given.shape) != told.shape:
                raise ValueError(f"{told.name} has shape {tuple(given.shape)}, here {told.shape}")
        groups = state["optimizer"]["param_groups"]
        why = misfit(self.optimizer.state_dict()["param_groups"], groups, "optimizer")
        if why is None and self.scheduler is not None:
            own = schedule_state(self.scheduler)
            why = misfit(own, state["scheduler"], "scheduler", self.scheduler)
        if why is not None:
            raise ValueError(why)

    def change_learning_rate(self, before: float, now: float) -> None:
        """Go on with another learning rate than the loaded state's; a schedule goes on from it."""
        for group in self.optimizer.param_groups:
            group["lr"] = now if self.scheduler is None else group["lr"] * now / before
            if "initial_lr" in group:
                group["initial_lr"] *= now / before
        for scheduler in (self.scheduler, *getattr(self.scheduler, "_schedulers", ())):
            if rates := getattr(scheduler, "base_lrs", None):
                scheduler.base_lrs = [rate * now / before for rate in rates]
        self.by_hand.note()

    def kind(self) -> str:
        """Device, processor and version of torch, in words: replicas of equal kinds round alike, so
        their digests must be equal."""
        device = next((p.device for _, p in self.params), torch.device("cpu"))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return f"{name}, {processor}, torch {torch.__version__}"

    def recipe(self) -> str:
        """Optimizer, schedule, clipping and `before_step` in words, without values that a schedule
        may change. Replicas must have the same."""
        return recipe_of(self, [p for _, p in self.params], self.schedule_by)

    def reset_statistics(self) -> None:
        """Put the buffers of this step back: the round of a forward that changed them may have been
        void."""
        self.buffers.reset()

    def digest(self, parts: dict[str, str] | None = None) -> str:
        """SHA-256 over the bytes of what is exchanged, in the layout's order. `parts` gets those of
        weights and buffers, and of the values of the optimizer's groups by their names."""
        h = hashlib.sha256()
        if self._outer is not None:
            self._outer.digest(h)
        parameters = [] if self._outer is not None else [p for _, p in self.params]
        for tensor in parameters:
            h.update(as_bytes(tensor).numpy().data)
        weights, buffers = h.hexdigest(), hashlib.sha256()
        for held in [as_bytes(b.held).numpy().data for b in self.buffers.all]:
            h.update(held)
            buffers.update(held)
        if parts is not None:
            parts.update(self.by_hand.digests(PARTS_MAX - 2))
            parts.update({WEIGHTS: weights[:16], BUFFERS: buffers.hexdigest()[:16]})
        return h.hexdigest()


def recipe_of(holder: Any, parameters: list[Tensor], schedule_by: str) -> str:
    """Of a replica, or of one of its pairs, which trains these parameters."""
    groups = holder.optimizer.param_groups
    owned = {id(p) for p in parameters}
    sizes = "+".join(str(sum(id(p) in owned for p in g["params"])) for g in groups)
    schedule = "no schedule"
    if holder.scheduler is not None:
        schedule = f"{type(holder.scheduler).__name__} by {schedule_by}"
    clip = "no clipping" if holder.clip_norm is None else f"clip_norm {holder.clip_norm:g}"
    before = "no before_step" if holder.before_step is None else _named("before_step", holder)
    after = "" if holder.after_step is None else f", {_named('after_step', holder)}"
    kind = type(holder.optimizer).__name__
    return f"{kind} of {sizes} parameters, {schedule}, {clip}, {before}{after}"


def step_optimizer(holder: Any, parameters: Sequence[Tensor]) -> None:
    """Clip and step with the gradients that these parameters have, which a replica, or one of its
    pairs, trains."""
    if holder.clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, holder.clip_norm)
    if holder.before_step is not None:
        holder.before_step(holder.model)
    if parameters:
        holder.optimizer.step()


def left_of_schedule(scheduler: Any, steps: int) -> int:
    """So many steps, or those that the schedule has left."""
    total = getattr(scheduler, "total_steps", None)  # OneCycleLR climbs, then raises beyond it
    return steps if total is None else min(steps, total - 1 - scheduler.last_epoch)


def _named(hook: str, holder: Any) -> str:
    function = getattr(holder, hook)
    return f"{hook} {getattr(function, '__name__', str(type(function).__name__))}"


def _plain(model: nn.Module) -> nn.Module:
    """The module inside one of torch.compile, for its names."""
    plain: nn.Module = getattr(model, "_orig_mod", model)
    return plain


def epochs_in(ledger: dict[str, Any]) -> int:
    """Number of whole epochs in a ledger's state."""
    counted: int = ledger["done"] + ledger["partly"] + ledger["skipped"]
    return counted // ledger["samples"] if ledger["samples"] else 0
