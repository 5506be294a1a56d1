"""Let the dense model, or another, teach the compressed one while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor, nn

from lightning_compress.distillation import (
    Call,
    Loss,
    feature_loss,
    main_tensor,
    output_loss,
    record_calls,
    teach,
    visible_modules,
)
from lightning_compress.forward import Inputs, record_inputs
from lightning_compress.phase import Clock, Phase, check_phases
from lightning_compress.structure.record import structure_of

from .evaluate import check_validation_data, copied, evaluate
from .live_shape import check_strategy
from .protocol import compressing_phases, compression_progress
from .run import read_clock
from .teacher import Teacher

__all__ = ["KnowledgeDistillation"]


class KnowledgeDistillation(pl.Callback):
    """Adds to the loss how far the model's outputs are from a teacher's (Hinton 2015, arXiv:1503.02531).

    loss = (1 - alpha) * the training step's + alpha * T^2 KL(teacher / T || student / T) + the features' (Romero 2015,
    arXiv:1412.6550). The training step stays as it is: while it runs, the calls of the module that makes the logits
    are recorded, and the teacher answers the same inputs, in eval mode and without gradients; Lightning then goes
    backward once, through the sum. Several calls in a step are averaged; a step that returns None stays skipped; one
    whose teacher's share is not finite takes its own loss alone. Until its phase the run is bitwise the plain one. The
    share is logged as ``compress/distillation_loss``.

    Args:
        teacher: ``"self"``: the model as it is when the phase begins, kept in float; it stands in this callback's part
            of the checkpoint. The path of a checkpoint of the same LightningModule. Or a module that takes the inputs
            of the module that is distilled; it is put in eval mode.
        alpha: Weight of the teacher's outputs, 0..1; the training step's own loss gets the rest.
        temperature: Softens both outputs before they are compared; ``"kl"`` only.
        loss: ``"kl"`` for logits, ``"mse"`` for regression.
        outputs: Name of the module whose output is taught: of a dict its ``logits``, else its first floating tensor.
            By default the LightningModule itself; where training_step does not call it, the only module with
            parameters that it calls.
        features: Names of layers whose outputs are taught too, by mean squared difference, with their weights; 1
            without. A layer of another shape than the teacher's is left out with a warning.
        phase: When; by default from the first phase on in which another callback compresses, or the whole run if there
            is none.
        class_axis: Axis of the classes for ``"kl"``: the last, or 1 for outputs (N, C, height, width).
        by_hand: Leave the training step alone: it calls :meth:`loss` itself, as manual optimization needs it.

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
    ) -> None:
        self.teacher = teacher
        self.alpha = alpha
        self.temperature = temperature
        self.kind = loss
        self.outputs = outputs
        self.features = _weights(features)
        self.phase = phase
        self.class_axis = class_axis
        self.by_hand = by_hand
        self._check_values()
        self._teacher: Teacher | None = None
        self._of: pl.LightningModule | None = None
        self._begun = False
        self._active = False
        self._chosen: str | None = outputs or None
        self._state: dict[str, Any] | None = None
        self._warned: set[str] = set()

    def _check_values(self) -> None:
        if not isinstance(self.teacher, str | Path | nn.Module):
            raise TypeError(
                f"KnowledgeDistillation.teacher={self.teacher!r}: accepted are 'self', the path of a checkpoint and an "
                "nn.Module."
            )
        if not _is_number(self.alpha) or not 0 <= self.alpha <= 1:
            raise ValueError(
                f"KnowledgeDistillation.alpha={self.alpha!r}: accepted is a share in 0..1 (0.9 leaves a tenth to the "
                "training step's own loss)."
            )
        if not _is_number(self.temperature) or not self.temperature > 0:
            raise ValueError(
                f"KnowledgeDistillation.temperature={self.temperature!r}: accepted is a number above 0 (1 leaves them)."
            )
        if self.kind not in ("kl", "mse"):
            raise ValueError(
                f"KnowledgeDistillation.loss={self.kind!r}: accepted are 'kl' (classes) and 'mse' (regression)."
            )
        if self.phase is not None and not isinstance(self.phase, Phase):
            raise TypeError(
                f"KnowledgeDistillation.phase={self.phase!r}: accepted is a Phase, for instance Phase(0.2, 1)."
            )
        if self.phase is not None and self.phase.begin == self.phase.end:
            raise ValueError(
                f"KnowledgeDistillation.phase={self.phase}: accepted is a phase that ends after it begins."
            )
        if self.by_hand and self.features:
            raise ValueError(
                f"KnowledgeDistillation.features={self.features!r} with by_hand=True: loss() sees the outputs alone. "
                "Leave the features out, or let training_step be extended (by_hand=False)."
            )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be distilled, before training starts."""
        check_strategy(trainer, self)
        if stage != "fit":
            return
        if not self.by_hand and not pl_module.automatic_optimization:
            raise ValueError(
                f"KnowledgeDistillation cannot extend the loss of {type(pl_module).__name__}: it optimizes by hand "
                "(automatic_optimization=False), so Lightning knows none. Give KnowledgeDistillation(by_hand=True), "
                "and in training_step before manual_backward: loss = callback.loss(loss, outputs, *inputs), with the "
                "outputs of the distilled module and the arguments it was called with."
            )
        if pl_module._compiler_ctx is not None:  # noqa: SLF001  # the only mark of a compiled module
            raise ValueError(
                "KnowledgeDistillation sees no calls inside a LightningModule that is compiled as a whole. Compile a "
                "part instead: self.net = torch.compile(self.net)."
            )
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
        if self._of is not pl_module:
            self._teacher, self._begun, self._chosen, self._warned = None, False, self.outputs or None, set()
        self._of = pl_module
        if self._teacher is None:
            self._teacher = Teacher(self.teacher, pl_module)
        if self._state is not None:
            self._teacher.become(self._state["teacher_structure"], self._state["teacher"])
            self._begun, self._state = True, None
        self._teacher.module.to(pl_module.device)
        known = visible_modules(pl_module)
        _check_names("outputs", [self.outputs], known)
        if self._teacher.is_copy:  # it also has the blocks that are gone by now
            known |= self._teacher.modules()
        _check_names("features", list(self.features), known)
        for name in self.features:
            self._teacher.place(name)
        self._try(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a phase that cannot be; look at the model before anything compresses it."""
        if self.phase is not None:
            check_phases([("distil", self.phase)], read_clock(trainer, 0))
        self._look(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Extend the training step of this batch if it is time."""
        self._release(pl_module)
        self._active = self._is_time(trainer, read_clock(trainer, batch_idx))
        late = (
            not self._begun and trainer.global_step > 0 and self._is_time(trainer, read_clock(trainer, batch_idx - 1))
        )
        if self._active and late and self.teacher == "self":
            self._warn("teacher='self' is the model as it is now, when the phase has long begun: give a checkpoint.")
        self._begun |= self._active
        if self._active and not self.by_hand:
            step = _Step(pl_module.training_step, partial(self._extended, pl_module))
            step.before = pl_module.__dict__.get("training_step")
            pl_module.__dict__["training_step"] = step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the training step back; look at the model when compression is about to begin."""
        self._release(pl_module)
        if not self._begun and self._is_time(trainer, read_clock(trainer, batch_idx + 1)):
            self._look(trainer, pl_module)
            self._begun = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave nothing behind."""
        self._release(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the training step back."""
        self._release(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The weights of the teacher, if it is the model itself and the phase has begun."""
        if self._state is not None:
            return self._state
        if self.teacher != "self" or not self._begun or self._teacher is None:
            return {}
        teacher = self._teacher.module
        return {"teacher": dict(teacher.state_dict()), "teacher_structure": structure_of(teacher)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self._state = state_dict if self.teacher == "self" and state_dict else None

    def loss(self, loss: Tensor, outputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A loss with the teacher's share, for a training step that optimizes by hand; outside the phase that loss.

        Args:
            loss: The training step's own loss.
            outputs: What the distilled module returned.
            args: The arguments it was called with.
            kwargs: The same, by name.
        """
        if not self._active:
            return loss
        assert self._of is not None
        return self._add(self._of, loss, [Call(self._chosen or "", Inputs(args, kwargs), outputs)])

    def _is_time(self, trainer: pl.Trainer, clock: Clock) -> bool:
        if self.phase is not None:
            return 0 <= self.phase.progress(clock) < 1
        return not compressing_phases(trainer) or compression_progress(trainer, clock) >= 0

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the teacher be the model as it is, if the model is its own."""
        if self.teacher == "self" and not self._begun:
            assert self._teacher is not None
            self._teacher.look(trainer, pl_module)

    def _release(self, pl_module: pl.LightningModule) -> None:
        self._active = False
        step = pl_module.__dict__.get("training_step")
        if isinstance(step, _Step):
            del pl_module.__dict__["training_step"]
            if step.before is not None:
                pl_module.__dict__["training_step"] = step.before

    def _extended(self, pl_module: pl.LightningModule, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a training step returns, with the teacher's share in the loss."""
        modules = visible_modules(pl_module)
        watched = {n: m for n, m in modules.items() if n == self._chosen or self._chosen is None}
        with record_calls(watched, {n: modules[n] for n in self.features if n in modules}) as calls:
            returned = step(*args, **kwargs)
        if returned is None:
            return None
        if self._chosen is None:
            self._chosen = _choose(pl_module, calls)
        calls = [call for call in calls if call.name == self._chosen]
        if not isinstance(returned, Mapping):
            return self._add(pl_module, returned, calls)
        return {**returned, "loss": self._add(pl_module, returned["loss"], calls)} if "loss" in returned else returned

    def _add(self, pl_module: pl.LightningModule, loss: Tensor, calls: list[Call]) -> Tensor:
        shares = [share for call in calls if (share := self._share(call)) is not None]
        if not shares:
            self._warn(
                f"{self._chosen or 'the model'} was not called with gradients in a step, which takes its own loss."
            )
            return loss
        share = torch.stack(shares).mean()
        pl_module.log("compress/distillation_loss", share.detach(), on_step=True, on_epoch=False, batch_size=1)
        if not torch.isfinite(share):
            self._warn("the teacher's share of the loss is not finite; such steps take their own loss alone.")
            return loss
        return (1 - self.alpha) * loss + share

    def _share(self, call: Call) -> Tensor | None:
        """What the teacher adds for one call; None if no gradient flows through it."""
        student = main_tensor(call.outputs)
        if student is None or not student.requires_grad:
            return None
        assert self._teacher is not None
        answer = self._teacher.answer(call, self.features)
        share = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        if self.alpha:
            teacher = self._fitting(student, main_tensor(answer.outputs))
            share = self.alpha * output_loss(student, teacher, self.kind, self.temperature, self.class_axis)
        for name, weight in self.features.items():
            pairs = list(zip(call.features.get(name, []), answer.features.get(name, []), strict=False))
            fits = [(s, t) for s, t in pairs if s is not None and t is not None and s.shape == t.shape]
            if not fits or len(fits) < len(pairs):
                self._warn(f"{name} has another shape than in the teacher, or none, and is left out of the features.")
                continue
            share = share + weight * torch.stack([feature_loss(s, t) for s, t in fits]).mean()
        return share

    def _fitting(self, student: Tensor, teacher: Tensor | None) -> Tensor:
        """The teacher's outputs, if they can be compared with the student's."""
        if teacher is None or teacher.shape != student.shape:
            raise ValueError(
                "KnowledgeDistillation.teacher gives outputs of shape "
                f"{None if teacher is None else tuple(teacher.shape)} where the model gives {tuple(student.shape)}. "
                "Accepted is a teacher with the same outputs; name the module that they come from with outputs=."
            )
        if self.kind == "kl" and (student.dim() < 2 or student.shape[self.class_axis] < 2):
            raise ValueError(
                f"KnowledgeDistillation.loss='kl' compares classes, but axis {self.class_axis} of outputs of shape "
                f"{tuple(student.shape)} has none. Give class_axis=, or loss='mse' for numbers."
            )
        return teacher

    def _try(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ask the teacher once, on a copy of the model and a batch of validation data, where there is one."""
        assert self._teacher is not None
        watched = copied(pl_module)
        module = visible_modules(watched)[self.outputs]
        try:
            check_validation_data(trainer, pl_module)
            inputs = record_inputs(module, lambda: evaluate(trainer, watched))
            if inputs is None or not self.alpha:
                return
            inputs = Inputs(*move_data_to_device(tuple(inputs), pl_module.device))
            with trainer.precision_plugin.forward_context():
                student = main_tensor(teach(module.eval(), {}, Call("", inputs)).outputs)
        except Exception:  # no validation data, or a validation step that cannot run alone: the first step will tell
            return
        try:
            with trainer.precision_plugin.forward_context():
                teacher = main_tensor(self._teacher.answer(Call(self.outputs, inputs)).outputs)
        except Exception as error:
            raise ValueError(
                f"KnowledgeDistillation.teacher fails on the inputs of {self.outputs or type(pl_module).__name__}: "
                f"{type(error).__name__}: {error}. Accepted is a module that takes the same inputs; name the module "
                "that it stands for with outputs=."
            ) from error
        if student is not None:
            self._fitting(student, teacher)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(f"KnowledgeDistillation: {message}")


class _Step:
    """A training step with a teacher; a copy of its module has the step without."""

    def __init__(self, step: Callable[..., Any], extended: Callable[..., Any]) -> None:
        self.__wrapped__ = step
        self.extended = extended
        self.before: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.extended(self.__wrapped__, *args, **kwargs)

    def __reduce__(self) -> Any:
        return _itself, (self.__wrapped__,)


def _itself(step: Any) -> Any:
    return step


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _weights(features: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Weights of features by name."""
    names = (features,) if isinstance(features, str) else features
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    for name, weight in weights.items():
        if not _is_number(weight) or weight < 0:
            raise ValueError(
                f"KnowledgeDistillation.features[{name!r}]={weight!r}: accepted is a weight from 0, the factor of its "
                "mean squared difference."
            )
    return weights


def _check_names(field: str, names: list[str], known: Mapping[str, nn.Module]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(
                f"KnowledgeDistillation.{field}={name!r} names no module, or one inside a compiled one, where none is "
                f"seen. The modules are: {', '.join(n for n in known if n)}."
            )


def _choose(pl_module: pl.LightningModule, calls: list[Call]) -> str:
    """The module to distil, where none is named."""
    modules = visible_modules(pl_module)
    makers = {name: None for name, module in modules.items() if next(module.parameters(), None) is not None}
    names = {
        c.name: None
        for c in calls
        if c.name in makers and (x := main_tensor(c.outputs)) is not None and x.requires_grad
    }
    if "" in names:
        return ""
    if len(names) != 1:
        raise ValueError(
            f"KnowledgeDistillation.outputs='': training_step of {type(pl_module).__name__} does not call the "
            f"LightningModule itself, but {' and '.join(names) or 'no module with parameters'}. Name the module that "
            "makes the logits: KnowledgeDistillation(outputs=...)."
        )
    return next(iter(names))
