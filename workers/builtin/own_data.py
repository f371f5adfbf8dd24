"""A data set of your own, named by its import path in the settings.

    dataset:
      name: mypackage.data:Houses     # a subclass of torch.utils.data.Dataset
      path: houses.csv                # whatever else it takes

A sample is (input, target), or several inputs and then the target. The validation set is the first
that applies of: the same class with the arguments of `dataset.val` over the others (`{split:
test}`); with `train=False`, where it takes `train` as torchvision's do; a share of the samples
(`dataset.val_share`, a tenth) drawn by the seed.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch.utils.data import Dataset, Subset

from paramserver.errors import UserError
from paramserver.tensors import factories
from paramserver.tensors.order import permutation

from . import dataset_setting, registry
from .own_code import NOTHING, OwnCode


class OwnData:
    """Its training set and its validation set, each made when it is first used."""

    def __init__(self, dataset: dict[str, Any], seed: int, code: OwnCode | None = NOTHING) -> None:
        arguments = dict(dataset)
        self.name: str = arguments.pop("name")
        self._seed = seed
        is_a = "torch.utils.data.Dataset"
        self._class = registry.find("dataset.name", self.name, {}, Dataset, is_a, code)
        self._arguments, self._val, self._share = dataset_setting.parts(self._class, arguments)

    @cached_property
    def train(self) -> Any:
        """The training set, in the same order on every machine."""
        if self._val is not None:
            return self._make(self._arguments)
        whole, held_out = self._whole
        return Subset(whole, self._order[held_out:])

    @cached_property
    def val(self) -> Any:
        """The validation set, for the observer."""
        if self._val is not None:
            return self._make({**self._arguments, **self._val})
        whole, held_out = self._whole
        return Subset(whole, self._order[:held_out])

    @cached_property
    def _whole(self) -> tuple[Any, int]:
        """All samples, and how many of them are held out."""
        whole = self._make(self._arguments)
        if len(whole) < 2:
            raise UserError(f"{self.name} has {len(whole)} samples: there is nothing to hold out")
        return whole, max(1, int(self._share * len(whole)))

    @cached_property
    def _order(self) -> list[int]:
        purpose = f"split, seed {self._seed}"
        order: list[int] = permutation(len(self._whole[0]), purpose).tolist()
        return order

    def _make(self, arguments: dict[str, Any]) -> Any:
        made = factories.make("dataset", self.name, self._class, arguments)
        try:
            empty = len(made) < 1
        except TypeError:
            raise UserError(
                f"{self.name} has no length",
                "a stream of samples takes a loop of your own, with cluster.own_batches()",
            ) from None
        if empty:
            raise UserError(f"{self.name} has no samples, made from {arguments or 'no arguments'}")
        return made
