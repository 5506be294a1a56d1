"""Post-training quantization in a fit that takes no step: over the validation data, on a copy."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_compress.quantization.calibration import Calibration
from lightning_compress.quantization.model import quantize_layers
from lightning_compress.quantization.processes import Processes
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.quantization.state import QuantizationState

from .evaluate import copied, evaluate

__all__ = ["calibrated_by_validation"]


def calibrated_by_validation(
    trainer: pl.Trainer, pl_module: pl.LightningModule, scheme: Scheme
) -> QuantizationState | None:
    """The state of a model that is calibrated on the validation data and quantized; None if there are too few of them.

    Args:
        trainer: The Trainer of the run.
        pl_module: Its model, which is left as it is.
        scheme: What is quantized how.
    """
    copy = copied(pl_module)
    observer = _Observer(Calibration(copy, quantize_layers(copy, scheme), Processes()))
    evaluate(trainer, copy, observer)
    if not observer.calibration.is_complete:
        return None
    observer.calibration.quantize()
    return observer.calibration.quantization.state_dict()


class _Observer(pl.Callback):
    """Calibrates a copy over a validation of it."""

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration

    def on_validation_batch_start(self, *_: object) -> None:
        self.calibration.begin_batch()

    def on_validation_batch_end(self, trainer: pl.Trainer, model: object, outputs: object, *_: object) -> None:
        self.calibration.end_batch(outputs)
