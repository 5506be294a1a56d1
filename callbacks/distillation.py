"""Let the dense model, or another, teach the compressed one while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_compress.checks import check_flag, check_instance, check_names, check_path, refusal
from lightning_compress.distillation import Call, DistillationLoss, Loss
from lightning_compress.forward import Inputs
from lightning_compress.phase import Phase
from lightning_compress.squeeze import Squeezed
from lightning_compress.structure.record import structure_of

from .live_shape import check_strategy
from .protocol import compressing_phases, compression_progress
from .run import check_own_phase, own_progress, read_clock
from .taught_step import TaughtStep, check_extendable, extend_step, restore_step
from .teacher import Teacher, rehearse
from .verdict import end_with_verdict

__all__ = ["KnowledgeDistillation"]

_FEATURES = "a list of layers' names, such as ['encoder'], or a dict of weights by name"


class KnowledgeDistillation(pl.Callback):
    """Adds to the loss how far the model's outputs are from a teacher's (Hinton 2015, arXiv:1503.02531).

    loss = (1 - alpha) * task_loss + alpha * T^2 * KL(teacher_T || student_T) + sum_f w_f * MSE(f), where the last term
    compares the features (Romero 2015, arXiv:1412.6550). Where T^2 KL of an example is above 2, its gradient is scaled
    down, so that a teacher pulls at the logits no harder than a label does. ``training_step`` stays as it is: while it
    runs, the calls of the module that makes the logits are recorded, and the teacher answers the same inputs in eval
    mode, without gradients. Lightning then runs one backward pass, through the sum. Several calls in one step are
    averaged; a step that returns None stays skipped. If the distillation loss is NaN or infinite, that step uses the
    task loss only. Until the phase begins, training is bitwise identical to a run without this callback. The
    distillation loss is logged as ``compress/distillation_loss``.

    Args:
        teacher: ``"self"``: the model as it is when the phase begins, kept in float and saved in this callback's part
            of the checkpoint. The path of a checkpoint of the same LightningModule, or of its weights as a state dict,
            ``.safetensors`` or packed file. Or a module that takes the inputs of the distilled module; it is put in
            eval mode.
        alpha: Weight of the distillation loss of the outputs, 0..1; the task loss gets the rest.
        temperature: Divides the logits of both before they are compared; ``"kl"`` only.
        loss: ``"kl"`` for logits, ``"mse"`` for regression.
        outputs: Name of the module whose output is distilled: its ``logits`` if the output is a dict that has them,
            else its first floating-point tensor. By default the LightningModule itself or, if ``training_step`` does
            not call it, the only module with parameters that it does call.
        features: Names of layers whose outputs are distilled too, by mean squared error, optionally with a weight per
            name (default 1). A layer whose output shape differs from the teacher's is left out with a warning.
        phase: When to distil; by default from the first phase in which another callback compresses, or the whole run
            if there is none.
        class_axis: Axis of the classes for ``"kl"``: the last, or 1 for outputs of shape (N, C, height, width).
        by_hand: Leave ``training_step`` alone: it calls :meth:`loss` itself, as manual optimization requires.
        strict: Whether it is an error, when ``fit`` ends, if no step was taught, after checkpoints and files are
            written; else it is a warning.
        weights_only: As that of ``torch.load``, for the path of a checkpoint: False lets it hold objects, of a file
            that you trust.

    Raises:
        ValueError: If a value is out of range.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> trainer = pl.Trainer(callbacks=[KnowledgeDistillation(alpha=0.5)], logger=False, enable_checkpointing=False)
    """

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        teacher: str | Path | nn.Module = "self",
        alpha: float = 0.9,
        temperature: float = 2.0,
        loss: Loss = "kl",
        outputs: str = "",
        features: Sequence[str] | Mapping[str, float] = (),
        phase: Phase | None = None,
        class_axis: int = -1,
        by_hand: bool = False,
        strict: bool = False,
        weights_only: bool | None = None,
    ) -> None:
        names = [features] if isinstance(features, str) else features
        if not isinstance(names, Mapping):
            check_names("KnowledgeDistillation.features", names, _FEATURES)
        weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
        self.teacher = teacher
        self.distillation_loss = DistillationLoss(alpha, temperature, loss, class_axis, weights)
        self.outputs = outputs
        self.phase = phase
        self.by_hand = by_hand
        self.strict = strict
        self.weights_only = weights_only
        self._check_values()
        self._step: TaughtStep | None = None
        self._begun = False
        self._active = False
        self._squeezed: Squeezed | None = None  # where its phase lies in a run that is too short for it
        self._num_due = 0  # steps of its phase
        self._num_before = 0  # steps that were taught before a checkpoint was written
        self._state: dict[str, Any] | None = None

    def asked(self) -> dict[str, float]:
        """Steps of its phase."""
        return {"taught steps": max(1, self._num_due)}

    def stands(self) -> dict[str, float]:
        """How many of them were taught."""
        return {"taught steps": self._num_taught}

    @property
    def reached(self) -> bool:
        """Whether any was."""
        return self._num_taught > 0

    def shortfalls(self) -> dict[str, str]:
        """Why no step was taught."""
        if self.reached:
            return {}
        if not self._num_due:
            return {"taught steps": ""}
        if self.by_hand:
            return {"taught steps": "training_step never called loss(), or what it gave was never finite"}
        warned = set() if self._step is None else self._step.warned
        reasons = " ".join(sorted(warned)).removesuffix(".")
        return {"taught steps": reasons or "training_step returned no loss"}

    @property
    def _num_taught(self) -> int:
        return self._num_before + (0 if self._step is None else self._step.num_taught)

    def _check_values(self) -> None:
        check_flag("KnowledgeDistillation.by_hand", self.by_hand)
        check_flag("KnowledgeDistillation.strict", self.strict)
        if self.weights_only is not None:
            check_flag("KnowledgeDistillation.weights_only", self.weights_only, ", or None for that of torch.load")
        check_instance("KnowledgeDistillation.outputs", self.outputs, str, "a module's name, such as 'head'")
        check_instance(
            "KnowledgeDistillation.teacher",
            self.teacher,
            (str, Path, nn.Module),
            "'self', the path of a checkpoint, or an nn.Module",
        )
        if not isinstance(self.teacher, nn.Module):
            check_path("KnowledgeDistillation.teacher", self.teacher, "'self' or the path of a checkpoint")
        if self.phase is not None:
            check_instance("KnowledgeDistillation.phase", self.phase, Phase, "a Phase, for instance Phase(0.2, 1)")
            if self.phase.begin == self.phase.end:
                longer = "a phase that ends after it begins"
                raise refusal("KnowledgeDistillation.phase", self.phase, longer, "Let it end later.")
        features = self.distillation_loss.features
        if self.by_hand and features:
            raise ValueError(
                f"KnowledgeDistillation.features={features!r} with by_hand=True: loss() sees the outputs alone; "
                "accepted are none. Leave them out, or let training_step be extended (by_hand=False)."
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be distilled, before training starts."""
        check_strategy(trainer, self)
        if stage != "fit":
            return
        end_with_verdict(trainer)
        check_extendable(pl_module, self.by_hand)
        if isinstance(self.teacher, str | Path) and self.teacher != "self" and not Path(self.teacher).is_file():
            raise FileNotFoundError(
                f"KnowledgeDistillation.teacher={str(self.teacher)!r}: there is no such checkpoint. Give the path of a "
                ".ckpt file, or 'self'."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the modules and make the teacher ready."""
        if self.teacher == "self" and self.phase is None and not compressing_phases(trainer):
            raise ValueError(
                "KnowledgeDistillation.teacher='self' is the model as it is before compression, but no callback "
                "compresses. Add one, such as GradualPruning(), give a phase, or another teacher."
            )
        if self._step is None or self._step.pl_module is not pl_module:
            teacher = Teacher(self.teacher, pl_module, self.weights_only)
            self._step = TaughtStep(pl_module, teacher, self.distillation_loss, self.outputs)
            self._begun = False
        teacher = self._step.teacher
        if self._state is not None and "teacher" in self._state:
            teacher.become(self._state["teacher_structure"], self._state["teacher"])
            self._begun = True
        self._state = None
        teacher.module.to(pl_module.device)
        teacher.check_names(pl_module, self.outputs, list(self.distillation_loss.features))
        rehearse(trainer, pl_module, teacher, self.outputs, self.distillation_loss, self.by_hand)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a phase outside the run; copy the model before anything compresses it."""
        if self.phase is not None:
            self._squeezed = check_own_phase(trainer, "distil", self.phase)
        self._copy_weights(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Extend the training step of this batch if the phase is on."""
        self._release(pl_module)
        self._active = self._is_time(trainer, batch_idx)
        # Where the phase begins with this very batch, the batch before it has announced it and copied the model.
        announced = trainer.global_step == 0 or not self._is_time(trainer, batch_idx - 1)
        if self._active and not self._begun and not announced and self.teacher == "self":
            rank_zero_warn(
                "KnowledgeDistillation: teacher='self' is the model as it is now, long after the phase began: give a "
                "checkpoint."
            )
        self._begun |= self._active
        self._num_due += self._active
        if self._active and not self.by_hand:
            assert self._step is not None
            extend_step(pl_module, self._step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Restore the training step; copy the model when compression is about to begin."""
        self._release(pl_module)
        if not self._begun and self._is_time(trainer, batch_idx + 1):
            self._copy_weights(trainer, pl_module)
            self._begun = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the training step."""
        self._release(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the training step."""
        self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taught; the weights of the teacher, if it is the model itself and the phase has begun."""
        if self._state is not None:
            return self._state
        counts: dict[str, Any] = {}
        if self._num_due:
            counts = {"num_due": self._num_due, "num_taught": self._num_taught}
        if self.teacher != "self" or not self._begun or self._step is None:
            return counts
        teacher = self._step.teacher.module
        return {**counts, "teacher": dict(teacher.state_dict()), "teacher_structure": structure_of(teacher)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._num_due = state_dict.get("num_due", 0)
        self._num_before = state_dict.get("num_taught", 0)
        self._state = state_dict if self.teacher == "self" and state_dict else None

    def loss(self, loss: Tensor, outputs: object, *args: object, **kwargs: object) -> Tensor:
        """The loss with the teacher's part, for a ``training_step`` that optimizes by hand.

        Args:
            loss: The task loss; returned unchanged outside the phase.
            outputs: What the distilled module returned.
            args: The arguments it was called with.
            kwargs: Its keyword arguments.
        """
        if not self._active:
            return loss
        assert self._step is not None
        return self._step.add(loss, [Call(self._step.chosen or "", Inputs(args, kwargs), outputs)])

    def _is_time(self, trainer: pl.Trainer, num_batches: int) -> bool:
        if self.phase is not None:
            return 0 <= own_progress(trainer, self.phase, self._squeezed, num_batches) < 1
        begun = compression_progress(trainer, read_clock(trainer, num_batches)) >= 0
        return begun or not compressing_phases(trainer)

    def _copy_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the teacher be the model as it is, if the model teaches itself."""
        if self.teacher == "self" and not self._begun:
            assert self._step is not None
            self._step.teacher.copy_weights(trainer, pl_module)

    def _release(self, pl_module: pl.LightningModule) -> None:
        self._active = False
        restore_step(pl_module)
