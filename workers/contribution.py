"""What a worker contributes to the round that it works on."""

from __future__ import annotations

from torch import Tensor

from .batches import Sizes


class Contribution:
    """This worker's part in a round, as its pushes tell it. Between two rounds it is that of the
    last one."""

    def __init__(self, greetings: int) -> None:
        self.round = 0
        """The round whose lease is being worked on."""
        self.greetings = greetings
        """Those by which it is known: rounds of an earlier greeting go on without this worker."""
        self.samples, self.weight, self.steps = 0, 0, 0
        """In it so far; weight: in the average."""
        self.unread: tuple[int, ...] = ()
        """Places in the lease of samples that could not be read."""
        self.sent = 0
        """Buckets of its gradient."""
        self.taken: tuple[int, ...] = ()
        """Buckets that are in the update,"""
        self.share = 1.0
        """with this share of their weight."""
        self.made_at = 0
        """The step of the log at which the gradient was made."""
        self._losses: list[tuple[int, float | Tensor]] = []  # told so far: weight, mean

    def begin(self, batch: Sizes, unread: tuple[int, ...] = ()) -> None:
        """It is the gradient of this batch."""
        self.sent, self.steps = 0, 1
        self.samples, self.weight = batch
        self.unread = unread
        self._losses.clear()

    def begin_local(self) -> None:
        """It is what local steps come to, of which none is made yet."""
        self.begin(Sizes(0, 0))
        self.steps = 0

    def add(self, batch: Sizes) -> None:
        """A local step with this batch was made."""
        self.samples += batch.samples
        self.weight += batch.weight
        self.steps += 1

    def tell(self, weight: int, loss: float | Tensor, again: bool) -> None:
        """The mean loss over a part of the batch; `again`: in place of the last one."""
        if again:
            self._losses.pop()
        self._losses.append((weight, loss.detach() if isinstance(loss, Tensor) else loss))

    def mean_loss(self) -> float | None:
        """The mean over what losses were told of. It waits for the device, once."""
        if not self._losses:
            return None
        if len(self._losses) == 1:
            return float(self._losses[0][1])
        total: float | Tensor = 0.0
        for weight, loss in self._losses:
            total = total + weight * loss
        return float(total) / sum(weight for weight, _ in self._losses)

    def over(self) -> None:
        """All of it has left."""
        self._losses.clear()
