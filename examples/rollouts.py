"""Reinforcement learning: PPO balances a pole on a cart, with rollouts of unlike size.

make example NAME=rollouts       a server and two workers of this script, on this machine
python examples/rollouts.py      alone, without a server

Each worker plays games of its own; the longer they last, the more steps are in its rollout. So each
rollout weighs what it holds. The game is in this file.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from paramserver import join

ROLLOUTS, PASSES = 30, 4  # of each worker; over each of its rollouts
GAMES, STEPS = 8, 200  # at a time; after so many a game is won
DISCOUNT, CLIP = 0.98, 0.2


class Pole:
    """Poles on carts, one for each of many games: push each cart left or right, so that its pole
    stays up. (Barto, Sutton and Anderson, 1983)"""

    def __init__(self, games: int) -> None:
        self.state = torch.rand(games, 4) * 0.1 - 0.05  # place, speed, angle, its speed

    def push(self, right: Tensor) -> Tensor:
        """A fiftieth of a second with these pushes, bool [games]; which poles still stand?"""
        x, v, angle, w = self.state.unbind(1)
        force = torch.where(right, 10.0, -10.0)
        sin, cos = angle.sin(), angle.cos()
        push = (force + 0.05 * w.square() * sin) / 1.1
        turn = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos.square() / 1.1))
        gain = push - 0.05 * turn * cos / 1.1
        self.state = torch.stack((x + 0.02 * v, v + 0.02 * gain, angle + 0.02 * w, w + 0.02 * turn))
        self.state = self.state.T
        return (self.state[:, 0].abs() < 2.4) & (self.state[:, 2].abs() < 0.21)


class Player(nn.Module):
    """The logits of the two pushes, and the value of a state."""

    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
        self.value = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, states: Tensor) -> tuple[Categorical, Tensor]:
        return Categorical(logits=self.acts(states)), self.value(states).squeeze(-1)


Rollout = dict[str, Tensor]  # states [n, 4]; actions, log_probs, advantages, returns [n] each


@torch.no_grad()
def play(player: Player) -> Rollout:
    """Games until all are over; the n steps of all of them are one rollout."""
    game, standing = Pole(GAMES), torch.ones(GAMES, dtype=torch.bool)
    seen = []
    while standing.any() and len(seen) < STEPS:
        policy, value = player(game.state)
        action = policy.sample()
        seen.append((standing, game.state, action, policy.log_prob(action), value))
        standing = standing & game.push(action == 1)
    alive, states, actions, log_probs, values = map(torch.stack, zip(*seen, strict=True))
    returns = torch.zeros(len(seen) + 1, GAMES)
    for step in reversed(range(len(seen))):  # a reward of 1 for each step of a pole that stands
        returns[step] = alive[step] * (1 + DISCOUNT * returns[step + 1])
    advantages = (returns[:-1] - values)[alive]
    return {
        "states": states[alive],
        "actions": actions[alive],
        "log_probs": log_probs[alive],
        "advantages": (advantages - advantages.mean()) / (advantages.std() + 1e-6),
        "returns": returns[:-1][alive],
    }


def rollouts(player: Player) -> Iterator[Rollout]:
    """Play, and learn from each rollout several times."""
    for _ in range(ROLLOUTS):
        rollout = play(player)
        for _ in range(PASSES):
            yield rollout


def loss_of(player: Player, rollout: Rollout) -> Tensor:
    """PPO's, a mean over the steps (Schulman and others, 2017)."""
    policy, value = player(rollout["states"])
    ratio = (policy.log_prob(rollout["actions"]) - rollout["log_probs"]).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * rollout["advantages"], clipped * rollout["advantages"])
    off = nn.functional.smooth_l1_loss(value, rollout["returns"], reduction="none")
    return (0.1 * off - gain - 0.01 * policy.entropy()).mean()


torch.set_num_threads(1)  # more would wait for each other: the networks are small
player = Player()
optimizer = torch.optim.Adam(player.parameters(), lr=0.005)

cluster = join()
player, optimizer = cluster.attach(player, optimizer, clip_norm=0.5)
sizes = []
for rollout in cluster.own_batches(rollouts(player), samples=lambda r: len(r["states"])):
    optimizer.zero_grad()
    loss = loss_of(player, rollout)
    cluster.tell(loss)
    loss.backward()
    optimizer.step()
    sizes.append(len(rollout["states"]))
cluster.leave()

length = sum(len(play(player)["states"]) for _ in range(4)) / (4 * GAMES)
print(
    f"rollouts: worker {cluster.worker_id} had rollouts of {min(sizes)} to {max(sizes)} steps; "
    f"after {cluster.step} updates a pole stands for {length:.1f} of {STEPS} steps"
)
