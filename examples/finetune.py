"""Fine-tuning: a frozen network that knows the digits 0 to 4 learns 5 to 9 by small adapters.

make example NAME=finetune       a server and two workers of this script, on this machine
python examples/finetune.py      alone, without a server

Worker 1 has the pretrained weights, and says so: the others take them over. Only the gradients of
what is trained travel, here a twentieth of the parameters.
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paramserver import join
from workers.builtin.data import Samples, load

EPOCHS, RANK = 6, 4

digits = load({"name": "digits"}, seed=42)


def only(samples: Samples, first: int) -> TensorDataset:
    """The pictures of five digits, from `first` on, which is class 0."""
    images, labels = samples.batch(torch.arange(len(samples)))
    mine = (labels >= first) & (labels < first + 5)
    return TensorDataset(images[mine].flatten(1), labels[mine] - first)


class Adapter(nn.Module):
    """A layer that stays as it is, and a correction of low rank, which is 0 in the beginning."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def pretrain(model: nn.Module) -> None:
    """Learn 0 to 4, by oneself. (A script of yours loads a file instead.)"""
    images, labels = only(digits.train, 0).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    for chosen in torch.randperm(4 * len(images)).remainder(len(images)).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    """The share of right answers among pictures of 5 to 9 that nobody trains on."""
    images, labels = only(digits.val, 5).tensors
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


cluster = join(alone={"num_epochs": EPOCHS})
body = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
model = nn.Sequential(*body, nn.Linear(128, 5))
if cluster.worker_id == 1:
    pretrain(model)

model.requires_grad_(False)  # before attach, which fixes what is exchanged
model = nn.Sequential(Adapter(body[0]), body[1], Adapter(body[2]), body[3], nn.Linear(128, 5))
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=0.003)

model, optimizer = cluster.attach(model, optimizer, first=cluster.worker_id == 1)
for images, labels in cluster.batches(only(digits.train, 5), batch_size=32):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    cluster.tell(loss)
    loss.backward()
    optimizer.step()
cluster.leave()

count = sum(p.numel() for p in trained)
print(
    f"finetune: {100 * accuracy(model):.1f} % right after {cluster.step} steps with {count:,} of "
    f"{sum(p.numel() for p in model.parameters()):,} parameters"
)
