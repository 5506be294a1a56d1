"""Distillation: a student's calls are recorded, a teacher answers the same calls, and a loss compares the two."""

from lightning_compress.distillation.calls import (
    Call,
    check_names,
    choose_module,
    main_tensor,
    record_calls,
    teach,
    visible_modules,
)
from lightning_compress.distillation.loss import DistillationLoss, Loss, feature_loss, output_loss

__all__ = [
    "Call",
    "DistillationLoss",
    "Loss",
    "check_names",
    "choose_module",
    "feature_loss",
    "main_tensor",
    "output_loss",
    "record_calls",
    "teach",
    "visible_modules",
]
