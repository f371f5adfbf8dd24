"""A search over three learning rates in one script: a run of the server for each.

make example NAME=search        a server and two workers of this script, on this machine
python examples/search.py       alone, without a server
"""

import torch
from torch import nn

from paramserver import trials
from workers.builtin.data import load

RATES = (0.3, 0.03, 0.003)  # examples/search.yaml has as many runs

digits = load({"name": "digits"}, seed=42)
train_set, test_set = digits.train, digits.val
images, labels = test_set.batch(torch.arange(len(test_set)))
criterion = nn.CrossEntropyLoss()
found = {}

for cluster in trials(len(RATES), alone={"num_epochs": 2}):
    rate = RATES[cluster.trial - 1]  # the same in every worker, also in one that comes later
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model, optimizer = cluster.attach(model, optimizer)
    for inputs, targets in cluster.batches(train_set, batch_size=32):
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        cluster.tell(loss)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found[rate] = float((model(images).argmax(1) == labels).float().mean())
    print(f"run {cluster.trial}: learning rate {rate:g}, {100 * found[rate]:.1f} % right")

best = max(found, key=found.__getitem__)
print(f"search: {100 * found[best]:.1f} % right with a learning rate of {best:g}")
