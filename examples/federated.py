"""Federated: each worker keeps digits of its own, other classes and another number of them.

make example NAME=federated     a server and three workers of this script, on this machine
python examples/federated.py    alone, with the digits of the first worker only

Only gradients leave a worker. A batch weighs as many samples as it has; batches have sizes in
proportion to what a worker holds, so that all are done at the same time.
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from paramserver import join
from workers.builtin.data import load

HOLDS = {1: (0, 1, 2, 3, 4), 2: (5, 6, 7), 3: (8, 9)}  # worker -> the digits that it has
EPOCHS, ROUNDS = 5, 50  # of an epoch

digits = load({"name": "digits"}, seed=42)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
criterion = nn.CrossEntropyLoss()

cluster = join()
mine = torch.isin(digits.train.labels, torch.tensor(HOLDS[cluster.worker_id])).nonzero()[:, 0]
size = len(mine) // ROUNDS
loader = DataLoader(Subset(digits.train, mine.tolist()), size, shuffle=True, drop_last=True)


def right(model: nn.Module) -> float:
    """The share of right answers among all digits, also those that this worker has never seen."""
    images, labels = digits.val.batch(torch.arange(len(digits.val)))
    with torch.no_grad():
        return int((model(images).argmax(1) == labels).sum()) / len(labels)


model, optimizer = cluster.attach(model, optimizer)
for _epoch in range(EPOCHS):
    for images, labels in cluster.own_batches(loader):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        cluster.tell(loss)
        loss.backward()
        optimizer.step()
cluster.leave()

print(
    f"federated: worker {cluster.worker_id} holds {len(mine)} pictures of the digits "
    f"{', '.join(map(str, HOLDS[cluster.worker_id]))}; {100 * right(model):.1f} % of all ten "
    f"digits are right after {cluster.step} steps"
)
