"""The teacher of a model: the model as it was, a checkpoint of it, or another module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_compress.checkpoint import check_structure, follow_structure
from lightning_compress.checks import first_line
from lightning_compress.distillation import Call, DistillationLoss, check_names, main_tensor, teach, visible_modules
from lightning_compress.forward import Inputs, record_inputs
from lightning_compress.quantization.convert import to_float
from lightning_compress.structure.record import restore_structure, structure_of

from .evaluate import check_validation_data, copied, evaluate

__all__ = ["Teacher", "rehearse"]


class Teacher:
    """A module that is given the calls of the model it teaches, and answers them.

    Args:
        source: ``"self"``, the path of a checkpoint, or a module.
        pl_module: The model that is taught.

    Raises:
        ValueError: If the checkpoint cannot be read or does not fit, or the module shares parameters with the model.
    """

    def __init__(self, source: str | Path | nn.Module, pl_module: pl.LightningModule) -> None:
        self.is_copy = not isinstance(source, nn.Module)
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
            _load(copy, Path(source))
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
        asked = modules[call.name] if self.is_copy else self.module
        return teach(asked, {name: modules[self.feature_name(name)] for name in features}, call)


def _load(copy: pl.LightningModule, path: Path) -> None:
    """Load the weights of a checkpoint into a copy of the model."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        follow_structure(copy, checkpoint)
    except Exception as error:
        raise ValueError(
            f"KnowledgeDistillation.teacher={str(path)!r} cannot be read: {type(error).__name__}: {error}. Accepted is "
            "a .ckpt file that Lightning wrote, with plain values."
        ) from error
    weights = checkpoint["state_dict"]
    check_structure(copy, weights, strict=copy.strict_loading)
    copy.load_state_dict(weights, strict=copy.strict_loading)


def rehearse(
    trainer: pl.Trainer, pl_module: pl.LightningModule, teacher: Teacher, name: str, loss: DistillationLoss
) -> None:
    """Give the teacher one call before training, from a batch of validation data, where there is one.

    Args:
        trainer: The Trainer of the run.
        pl_module: The model that is taught; a copy of it is run.
        teacher: The teacher.
        name: The module that is distilled.
        loss: What compares the outputs of the two.

    Raises:
        ValueError: If the teacher cannot take the inputs, or its outputs cannot be compared.
    """
    if not loss.alpha:
        return
    call = _example_call(trainer, pl_module, name)
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


def _example_call(trainer: pl.Trainer, pl_module: pl.LightningModule, name: str) -> Call | None:
    """A module's first call in validation; None where validation makes no such call."""
    watched = copied(pl_module)
    module = visible_modules(watched)[name]
    try:
        check_validation_data(trainer, pl_module)
        recorded = record_inputs(module, lambda: evaluate(trainer, watched))
        if recorded is None:
            return None
        inputs = Inputs(*move_data_to_device(tuple(recorded), pl_module.device))
        with trainer.precision_plugin.forward_context():
            return Call(name, inputs, teach(module.eval(), {}, Call("", inputs)).outputs)
    except Exception:  # no validation data, or a step that cannot run alone: the first training step will tell
        return None
