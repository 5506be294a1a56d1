"""The teacher of a model: the model as it was, a checkpoint of it, or another module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_compress.checkpoint import check_structure
from lightning_compress.checks import first_line
from lightning_compress.distillation import (
    Call,
    DistillationLoss,
    check_names,
    choose_module,
    main_tensor,
    record_calls,
    teach,
    visible_modules,
)
from lightning_compress.forward import Inputs, record_inputs
from lightning_compress.quantization.convert import to_float
from lightning_compress.structure.record import restore_structure, structure_of
from lightning_compress.weights import read_weights

from .evaluate import copied, evaluate, run_training_step
from .standing_in import attached

__all__ = ["Teacher", "rehearse"]


class Teacher:
    """A module that is given the calls of the model it teaches, and answers them.

    Args:
        source: ``"self"``, the path of a checkpoint, or a module.
        pl_module: The model that is taught.
        weights_only: As that of ``torch.load``, for a checkpoint.

    Raises:
        ValueError: If the checkpoint cannot be read or does not fit, or the module shares parameters with the model.
    """

    def __init__(
        self, source: str | Path | nn.Module, pl_module: pl.LightningModule, weights_only: bool | None = None
    ) -> None:
        self.is_copy = not isinstance(source, nn.Module)
        self.student = pl_module
        if isinstance(source, nn.Module):
            ours = {id(p) for p in pl_module.parameters()}
            if any(id(p) in ours for p in source.parameters()):
                raise ValueError(
                    "KnowledgeDistillation.teacher shares parameters with the model it teaches. Give teacher='self', "
                    "or copy.deepcopy of it."
                )
            self.module = source.eval()
            return
        copy = to_float(pl_module)
        copy._metric_attributes = None  # noqa: SLF001  # a cache of the original's metrics by identity
        if source != "self":
            _load(copy, Path(source), weights_only)
        self.module = copy.requires_grad_(False)

    def modules(self) -> dict[str, nn.Module]:
        """Its submodules whose calls can be observed, by name."""
        return visible_modules(self.module)

    def copy_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Become what the model is now, the same on all ranks."""
        self.become(structure_of(pl_module), pl_module.state_dict())
        if trainer.world_size > 1:  # each rank has its own running statistics of batch norms
            buffers = {name: value.cpu() for name, value in self.module.named_buffers()}
            for name, value in trainer.strategy.broadcast(buffers).items():
                self.module.get_buffer(name).copy_(value)

    def become(self, structure: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
        """Take weights of the model, after taking the shapes that it had when they were saved."""
        restore_structure(self.module, structure, weights)
        self.module.load_state_dict(weights)

    def feature_name(self, name: str) -> str:
        """The teacher's name for a layer of the model: the same, or the longest ending of it that the teacher has.

        Raises:
            ValueError: If it has no such layer.
        """
        modules = self.modules()
        endings = [n for n in modules if name == n or (n and name.endswith(f".{n}"))]
        if not endings:
            raise ValueError(
                f"KnowledgeDistillation.features={name!r}: the teacher has no such module. It has: "
                f"{', '.join(n for n in modules if n)}."
            )
        return max(endings, key=len)

    def check_names(self, pl_module: pl.LightningModule, outputs: str, features: Sequence[str]) -> None:
        """Refuse names that the model does not have, and features that the teacher does not have.

        Raises:
            ValueError: If it is so.
        """
        known = visible_modules(pl_module)
        check_names("KnowledgeDistillation.outputs", [outputs], known)
        if self.is_copy:  # a resumed model may have lost blocks that its teacher still has
            known |= self.modules()
        check_names("KnowledgeDistillation.features", features, known)
        for name in features:
            self.feature_name(name)

    def answer(self, call: Call, features: Iterable[str] = ()) -> Call:
        """Its answer to a call of the model, with the outputs of its own layers for these features."""
        modules = self.modules()
        watched = {name: modules[self.feature_name(name)] for name in features}
        if not isinstance(self.module, pl.LightningModule) or not self.is_copy:
            return teach(self.module, watched, call)
        with attached(self.student.trainer, self.module):
            return teach(modules[call.name], watched, call)


def _load(copy: pl.LightningModule, path: Path, weights_only: bool | None) -> None:
    """Load the weights of a file into a copy of the model."""
    weights, _ = read_weights("KnowledgeDistillation.teacher", path, copy, weights_only)
    strict = copy.strict_loading
    check_structure(copy, weights, strict, of=f"KnowledgeDistillation.teacher={str(path)!r}")
    copy.load_state_dict(weights, strict=strict)


def rehearse(  # all of it is compared
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    teacher: Teacher,
    name: str,
    loss: DistillationLoss,
    by_hand: bool,
) -> None:
    """Give the teacher one call before training, from a batch of validation or training data.

    Args:
        trainer: The Trainer of the run.
        pl_module: The model that is taught; a copy of it is run.
        teacher: The teacher.
        name: The module that is distilled; empty for the one that training will choose.
        loss: What compares the outputs of the two.
        by_hand: Whether the training step gives the calls, so that none is chosen.

    Raises:
        ValueError: If the teacher cannot take the inputs, or its outputs cannot be compared; or if no module can be
            chosen.
    """
    if not loss.alpha:
        return
    # first, for it refuses a training step in which no module can be chosen
    chosen = None if by_hand else _training_call(trainer, pl_module, name)
    call = _validation_call(trainer, pl_module, name) or chosen
    if call is None:
        return
    try:
        with trainer.precision_plugin.forward_context():
            answer = main_tensor(teacher.answer(call).outputs)
    except Exception as error:
        raise ValueError(
            f"KnowledgeDistillation.teacher fails on the inputs of {name or type(pl_module).__name__}: "
            f"{first_line(error)}. Accepted is a module that takes the same inputs; name the module that it stands for "
            "with outputs=."
        ) from error
    student = main_tensor(call.outputs)
    if isinstance(student, Tensor):
        loss.comparable(student, answer)


def _validation_call(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Call | None:
    """A module's first call in validation; None where validation makes no such call."""
    watched = copied(pl_module)
    module = visible_modules(watched)[name]
    try:
        recorded = record_inputs(module, lambda: evaluate(trainer, watched))
        if recorded is None:
            return None
        inputs = Inputs(*move_data_to_device(tuple(recorded), pl_module.device))
        with trainer.precision_plugin.forward_context():
            return Call(name, inputs, teach(module.eval(), {}, Call("", inputs)).outputs)
    except Exception:  # a step that cannot run alone: training will tell
        return None


def _training_call(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Call | None:
    """The first call of a module, or of the one that is chosen, in training; None where it is not called."""
    watched = copied(pl_module)
    modules = visible_modules(watched)
    try:
        with record_calls({name: modules[name]} if name else modules, {}) as calls:
            output = run_training_step(trainer, watched)
    except Exception:  # a step that cannot run alone: the first one will tell
        return None
    if not calls and output is None:  # a step that leaves its batch out
        return None
    chosen = name or choose_module(watched, calls)
    return next((call for call in calls if call.name == chosen), None)
