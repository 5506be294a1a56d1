"""The same text by a recurrent net whose embedding is the output layer's weight as well (arXiv:1608.05859)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from experiments import shakespeare

__all__ = ["GRU", "TASKS"]


class GRU(nn.Module):
    """Gated recurrent units (Cho 2014, arXiv:1406.1078), 128 of them: 107,457 parameters.

    It is made of linear layers, which every tool knows; few know torch's GRU.

    Args:
        width: Multiplies the 128.
    """

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        size = max(1, round(128 * width))
        self.symbol = nn.Embedding(shakespeare.SYMBOLS, size)
        self.input, self.state = nn.Linear(size, 3 * size), nn.Linear(size, 3 * size)
        self.head = nn.Linear(size, shakespeare.SYMBOLS)
        nn.init.normal_(self.symbol.weight, std=size**-0.5)
        self.head.weight = self.symbol.weight

    def forward(self, x: Tensor) -> Tensor:
        """Characters, batch by time; logits, batch by time by kinds."""
        given = self.input(self.symbol(x))
        state = torch.zeros_like(given[:, 0, : self.state.in_features])
        states = []
        for now in given.unbind(1):
            reset, update, new = now.chunk(3, 1)
            of_reset, of_update, of_new = self.state(state).chunk(3, 1)
            new = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
            state = new + torch.sigmoid(update + of_update) * (state - new)
            states.append(state)
        return self.head(torch.stack(states, 1))


TASKS = {"gru": replace(shakespeare.TASKS["shakespeare"], name="gru", build=GRU)}
