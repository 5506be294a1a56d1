"""What the processes that train one model together exchange about its quantization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize

__all__ = ["Processes"]

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of the default group of ``torch.distributed``. All of them make the same calls, in the same order.

    Args:
        num: Number of processes; with one, nothing is exchanged.
        device: Where this process holds the tensors that it sends.

    Example:
        >>> alone = Processes()
        >>> alone.share("placement"), alone.total(torch.ones(2))
        ('placement', tensor([1., 1.]))
    """

    num: int = 1
    device: torch.device | str = "cpu"

    def share(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.num == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, on the CPU."""
        if self.num == 1:
            return tensor.cpu()
        summed = tensor.to(self.device, copy=True)
        torch.distributed.all_reduce(summed)
        return summed.cpu()

    def merge(self, activations: Sequence[ActivationFakeQuantize]) -> None:
        """Give the observers of every process what those of all have seen, in one exchange."""
        if self.num == 1 or not activations:
            return
        ours = torch.cat([a.state.to(self.device) for a in activations])
        gathered = [torch.empty_like(ours) for _ in range(self.num)]
        torch.distributed.all_gather(gathered, ours)
        states = torch.stack(gathered).split([len(a.state) for a in activations], dim=1)
        for activation, theirs in zip(activations, states, strict=True):
            activation.state = activation.observer.merge(theirs)
