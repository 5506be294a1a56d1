"""What a user writes by hand in plain torch: magnitudes, random masks, ternary weights. Shares no code with ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from experiments.training import WEIGHTED, Budget, train, weights_of

RAMP, EVERY = 0.5, 5  # the mask grows over this share of the steps, every so many
ALPHA, TEMPERATURE = 0.9, 4.0  # those of our recipe


def _stepwise(
    model: nn.Module, budget: Budget, sparsity: float, score: Callable[[Tensor], Tensor], together: bool
) -> nn.Module:
    """A mask that grows along a cubic; what is dropped stays dropped."""
    weights = weights_of(model)
    masks = [torch.ones_like(w) for w in weights]

    @torch.no_grad()
    def before(step: int, num_steps: int) -> None:
        last = math.ceil(RAMP * num_steps)
        if step > last or (step % EVERY and step != last):
            return
        share = sparsity * (1 - (1 - step / last) ** 3)
        scores = [score(w).masked_fill(mask == 0, -1) for w, mask in zip(weights, masks, strict=True)]
        sizes = [w.numel() for w in weights]
        groups = [torch.cat([s.flatten() for s in scores])] if together else [s.flatten() for s in scores]
        flat = []
        for group in groups:
            keep = torch.zeros_like(group)
            keep[group.topk(len(group) - math.ceil(share * len(group))).indices] = 1
            flat.append(keep)
        for mask, keep in zip(masks, torch.cat(flat).split(sizes), strict=True):
            mask.copy_(keep.view_as(mask))
        after()

    @torch.no_grad()
    def after() -> None:
        for w, mask in zip(weights, masks, strict=True):
            w.mul_(mask)

    return train(model, budget, before, after)


def global_magnitude(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Step-wise magnitude pruning, all layers ranked together (Zhu & Gupta 2017, arXiv:1710.01878)."""
    return _stepwise(model, budget, sparsity, torch.abs, together=True)


def uniform_magnitude(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """The same with the same share of each layer."""
    return _stepwise(model, budget, sparsity, torch.abs, together=False)


def random_pruning(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """The same with random scores: the floor."""
    generator = torch.Generator().manual_seed(budget.seed)
    fixed = {id(w): torch.rand(w.shape, generator=generator) for w in weights_of(model)}
    return _stepwise(model, budget, sparsity, lambda w: fixed[id(w)], together=False)


class _TernaryWeight(nn.Module):
    """-s, 0 or s, cut at 0.7 times the mean magnitude, s the mean of what is larger; straight-through gradient."""

    def forward(self, weight: Tensor) -> Tensor:
        w = weight.detach()
        large = w.abs() > 0.7 * w.abs().mean()
        return w.sign() * large * w.abs()[large].mean() + (weight - w)


def input8(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The input rounded to 8 bits of the range of this very batch."""
    x = args[0].detach()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-12)
    zero_point = (-low / scale).round()
    rounded = ((x / scale + zero_point).round().clamp(0, 255) - zero_point) * scale
    return (rounded + (args[0] - x),)


def naive_ternary(model: nn.Module, budget: Budget, target: float) -> nn.Module:
    """Ternary weights of all layers, refitted every step, one scale a tensor (TWN, Li 2016, arXiv:1605.04711)."""
    for module in [module for module in model.modules() if isinstance(module, WEIGHTED)]:
        parametrize.register_parametrization(module, "weight", _TernaryWeight())
        module.register_forward_pre_hook(input8)
    return train(model, budget)


def taught_magnitude(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Global magnitude, taught by the model as it was (Hinton 2015, arXiv:1503.02531): what is due to the teacher."""
    teacher, task = copy.deepcopy(model).eval(), budget.task
    seen: list[Tensor] = []

    def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[:] = [args[0].detach()]

    def loss(outputs: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            soft = F.log_softmax(teacher(seen[0]) / TEMPERATURE, 1)
        apart = F.kl_div(F.log_softmax(outputs / TEMPERATURE, 1), soft, reduction="batchmean", log_target=True)
        return (1 - ALPHA) * task.loss(outputs, y) + ALPHA * TEMPERATURE**2 * apart

    hook = model.register_forward_pre_hook(remember)
    trained = global_magnitude(model, replace(budget, task=replace(task, loss=loss)), sparsity)
    hook.remove()
    return trained
