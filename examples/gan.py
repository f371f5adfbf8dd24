"""A GAN: a generator learns to draw points on a ring from a critic, each with its own optimizer.

make example NAME=gan           a server and two workers of this script, on this machine
python examples/gan.py          alone, without a server
"""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paramserver import join

POINTS, EPOCHS, BATCH = 12_800, 8, 32  # of each worker
NOISE, RADIUS, WIDTH = 4, 2.0, 0.05

draw = torch.Generator().manual_seed(7)
angles = 2 * torch.pi * torch.rand(POINTS, generator=draw)
radii = RADIUS + WIDTH * torch.randn(POINTS, generator=draw)
ring = TensorDataset(torch.stack([radii * angles.cos(), radii * angles.sin()], dim=1))

G = nn.Sequential(nn.Linear(NOISE, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
D = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU())
D.append(nn.Linear(64, 1))
opt_g = torch.optim.Adam(G.parameters(), lr=1e-3, betas=(0.5, 0.9))
opt_d = torch.optim.Adam(D.parameters(), lr=1e-3, betas=(0.5, 0.9))


def taken_for(answers: Tensor, real: bool) -> Tensor:
    """The loss of answers that should take all points for real ones, or for drawn ones."""
    wanted = torch.full_like(answers, float(real))
    return nn.functional.binary_cross_entropy_with_logits(answers, wanted)


cluster = join(alone={"num_epochs": EPOCHS})
(G, opt_g), (D, opt_d) = cluster.attach(generator=(G, opt_g), critic=(D, opt_d))
for (points,) in cluster.batches(ring, batch_size=BATCH):
    drawn = G(torch.randn(len(points), NOISE))

    opt_d.zero_grad()
    loss = taken_for(D(points), True) + taken_for(D(drawn.detach()), False)
    cluster.tell(loss)
    loss.backward()
    opt_d.step()

    opt_g.zero_grad()
    taken_for(D(drawn), True).backward()
    opt_g.step()
cluster.leave()

with torch.no_grad():
    drawn = G(torch.randn(1000, NOISE, generator=draw))
near = (drawn.norm(dim=1) - RADIUS).abs() < 0.3
eighths = ((torch.atan2(drawn[:, 1], drawn[:, 0]) / torch.pi + 1) * 4).long().clamp(max=7)
found = len(set(eighths[near].tolist()))
print(
    f"gan: {100 * float(near.float().mean()):.1f} % of 1,000 points lie on the ring, in {found} of "
    f"its 8 parts, after {cluster.step} steps"
)
