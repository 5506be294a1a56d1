"""The training that every method shares: the same batches, steps and rates, and what is counted and measured."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.tasks import ACCURACY, Batches, Classifier, Data, Metric, Task, TaskData, optimizer_of
from lightning_compress.files import replacing

__all__ = [
    "WEIGHTED",
    "Budget",
    "accuracy",
    "dense",
    "fit",
    "fitted",
    "kept",
    "measured",
    "num_macs",
    "quiet",
    "train",
    "weights_of",
]

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


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

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the training."""
        task = self.task
        num = len(self.data.y_train) // task.batch_size
        return self.epochs * (num if task.most_batches is None else min(num, task.most_batches))


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
def measured(call: Callable[[Tensor], Tensor], metric: Metric, data: Data, batch: int = 100) -> float:
    """The metric of whatever answers, over the test part."""
    parts = zip(data.x_test.split(batch), data.y_test.split(batch), strict=True)
    return sum(float(metric.sum_of(call(x), y)) for x, y in parts) / len(data.y_test)


def accuracy(model: nn.Module, data: Data) -> float:
    """Per cent of the test part."""
    return measured(model.eval(), ACCURACY, data)


def train(
    model: nn.Module,
    budget: Budget,
    before: Callable[[int, int], None] = lambda step, num_steps: None,
    after: Callable[[], None] = lambda: None,
    wrap: Callable[[torch.optim.Optimizer, int], Any] = lambda optimizer, num_steps: optimizer,
) -> nn.Module:
    """The task's optimizer, cosine to zero per step.

    Args:
        model: Changed in place and given back.
        budget: What to train on, and for how long.
        before: Called before each step with its number and how many there are.
        after: Called after each step.
        wrap: Gives what steps in the optimizer's place, of it and how many steps there are.
    """
    task, data = budget.task, budget.data
    torch.manual_seed(budget.seed)
    batches = Batches(data.x_train, data.y_train, task.batch_size, budget.seed, task.augment, task.most_batches)
    num_steps, step = budget.epochs * len(batches), 0
    base = optimizer_of(model.parameters(), budget.rate, task.weight_decay, task.optimizer)
    optimizer = wrap(base, num_steps)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(base, num_steps)
    model.train()
    for _ in range(budget.epochs):
        for x, y in batches:
            before(step, num_steps)
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            optimizer.step()
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
    task = budget.task
    module = Classifier(model.train(), budget.rate, task.weight_decay, task.loss, task.optimizer)
    trainer.fit(module, TaskData(task, budget.data, budget.seed))
    return module


def dense(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Nothing but the training."""
    return train(model, budget)


def kept(path: Path, build: Callable[[], nn.Module], make: Callable[[nn.Module], Any]) -> nn.Module:
    """A model as ``make`` trains it, from its file where there is one."""
    model = build()
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    make(model)
    with replacing(path) as temporary:
        torch.save(model.state_dict(), temporary)
    return model


def quiet() -> None:
    """One thread, no denormals, no chatter."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
