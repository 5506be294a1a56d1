"""How close a file's outputs are to those of its model, as metrics of torchmetrics that others can take, too."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_compress.checks import check_flag

__all__ = ["Agreement", "LargestDifference"]


class Agreement(Metric):
    """Share of samples for which two models have the same answer.

    The answer of a sample is the index of its largest value along the axis of classes: the second of an output with
    four axes or more (images, whose pixels have an answer each), else the last. With a single value there, two answers
    agree when they differ by less than 1 % of the largest. Before any sample it is NaN.

    Example:
        >>> agreement = Agreement()
        >>> agreement(torch.tensor([[0.1, 0.9], [0.6, 0.4]]), torch.tensor([[0.2, 0.8], [0.3, 0.7]]))
        tensor(0.5000)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    same: Tensor
    num: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("same", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("num", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count samples.

        Args:
            preds: Outputs of one model.
            target: Those of the other, of the same shape.
        """
        axis = 1 if target.dim() >= 4 else -1
        if target.dim() and target.shape[axis] > 1:
            same = target.argmax(axis) == preds.argmax(axis)
        else:
            same = (target - preds).abs() <= 0.01 * target.abs().max()
        self.same += same.sum()
        self.num += same.numel()

    def compute(self) -> Tensor:
        """The share."""
        return self.same / self.num


class LargestDifference(Metric):
    """Largest difference between two models' outputs, or that as a share of the range of the second's values.

    NaN where one of them is NaN; 0 before any values.

    Args:
        relative: Whether it is divided by the range.

    Example:
        >>> difference = LargestDifference(relative=True)
        >>> difference(torch.tensor([0.0, 1.5]), torch.tensor([0.0, 2.0]))
        tensor(0.2500)
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    difference: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, relative: bool = False) -> None:
        check_flag("LargestDifference.relative", relative)
        super().__init__()
        self.relative = relative
        self.add_state("difference", torch.tensor(0.0), dist_reduce_fx="max")
        self.add_state("low", torch.tensor(math.inf), dist_reduce_fx="min")
        self.add_state("high", torch.tensor(-math.inf), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Look at values.

        Args:
            preds: Outputs of one model.
            target: Those of the other, of the same shape.
        """
        # maximum and minimum keep a NaN
        self.difference = torch.maximum(self.difference, (target - preds).abs().max())
        self.low = torch.minimum(self.low, target.min())
        self.high = torch.maximum(self.high, target.max())

    def compute(self) -> Tensor:
        """The difference, or the share; infinite for a difference where all values are one."""
        if not self.relative or self.difference == 0:
            return self.difference
        return self.difference / (self.high - self.low)
