"""The names of a model's own, without those of wrappers inside it: `layers.0.weight` where a block
is compiled, or in a DataParallel, and its state_dict() says `layers.0._orig_mod.weight`.

So workers that wrap other parts of the same model have the same layout, and checkpoints too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

COMPILED, PARALLEL = "_orig_mod", "module"
"""Under which name a compiled module, and one in a DataParallel, is in its wrapper."""


def own_names(model: nn.Module) -> Callable[[str], str]:
    """A function from a name in the model's state_dict() to the model's own."""
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        parallel = isinstance(module, DataParallel | DistributedDataParallel)
        inside = PARALLEL if parallel else COMPILED
        if inside in module._modules:
            begin = f"{path}." if path else ""
            found.append((f"{begin}{inside}.", begin))
    found.sort(key=lambda pair: -len(pair[0]))  # the innermost first

    def own(name: str) -> str:
        for wrapped, begin in found:
            if name.startswith(wrapped):
                name = begin + name[len(wrapped) :]
        return name

    return own


def own_state(model: nn.Module) -> dict[str, Any]:
    """The model's state_dict() under its own names."""
    own = own_names(model)
    return {own(name): value for name, value in model.state_dict().items()}


def load_own(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what `own_state` gives, perhaps of a model with other wrappers."""
    own = own_names(model)
    here = {own(name): name for name in model.state_dict()}
    model.load_state_dict({here.get(name, name): value for name, value in state.items()})
