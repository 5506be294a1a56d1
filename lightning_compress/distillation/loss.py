"""How far a student is from its teacher: the loss of the outputs and of the features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.checks import check_by_name, check_number, check_one_of, check_whole_number
from lightning_compress.distillation.calls import Call, main_tensor

__all__ = ["DistillationLoss", "Loss", "feature_loss", "output_loss"]

Loss = Literal["kl", "mse"]


def output_loss(student: Tensor, teacher: Tensor, kind: Loss, temperature: float, class_axis: int) -> Tensor:
    """The distance of a student's outputs from a teacher's, a scalar in float32 or better.

    Args:
        student: Logits of a classification; any numbers with ``"mse"``.
        teacher: The teacher's, of the same shape.
        kind: ``"kl"``: T^2 KL(softmax(teacher / T) || softmax(student / T)), averaged over all axes but that of the
            classes (Hinton 2015, arXiv:1503.02531), with gradients no stronger than those of labels; ``"mse"``: the
            mean squared difference.
        temperature: T; divides the logits of both.
        class_axis: Axis of the classes.

    Example:
        >>> output_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), "kl", 2.0, -1)
        tensor(0.)
    """
    check_one_of("output_loss.kind", kind, ("kl", "mse"), "Take 'kl' for classes and 'mse' for regression.")
    check_number("output_loss.temperature", temperature, "a number above 0 (1 softens nothing)", above=0)
    dtype = torch.promote_types(student.dtype, torch.float32)
    student = student.to(dtype)
    teacher = teacher.to(dtype)
    if kind == "mse":
        return F.mse_loss(student, teacher)
    student = F.log_softmax(student / temperature, class_axis)
    teacher = F.log_softmax(teacher / temperature, class_axis)
    # T^2 keeps the size of the gradient, which softening divides by it.
    losses = temperature**2 * F.kl_div(student, teacher, reduction="none", log_target=True).sum(class_axis)
    return _no_stronger_than_labels(losses).mean()


def _no_stronger_than_labels(losses: Tensor) -> Tensor:
    """The same numbers, whose gradients pull at the logits no harder than labels do.

    The gradient of T^2 KL is T (student_T - teacher_T): up to T times what cross entropy's can be, whose magnitudes sum
    to 2 at most. By Pinsker's inequality those of T^2 KL sum to sqrt(2 * T^2 KL) at most: up to a loss of 2 nothing
    changes, beyond it the gradient is that of a root.
    """
    share = (2 / losses.detach().clamp(min=2)).sqrt()
    return losses * share + (losses * (1 - share)).detach()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two layers' outputs (hints, Romero 2015, arXiv:1412.6550)."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return F.mse_loss(student.to(dtype), teacher.to(dtype))


@dataclass(frozen=True)
class DistillationLoss:
    """alpha * output_loss + sum_f w_f * MSE(f): what a teacher adds to the loss, per call of the student.

    Args:
        alpha: Weight of the outputs, 0..1.
        temperature: Softens the outputs of both; ``"kl"`` only.
        kind: ``"kl"`` for logits, ``"mse"`` for regression.
        class_axis: Axis of the classes for ``"kl"``.
        features: Weight w_f per layer whose outputs are compared too.

    Raises:
        ValueError: If a value is out of range.
    """

    alpha: float = 0.9
    temperature: float = 2.0
    kind: Loss = "kl"
    class_axis: int = -1
    features: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = "KnowledgeDistillation"
        share = "a share in 0..1 (0.9 leaves a tenth to the training step's own loss)"
        check_number(f"{name}.alpha", self.alpha, share, low=0, high=1)
        check_number(f"{name}.temperature", self.temperature, "a number above 0 (1 softens nothing)", above=0)
        check_one_of(f"{name}.loss", self.kind, ("kl", "mse"), "Take 'kl' for classes and 'mse' for regression.")
        accepted = "a weight from 0, the factor of its mean squared difference"
        check_whole_number(f"{name}.class_axis", self.class_axis, "a whole number, the axis of the classes", low=-64)
        check_by_name(
            f"{name}.features", self.features, "a dict of weights by a layer's name, such as {'encoder': 1.0}"
        )
        for feature, weight in self.features.items():
            check_number(f"{name}.features[{feature!r}]", weight, accepted, low=0)

    def __call__(self, student: Call, teacher: Call) -> tuple[Tensor, list[str]]:
        """The loss of one call, and the features left out because their shapes differ.

        Args:
            student: The student's call; its main tensor requires a gradient.
            teacher: The teacher's answer to it.

        Raises:
            ValueError: If the outputs cannot be compared.
        """
        outputs = main_tensor(student.outputs)
        assert outputs is not None
        total = outputs.new_zeros((), dtype=torch.promote_types(outputs.dtype, torch.float32))
        if self.alpha:
            answer = self.comparable(outputs, main_tensor(teacher.outputs))
            total = self.alpha * output_loss(outputs, answer, self.kind, self.temperature, self.class_axis)
        left_out = []
        for name, weight in self.features.items():
            # A block that is gone by now makes no outputs: there are fewer of the student's then.
            pairs = list(zip(student.features.get(name, []), teacher.features.get(name, []), strict=False))
            fits = [(s, t) for s, t in pairs if s is not None and t is not None and s.shape == t.shape]
            if not fits or len(fits) < len(pairs):
                left_out.append(name)
                continue
            total = total + weight * torch.stack([feature_loss(s, t) for s, t in fits]).mean()
        return total, left_out

    def comparable(self, student: Tensor, teacher: Tensor | None) -> Tensor:
        """The teacher's outputs, if they can be compared with the student's.

        Raises:
            ValueError: If their shapes differ, or ``"kl"`` finds no classes.
        """
        if teacher is None or teacher.shape != student.shape:
            given = None if teacher is None else tuple(teacher.shape)
            raise ValueError(
                f"KnowledgeDistillation.teacher gives outputs of shape {given} where the model gives "
                f"{tuple(student.shape)}. Accepted is a teacher with the same outputs; name the module that they come "
                "from with outputs=."
            )
        if self.kind == "kl" and (student.dim() < 2 or student.shape[self.class_axis] < 2):
            raise ValueError(
                f"KnowledgeDistillation.loss='kl' compares classes, but axis {self.class_axis} of outputs of shape "
                f"{tuple(student.shape)} has none. Give class_axis=, or loss='mse' for numbers."
            )
        return teacher
