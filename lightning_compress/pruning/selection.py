"""Exactly the lowest scores, over one tensor or over many."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["keep_highest", "num_dropped"]


def num_dropped(sparsity: float, num_scores: int) -> int:
    """How many of the scores a sparsity drops: rounded up, so that the sparsity is reached."""
    return min(num_scores, math.ceil(round(sparsity * num_scores, 6)))


def keep_highest(scores: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Bool tensors in the shapes of ``scores``, False for exactly the lowest share of all of them together.

    Equal scores are dropped in order of tensor and index, so that the count is exact.

    Args:
        scores: Any number of float tensors.
        sparsity: Share to drop, 0..1.

    Raises:
        ValueError: If a score is NaN.

    Example:
        >>> keep_highest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 0.25)
        [tensor([ True, False]), tensor([True, True])]
    """
    flat = torch.cat([s.detach().flatten().float().cpu() for s in scores])
    if bool(flat.isnan().any()):
        raise ValueError("A pruning score is NaN: the weights have diverged. Lower the learning rate.")
    k = num_dropped(sparsity, flat.numel())
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    if k:
        threshold = float(np.partition(flat.numpy(), k - 1)[k - 1])
        torch.ge(flat, threshold, out=keep)
        ties = (flat == threshold).nonzero().flatten()
        keep[ties[: k - int((~keep).sum())]] = False
    parts = keep.split([s.numel() for s in scores])
    return [part.view(s.shape).to(s.device) for part, s in zip(parts, scores, strict=True)]
