"""What every runner gives back, and how a file of one batch size takes batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_compress.forward import Inputs, with_batch

__all__ = ["Kernels", "in_batches", "pieces_of"]


class Kernels(NamedTuple):
    """How a runtime computes the operations that read a stored weight (convolutions, linear layers).

    Args:
        integer: How many of them run in integer kernels.
        total: How many there are.
    """

    integer: int
    total: int

    @property
    def share(self) -> float:
        """Share of integer kernels; 0 without any operation."""
        return self.integer / self.total if self.total else 0.0


def pieces_of(inputs: Inputs, size: int) -> Iterator[Inputs]:
    """Inputs cut into batches of one size, the last one filled up by repetition."""
    num = inputs.batch_size
    for begin in range(0, num, size):

        def cut(x: object, begin: int = begin) -> Any:
            return x[begin : begin + size] if isinstance(x, Tensor) and x.dim() and x.shape[0] == num else x

        yield with_batch(Inputs(*tree_map(cut, tuple(inputs))), size)


def in_batches(run: Callable[[Inputs], Sequence[Tensor]], inputs: Inputs, size: int) -> list[Tensor]:
    """Run inputs through something that takes one batch size: cut in pieces, the last one filled up by repetition."""
    num = inputs.batch_size
    outputs = [run(piece) for piece in pieces_of(inputs, size)]

    def join(parts: tuple[Tensor, ...]) -> Tensor:
        has_batch = parts[0].dim() and parts[0].shape[0] == size
        return torch.cat(parts)[:num] if has_batch else parts[-1]

    return [join(parts) for parts in zip(*outputs, strict=True)]
