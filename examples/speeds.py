"""Machines of unlike speed: four workers, of which one is four times as fast as the slowest two.

make example NAME=speeds                  a server and four workers of this script, on this machine
make example NAME=speeds shares=equal     the same, each with as many samples as the others

That one machine plays four of unlike speed, a worker here sleeps for each sample after it has
computed its gradient. The display shows how many samples each of them takes in a step; the global
batch, and so the result, stays the same.
"""

import time

import torch
from torch import nn

from paramserver import join
from workers.builtin.data import load

SPEEDS = {1: 4.0, 2: 2.0, 3: 1.0, 4: 1.0}
SECONDS = 0.004  # for a sample, at speed 1

digits = load({"name": "digits"}, seed=42)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
criterion = nn.CrossEntropyLoss()

cluster = join(alone={"num_epochs": 4})
model, optimizer = cluster.attach(model, optimizer)
samples, began = 0, time.perf_counter()
for images, labels in cluster.batches(digits.train, batch_size=32):
    optimizer.zero_grad()
    loss = criterion(model(images), labels)
    time.sleep(len(labels) * SECONDS / SPEEDS.get(cluster.worker_id, 1.0))
    cluster.tell(loss)
    loss.backward()
    optimizer.step()
    samples += len(labels)
seconds = time.perf_counter() - began
cluster.leave()

with torch.no_grad():
    images, labels = digits.val.batch(torch.arange(len(digits.val)))
    right = int((model(images).argmax(1) == labels).sum()) / len(labels)
print(
    f"speeds: worker {cluster.worker_id} took {samples} samples, {samples / seconds:.0f} a second; "
    f"{100 * right:.1f} % right after {cluster.step} steps"
)
