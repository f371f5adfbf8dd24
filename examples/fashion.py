"""torchvision's ResNet-18, batch normalisation and all, on a slice of Fashion-MNIST.

make example NAME=fashion       a server and two workers of this script, on this machine
python examples/fashion.py      alone, without a server

The pictures come from Debian (apt install dataset-fashion-mnist), or from data/FashionMNIST/raw.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Subset
from torchvision.models import resnet18

from paramserver import join
from workers.builtin.data import FILES, load

EPOCHS, TRAIN, TEST = 3, 3072, 1000
FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/FashionMNIST/raw"))

found = [f for f in FOLDERS if all(any(f.glob(f"{name}*")) for name in FILES)]
if not found:
    sys.exit(
        "Fashion-MNIST is not here. On Debian: apt install dataset-fashion-mnist; elsewhere put\n"
        f"{', '.join(FILES)} (.gz or not) into {FOLDERS[1]}"
    )
fashion = load({"name": "FashionMNIST", "root": str(found[0])}, seed=42)
train_set = Subset(fashion.train, range(TRAIN))

model = resnet18(num_classes=10)
model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)  # grey, not coloured
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
criterion = nn.CrossEntropyLoss()


def accuracy() -> float:
    """The share of right answers among pictures that nobody trains on."""
    model.eval()
    right = 0
    with torch.no_grad():
        for indices in torch.arange(TEST).split(250):
            images, labels = fashion.val.batch(indices)
            right += int((model(images).argmax(1) == labels).sum())
    return right / TEST


cluster = join(alone={"num_epochs": EPOCHS})
model, optimizer = cluster.attach(model, optimizer, clip_norm=5.0)
for images, labels in cluster.batches(train_set, batch_size=32):
    optimizer.zero_grad()
    loss = criterion(model(images), labels)
    cluster.tell(loss)
    loss.backward()
    optimizer.step()
cluster.leave()

print(f"fashion: {100 * accuracy():.1f} % right after {cluster.step} steps on {TRAIN} pictures")
