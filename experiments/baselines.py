"""What our pruning and quantization are compared with: other people's code, or plain torch that shares none of ours.

Every method takes the same trained model, the same batches in the same order and the same number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torch_pruning as tp
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from experiments.tasks import Batches, Classifier, Data, Task, TaskData

__all__ = [
    "PEERS",
    "QUANTIZED_PEERS",
    "STRUCTURED_PEERS",
    "Budget",
    "accuracy",
    "dense",
    "fit",
    "fitted",
    "num_macs",
    "train",
    "weights_of",
]

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)
RAMP, EVERY = 0.5, 5  # the mask grows over this share of the steps, every so many


@dataclass(frozen=True)
class Budget:
    """What every method is given beside the trained model.

    Args:
        task: The task.
        data: Its data, or a cut of their training part.
        seed: Seed of the batches and of dropout.
        epochs: Epochs to train.
        rate: Learning rate at the start.
    """

    task: Task
    data: Data
    seed: int
    epochs: int
    rate: float


def weights_of(model: nn.Module) -> list[Tensor]:
    """The weights that are pruned and counted: of all linear and convolution layers, first and last included."""
    return [module.weight for module in model.modules() if isinstance(module, WEIGHTED)]


@torch.no_grad()
def num_macs(model: nn.Module, example: Tensor) -> int:
    """Multiplications of linear and convolution layers for one example."""
    was_training = model.training
    with FlopCounterMode(display=False) as counter:
        model.eval()(example)
    model.train(was_training)
    return counter.get_total_flops() // 2


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Per cent of the test part."""
    model.eval()
    parts = zip(data.x_test.split(1000), data.y_test.split(1000), strict=True)
    return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in parts) / len(data.y_test)


def train(
    model: nn.Module,
    budget: Budget,
    before: Callable[[int, int], None] = lambda step, num_steps: None,
    after: Callable[[], None] = lambda: None,
) -> nn.Module:
    """SGD with Nesterov momentum, cosine to zero per step.

    Args:
        model: Changed in place and given back.
        budget: What to train on, and for how long.
        before: Called before each step with its number and how many there are.
        after: Called after each step.
    """
    task, data = budget.task, budget.data
    torch.manual_seed(budget.seed)
    batches = Batches(data.x_train, data.y_train, task.batch_size, budget.seed, task.augment)
    num_steps, step = budget.epochs * len(batches), 0
    sgd = torch.optim.SGD(
        model.parameters(), budget.rate, momentum=0.9, nesterov=True, weight_decay=task.weight_decay, foreach=True
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, num_steps)
    model.train()
    for _ in range(budget.epochs):
        for x, y in batches:
            before(step, num_steps)
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()
            cosine.step()
            after()
            step += 1
    return model


def fit(model: nn.Module, budget: Budget, callbacks: list[pl.Callback]) -> nn.Module:
    """The same training by Lightning's Trainer, with callbacks and nothing that costs time."""
    return fitted(model, budget, callbacks).model


def fitted(model: nn.Module, budget: Budget, callbacks: list[pl.Callback]) -> Classifier:
    """The same, with the LightningModule around the model."""
    torch.manual_seed(budget.seed)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=budget.epochs, accelerator="cpu", callbacks=callbacks, **quiet)
    module = Classifier(model.train(), budget.rate, budget.task.weight_decay)
    trainer.fit(module, TaskData(budget.task, budget.data, budget.seed))
    return module


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


def one_shot(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """torch.nn.utils.prune at once, then training."""
    layers = [(module, "weight") for module in model.modules() if isinstance(module, WEIGHTED)]
    prune.global_unstructured(layers, prune.L1Unstructured, amount=sparsity)
    train(model, budget)
    for module, name in layers:
        prune.remove(module, name)
    return model


def model_pruning(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Lightning's ModelPruning with a callable amount: cubic over half of the epochs, at the end of each."""
    num_prunes = max(1, round(RAMP * budget.epochs))
    shares = [sparsity * (1 - (1 - i / num_prunes) ** 3) for i in range(num_prunes + 1)]

    def amount(epoch: int) -> float:  # of what is left, as ModelPruning compounds
        return 1 - (1 - shares[epoch + 1]) / (1 - shares[epoch]) if epoch < num_prunes else 0.0

    layers = [(module, "weight") for module in model.modules() if isinstance(module, WEIGHTED)]
    callback = ModelPruning(
        "l1_unstructured", layers, amount=amount, use_global_unstructured=True, use_lottery_ticket_hypothesis=False
    )
    return fit(model, budget, [callback])


def dense(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Nothing but the training."""
    return train(model, budget)


def _group_magnitude(model: nn.Module, budget: Budget, fewer: float, together: bool) -> nn.Module:
    example = budget.data.x_train[:1]
    macs = num_macs(model, example)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        model, example, importance, together, 0.95, max_pruning_ratio=0.95, iterative_steps=95, ignored_layers=[last]
    )
    for _ in range(95):
        pruner.step()
        if num_macs(model, example) * fewer <= macs:
            break
    return train(model, budget)


def group_magnitude(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """torch-pruning's GroupMagnitude, the same share of every layer, at once; then training."""
    return _group_magnitude(model, budget, fewer, together=False)


def global_group_magnitude(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """The same with all layers ranked together."""
    return _group_magnitude(model, budget, fewer, together=True)


class _TernaryWeight(nn.Module):
    """-s, 0 or s, cut at 0.7 times the mean magnitude, s the mean of what is larger; straight-through gradient."""

    def forward(self, weight: Tensor) -> Tensor:
        w = weight.detach()
        large = w.abs() > 0.7 * w.abs().mean()
        return w.sign() * large * w.abs()[large].mean() + (weight - w)


def _input8(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
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
        module.register_forward_pre_hook(_input8)
    return train(model, budget)


PEERS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {
    "global magnitude": global_magnitude,
    "uniform magnitude": uniform_magnitude,
    "one-shot (torch.nn.utils.prune)": one_shot,
    "Lightning ModelPruning": model_pruning,
    "random": random_pruning,
}

STRUCTURED_PEERS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {
    "torch-pruning GroupMagnitude": group_magnitude,
    "torch-pruning GroupMagnitude, global": global_group_magnitude,
}

QUANTIZED_PEERS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {"naive_ternary": naive_ternary}
