"""A CNN with dropout on 4,000 real digits, its learning rate halved every few epochs.

make example NAME=digits        a server and two workers of this script, on this machine
python examples/digits.py       alone, without a server
"""

import torch
from torch import nn

from paramserver import join
from workers.builtin.data import load

EPOCHS = 12

digits = load({"name": "digits"}, seed=42)
train_set, test_set = digits.train, digits.val

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(16, 32, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Linear(32 * 7 * 7, 128),
    nn.ReLU(),
    nn.Dropout(0.3),  # each worker draws masks of its own
    nn.Linear(128, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
criterion = nn.CrossEntropyLoss()


def accuracy() -> float:
    """The share of right answers among the 1,000 digits that nobody trains on."""
    model.eval()
    images, labels = test_set.batch(torch.arange(len(test_set)))
    with torch.no_grad():
        right = int((model(images).argmax(1) == labels).sum())
    model.train()
    return right / len(test_set)


cluster = join(alone={"num_epochs": EPOCHS})
model, optimizer = cluster.attach(model, optimizer, scheduler=scheduler, schedule_by="epoch")
for images, labels in cluster.batches(train_set, batch_size=32):
    optimizer.zero_grad()
    loss = criterion(model(images), labels)
    cluster.tell(loss)
    loss.backward()
    optimizer.step()
cluster.leave()

rate = optimizer.param_groups[0]["lr"]
print(f"digits: {100 * accuracy():.1f} % right after {cluster.step} steps, learning rate {rate:g}")
