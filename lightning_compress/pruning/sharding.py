"""Selection over weights that are sharded across processes: counts, a sample and a few candidates are exchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from lightning_compress.pruning.selection import Ranks

__all__ = ["ranks_of"]


def ranks_of(group: Any = None) -> Ranks:
    """The processes of a group of torch.distributed, for :func:`~.selection.keep_highest`.

    Each rank then gives its rows of every tensor and gets the same rows of what one process would have got for all.

    Args:
        group: The group, such as ``mesh.get_group()`` of a DTensor's mesh; None for all processes.

    Example:
        >>> keep_highest([p.to_local().abs() for p in parameters], 0.9, ranks_of())  # doctest: +SKIP
    """

    def gather(array: np.ndarray) -> list[np.ndarray]:
        arrays: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(arrays, array, group)
        return arrays

    return Ranks(dist.get_rank(group), gather)
