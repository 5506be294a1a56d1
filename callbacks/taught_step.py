"""A training step to whose loss a teacher adds its part; the module is the same before and after the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_compress.distillation import (
    Call,
    DistillationLoss,
    choose_module,
    main_tensor,
    record_calls,
    visible_modules,
)

from .teacher import Teacher

__all__ = ["TaughtStep", "check_extendable", "extend_step", "restore_step"]


def check_extendable(pl_module: pl.LightningModule, by_hand: bool) -> None:
    """Refuse a model whose training step cannot be extended.

    Args:
        pl_module: The model.
        by_hand: Whether its training step asks for the loss itself.

    Raises:
        ValueError: If it optimizes by hand and does not ask, or is compiled as a whole.
    """
    if not by_hand and not pl_module.automatic_optimization:
        raise ValueError(
            f"KnowledgeDistillation cannot extend the loss of {type(pl_module).__name__}: it optimizes by hand "
            "(automatic_optimization=False), so Lightning never sees the loss. Accepted is "
            "KnowledgeDistillation(by_hand=True), and in training_step before manual_backward: "
            "loss = callback.loss(loss, outputs, *inputs), with the outputs of the distilled module and the arguments "
            "it was called with."
        )
    if pl_module._compiler_ctx is not None:  # noqa: SLF001  # the only mark of a compiled module
        raise ValueError(
            "KnowledgeDistillation sees no calls inside a LightningModule that is compiled as a whole. Compile a "
            "part instead: self.net = torch.compile(self.net)."
        )


class _ExtendedStep:
    """A training step with something around it; a copy of its module has the step without."""

    def __init__(
        self, step: Callable[..., Any], extension: Callable[..., Any], replaced: Callable[..., Any] | None
    ) -> None:
        self.__wrapped__ = step
        self.extension = extension
        self.replaced = replaced

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self.extension(self.__wrapped__, *args, **kwargs)

    # Copies are made inside a step (averages, saved models). They must neither share the teacher nor ask it.
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        return _itself, (self.__wrapped__,)


def _itself(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


def extend_step(pl_module: pl.LightningModule, extension: Callable[..., Any]) -> None:
    """Let ``extension(training_step, batch, batch_idx, ...)`` stand in for a module's training step."""
    replaced = pl_module.__dict__.get("training_step")
    pl_module.__dict__["training_step"] = _ExtendedStep(pl_module.training_step, extension, replaced)


def restore_step(pl_module: pl.LightningModule) -> None:
    """Give a module the training step that it had before; nothing happens if it was not extended."""
    step = pl_module.__dict__.get("training_step")
    if isinstance(step, _ExtendedStep):
        del pl_module.__dict__["training_step"]
        # A user may have put a step of their own into the instance, too.
        if step.replaced is not None:
            pl_module.__dict__["training_step"] = step.replaced


class TaughtStep:
    """A training step with a teacher: records the student's calls, asks the teacher the same, and adds to the loss.

    Args:
        pl_module: The student.
        teacher: Its teacher.
        loss: What compares the two.
        outputs: Name of the distilled module; empty to choose one at the first step.
    """

    def __init__(self, pl_module: pl.LightningModule, teacher: Teacher, loss: DistillationLoss, outputs: str) -> None:
        self.pl_module = pl_module
        self.teacher = teacher
        self.loss = loss
        self.chosen: str | None = outputs or None
        self.warned: set[str] = set()
        self.num_taught = 0

    def __call__(self, step: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        """What a training step returns, with the teacher's part in the loss."""
        modules = visible_modules(self.pl_module)
        watched = {name: module for name, module in modules.items() if self.chosen in (None, name)}
        features = {name: modules[name] for name in self.loss.features if name in modules}
        with record_calls(watched, features) as calls:
            returned = step(*args, **kwargs)
        if returned is None:
            return None
        if self.chosen is None:
            self.chosen = choose_module(self.pl_module, calls)
        calls = [call for call in calls if call.name == self.chosen]
        if not isinstance(returned, Mapping):
            return self.add(returned, calls)
        if "loss" not in returned:
            return returned
        return {**returned, "loss": self.add(returned["loss"], calls)}

    def add(self, task_loss: Tensor, calls: Sequence[Call]) -> Tensor:
        """The task loss with the mean of the calls' distillation losses."""
        shares = [share for call in calls if (share := self.share(call)) is not None]
        if not shares:
            self._warn(f"a step called {self.chosen or 'the model'} without gradients; it uses the task loss only.")
            return task_loss
        share = torch.stack(shares).mean()
        self.pl_module.log("compress/distillation_loss", share.detach(), on_step=True, on_epoch=False, batch_size=1)
        if not torch.isfinite(share):
            self._warn("the distillation loss is NaN or infinite; such steps use the task loss only.")
            return task_loss
        self.num_taught += 1
        return (1 - self.loss.alpha) * task_loss + share

    def share(self, call: Call) -> Tensor | None:
        """The distillation loss of one call; None if no gradient flows through it."""
        student = main_tensor(call.outputs)
        if student is None or not student.requires_grad:
            return None
        share, left_out = self.loss(call, self.teacher.answer(call, self.loss.features))
        for name in left_out:
            self._warn(f"{name} has another shape than in the teacher, or none, and is left out of the features.")
        return share

    def _warn(self, message: str) -> None:
        """Warn of each thing once."""
        if message not in self.warned:
            self.warned.add(message)
            rank_zero_warn(f"KnowledgeDistillation: {message}")
