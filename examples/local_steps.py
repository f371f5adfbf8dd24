"""Local steps: each worker makes 16 optimizer steps of its own between two exchanges.

make example NAME=local_steps                  a server and two workers of this script, here
make example NAME=local_steps local_steps=1    the same with every step's gradients averaged

The loop is that of any other script. What differs is the traffic, which the server's table shows in
the end: a sixteenth of the bytes for the same samples.
"""

import time

import torch
from torch import nn

from paramserver import join
from workers.builtin.data import load

digits = load({"name": "digits"}, seed=42)
model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)
criterion = nn.CrossEntropyLoss()

cluster = join(alone={"num_epochs": 8})
model, optimizer = cluster.attach(model, optimizer)
samples, began = 0, time.perf_counter()
for images, labels in cluster.batches(digits.train, batch_size=32):
    optimizer.zero_grad()
    loss = criterion(model(images), labels)
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
    f"local_steps: {100 * right:.1f} % right after {cluster.step} steps, "
    f"{samples / seconds:,.0f} samples a second here"
)
