"""Weights that are sharded across processes as DTensors.

To select among them, counts, a sample and a few candidates are exchanged; one layer at a time is whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_compress.pruning.threshold import Processes

__all__ = ["is_sharded", "mean_over_processes", "processes_for", "processes_of", "sharded_as", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")  # importing the class takes half as long as importing torch


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; a DTensor is gathered, which all its processes do together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, laid out like another."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def processes_for(tensors: Iterable[Tensor]) -> Processes:
    """All processes if one of the tensors is sharded; else this one alone."""
    return processes_of() if any(map(is_sharded, tensors)) else Processes()


def processes_of(group: dist.ProcessGroup | None = None) -> Processes:
    """The processes of a group of torch.distributed, for :func:`~.threshold.keep_highest`.

    Each process then gives its rows of every tensor, and gets the same rows of what one process would have got for all.

    Args:
        group: The group, such as ``mesh.get_group()`` of a DTensor's mesh; None for all processes.

    Example:
        >>> from torch import tensor
        >>> from lightning_compress.pruning.threshold import keep_highest
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> keep_highest([tensor([1.0, 4.0]), tensor([2.0, 3.0])], 0.5, processes_of())
        [tensor([False,  True]), tensor([False,  True])]
        >>> dist.destroy_process_group()
    """

    def gather(array: np.ndarray) -> list[np.ndarray]:
        arrays: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(arrays, array, group)
        return arrays

    return Processes(dist.get_rank(group), gather, dist.get_world_size(group))


def mean_over_processes(device: torch.device, value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on the device on which they talk to each other."""
    value = value.to(device)
    dist.all_reduce(value)
    return value / dist.get_world_size()
