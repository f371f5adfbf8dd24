"""A small GPT that writes Python's manual letter by letter, its first and last weights tied.

make example NAME=gpt           a server and two workers of this script, on this machine
python examples/gpt.py          alone, without a server

The text is that of Python's own help(), which comes with every Python.
"""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paramserver import join

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 3
WINDOWS = 12_000  # that a run trains on

text = "\n".join(topics[name] for name in sorted(topics))
letters = sorted(set(text))
number = {letter: i for i, letter in enumerate(letters)}
codes = torch.tensor([number[letter] for letter in text])


class Windows(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """CONTEXT letters, and for each of them the one that follows."""

    def __len__(self) -> int:
        return WINDOWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * (len(codes) - CONTEXT - 1) // WINDOWS
        return codes[start : start + CONTEXT], codes[start + 1 : start + CONTEXT + 1]


class Block(nn.Module):
    """Attention to what came before, then a small network; each adds to what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, WIDTH]
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(b, t, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(letters), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, len(letters), bias=False)
        self.head.weight = self.letters.weight  # tied
        for table in (self.letters, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time] -> [batch, time, letters]
        places = self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(self.letters(x) + places)))

    @torch.no_grad()
    def write(self, beginning: str, length: int) -> str:
        """Go on from `beginning`, drawing letter after letter."""
        line = [number[letter] for letter in beginning]
        for _ in range(length):
            logits = self(torch.tensor([line[-CONTEXT:]]))[0, -1]
            line.append(int(torch.multinomial(F.softmax(logits / 0.7, 0), 1)))
        return "".join(letters[code] for code in line)


model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))

cluster = join(alone={"num_epochs": 1})
model, optimizer = cluster.attach(model, optimizer, scheduler=scheduler, clip_norm=1.0)
loss = torch.zeros(())
for x, y in cluster.batches(Windows(), batch_size=16):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    cluster.tell(loss)
    loss.backward()
    optimizer.step()
cluster.leave()

size = sum(p.numel() for p in model.parameters())
print(f"gpt: {size:,} parameters, loss {loss.item():.2f} a letter after {cluster.step} steps. So:")
torch.manual_seed(1)
print(model.write("The ", 300))
