"""The next character of Shakespeare, by a transformer.

Needs ``tinyshakespeare.txt`` (Karpathy 2015) in the folder of the data: 1,115,394 characters of 65 kinds. The last
tenth of them is the test part. AdamW trains it, as it does transformers.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.tasks import Data, Metric, Task

__all__ = ["BITS", "TASKS", "Transformer", "bits", "characters", "nats"]

SYMBOLS, LENGTH = 65, 64
_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class Attention(nn.Module):
    """Four heads, each character looks at those before it (Vaswani 2017, arXiv:1706.03762)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(seen.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and two layers, each behind a norm and around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Two blocks of width 96: 241,985 parameters.

    Args:
        width: Multiplies the 96.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        size = 4 * max(1, round(24 * width))
        self.symbol = nn.Embedding(SYMBOLS, size)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, size))
        self.blocks = nn.Sequential(Block(size), Block(size))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """Characters, batch by time; logits, batch by time by kinds."""
        return self.head(self.norm(self.blocks(self.symbol(x) + self.place)))


def nats(outputs: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of all characters."""
    return F.cross_entropy(outputs.flatten(0, 1), y.flatten())


def bits(outputs: Tensor, y: Tensor) -> Tensor:
    """Bits a character of each example, summed."""
    return nats(outputs, y) * len(y) / math.log(2)


BITS = Metric("bits per character", bits, higher=False, least=0.01)


def characters(folder: Path) -> Data:
    """Windows of 64 characters that do not overlap, and the characters that follow each of theirs."""
    path = folder / "tinyshakespeare.txt"
    if not path.is_file():
        what = "input.txt of github.com/karpathy/char-rnn, data/tinyshakespeare"
        raise FileNotFoundError(f"{path} is missing: {what}. Put it there, or name its folder with --data.")
    text = path.read_bytes()
    if hashlib.sha256(text).hexdigest() != _SHA256:
        raise ValueError(f"{path} is not tinyshakespeare: sha256 is {hashlib.sha256(text).hexdigest()}.")
    kinds = sorted(set(text))
    known = torch.tensor([kinds.index(character) for character in text])
    parts = known[: len(known) * 9 // 10], known[len(known) * 9 // 10 :]
    train, test = (part.unfold(0, LENGTH + 1, LENGTH) for part in parts)
    return Data(*(part.contiguous() for part in (train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])))


TASKS = {
    "shakespeare": Task(
        "shakespeare",
        Transformer,
        characters,
        *(None, 16, 0.01, 12, 3e-3, 4, 1e-3, (0.8, 0.9)),
        metric=BITS,
        loss=nats,
        most_batches=200,
        optimizer="adamw",
    )
}
