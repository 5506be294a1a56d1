"""Quantize a trained model, without further training."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_compress.checks import check_flag, check_instance
from lightning_compress.phase import Phase
from lightning_compress.quantization.calibration import Calibration
from lightning_compress.quantization.model import ModelQuantization, quantization_of
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.quantization.state import QuantizationState
from lightning_compress.structure.record import Record

from .calibrating import calibrated_by_validation
from .live_shape import check_strategy, check_structure_on_load
from .model_quantization import (
    as_scheme,
    attach,
    foreign_state,
    give_parameters,
    give_values,
    is_wrapped,
    processes_of,
    revert_norms,
    shortfalls,
    trace,
)
from .protocol import compressing
from .raw_layers import know_layers
from .run import check_run, read_clock, tell_left_alone, trains
from .verdict import end_with_verdict

__all__ = ["PostTrainingQuantization"]


class PostTrainingQuantization(pl.Callback):
    """Calibrates a trained model on some batches and quantizes it (post-training quantization).

    By ``trainer.validate`` alone, on the validation data: the first batch is traced, to find where activations are
    quantized, the others are observed in float, and from then on the model is quantized. That first call returns the
    metrics of the float model, the next one those of the quantized model.

    Or at the end of ``trainer.fit``: ranges are observed in float during ``calibrate``, on the training data, and the
    model is quantized when training ends, behind the last validation and the last checkpoint. A fit that takes no step,
    such as one with ``max_epochs=0``, calibrates on the validation data. In each case an :class:`Export` writes the
    quantized model.

    Args:
        scheme: What is quantized how, or its word such as ``"w4a8"``; :func:`lightning_compress.int8` without one.
        calibrate: When ranges are observed in a ``fit``; of no account for ``trainer.validate``.
        equalize: Whether to move scales between layers before ranges are observed, so that channels have like ranges
            (Nagel 2019, arXiv:1906.04721, section 4.1). It changes weights, so it is for ``trainer.validate``.
        correct_bias: Whether to take the mean error of the quantized weights out of the biases, or of the folded batch
            norms' means (section 4.2); for ``trainer.validate``, too.
        strict: Whether a model that is not quantized when ``fit`` ends is an error, after checkpoints and files are
            written; else it is a warning.

    Raises:
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> quantize = PostTrainingQuantization("int8", equalize=True, correct_bias=True)
        >>> trainer = pl.Trainer(callbacks=[quantize], logger=False, enable_checkpointing=False)
        >>> trainer.validate(model, calibration_loader)  # doctest: +SKIP

        A checkpoint to a quantized file that was run and judged:

        >>> trainer = pl.Trainer(callbacks=[PostTrainingQuantization(), Export(["onnx"])])  # doctest: +SKIP
        >>> trainer.validate(MyModule.load_from_checkpoint("model.ckpt"), data)  # doctest: +SKIP
    """

    compresses = True
    # the model is quantized when the last checkpoint has been saved: one that waited would save none
    gate_checkpoints = False

    def __init__(
        self,
        scheme: Scheme | str | None = None,
        calibrate: Phase = Phase(0.9, 1.0),  # noqa: B008  # frozen
        equalize: bool = False,
        correct_bias: bool = False,
        strict: bool = False,
    ) -> None:
        name = type(self).__name__
        self.scheme = as_scheme(f"{name}.scheme", scheme)
        self.calibrate = calibrate
        self.equalize = equalize
        self.correct_bias = correct_bias
        self.strict = strict
        check_instance(f"{name}.calibrate", calibrate, Phase, "a Phase, for instance Phase(0.9, 1.0)")
        check_flag(f"{name}.equalize", equalize)
        check_flag(f"{name}.correct_bias", correct_bias)
        check_flag(f"{name}.strict", strict)
        self.quantization: ModelQuantization | None = None
        # of a checkpoint, until there is a model that it belongs to
        self._state: QuantizationState | None = None
        self._calibration: Calibration | None = None

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phase with its name."""
        return [("calibrate", self.calibrate)]

    @property
    def reached(self) -> bool:
        """Whether the model is quantized."""
        return self.quantization is not None and self.quantization.enabled

    def asked(self) -> dict[str, float]:
        """Bits of the weights, where no override says otherwise."""
        return {"bits": self.scheme.weight.bits}

    def stands(self) -> dict[str, float]:
        """The same now; 32 before the model is quantized."""
        return {"bits": self.scheme.weight.bits if self.reached else 32}

    @property
    def gate_stopping(self) -> bool:
        """Whether EarlyStopping waits: until a batch was observed, for the model is quantized when training ends."""
        return self._calibration is None or not self._calibration.is_complete

    def shortfalls(self) -> dict[str, str]:
        """The bits, if the model is not quantized."""
        if not self.reached and self.quantization is not None and self.quantization.placement is not None:
            return {"bits": "calibrate had one batch, which is only traced: let it span two at least"}
        return shortfalls(self.asked(), self.quantization, self.reached)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse sharding strategies and a second quantization, and checkpoints of another structure in words."""
        check_strategy(trainer, self)
        check_structure_on_load(pl_module)
        if stage == "fit":
            end_with_verdict(trainer)
        name = type(self).__name__
        others = [type(c).__name__ for c in compressing(trainer) if c is not self and "bits" in c.asked()]
        if others:
            raise ValueError(
                f"{name} beside {others[0]}: both quantize the same layers. Accepted is one of them: {name} for a "
                "model that is not trained further, QuantizationAwareTraining for one that is."
            )
        if stage == "fit":
            give_parameters(pl_module)

    def _attach(self, pl_module: pl.LightningModule, anew: bool = False) -> ModelQuantization:
        self.quantization = attach(self, pl_module, self.scheme, self._state, anew)
        self._state = None
        return self.quantization

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upgrade the layers, still in float."""
        give_values(pl_module)
        for option in ("equalize", "correct_bias"):
            if getattr(self, option):
                raise ValueError(
                    f"{type(self).__name__}.{option}=True with trainer.fit: it changes weights once, after training; "
                    "accepted is trainer.validate alone. Fit without this callback, then validate with it."
                )
        self._tell_of_weights_alone(trainer)
        if trains(trainer):
            self._calibration = Calibration(pl_module, self._attach(pl_module, anew=True), processes_of(trainer))
            return
        # a fit that takes no step, such as one with max_epochs=0
        if self._state is None:
            know_layers(self, trainer, pl_module)
            self._state = calibrated_by_validation(trainer, pl_module, self.scheme)
        quantized = self._state is not None
        self._attach(pl_module, anew=not quantized)
        if quantized:
            rank_zero_info(f"{type(self).__name__} calibrated on the validation data, for this fit takes no step.")

    def _tell_of_weights_alone(self, trainer: pl.Trainer) -> None:
        if any(getattr(callback, "save_weights_only", False) for callback in trainer.checkpoint_callbacks):
            rank_zero_warn(
                f"{type(self).__name__} beside ModelCheckpoint(save_weights_only=True): its files hold the float "
                "weights, and nothing of the quantization, which comes when training ends. Take the file that Export "
                "writes, or trainer.save_checkpoint(...) after fit."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if a phase is invalid; a run that begins before the calibration begins in float."""
        check_run(trainer)
        assert self.quantization is not None
        if self.calibrate.progress(read_clock(trainer, 0)) < 0 and trainer.global_step == 0:
            self.quantization.enable(False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Calibrate in its phase; behind it, trace at least, where a checkpoint did not say what was found."""
        assert self._calibration is not None
        assert self.quantization is not None
        progress = self.calibrate.progress(read_clock(trainer, batch_idx))
        if self.quantization.placement is None and progress >= 0:
            only = self.calibrate.progress(read_clock(trainer, batch_idx + 1)) >= 1
            trace(trainer, pl_module, self.quantization, only)
        if self.quantization.placement is not None and 0 <= progress < 1:
            self._calibration.begin_batch(is_wrapped(trainer))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Place quantizers, or stop observing."""
        assert self._calibration is not None
        self._calibration.end_batch()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize what was calibrated; what was not is a target that is missed."""
        assert self._calibration is not None
        if self._calibration.is_complete:
            self._quantize()
        else:
            self._calibration.stop()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Calibrate, in ``trainer.validate``, a model that is not quantized yet; validate another as it was trained."""
        quantization = self._attach(pl_module, anew=True)
        if trainer.state.fn == TrainerFn.VALIDATING and not quantization.enabled:
            processes = processes_of(trainer)
            self._calibration = Calibration(pl_module, quantization, processes, self.equalize, self.correct_bias)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Calibrate; in a fit the training data do that."""
        if trainer.state.fn == TrainerFn.VALIDATING and self._calibration is not None:
            self._calibration.begin_batch(is_wrapped(trainer))

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Place quantizers, or stop observing."""
        if trainer.state.fn == TrainerFn.VALIDATING and self._calibration is not None:
            self._calibration.end_batch(outputs)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize what was calibrated."""
        if trainer.state.fn == TrainerFn.VALIDATING and self._calibration is not None:
            self._quantize()
            rank_zero_info(f"{type(self).__name__} calibrated on the validation data: the model is quantized now.")

    def _quantize(self) -> None:
        """End a calibration: from now on the model is quantized."""
        calibration = self._calibration
        assert calibration is not None
        self._calibration = None
        if not calibration.is_complete:
            calibration.stop()
            raise self._saw_nothing()
        left = calibration.quantize()
        tell_left_alone(self, calibration.quantization.without_data())
        if left:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
            rank_zero_info(f"{type(self).__name__} corrects no bias of {reasons}")

    def _saw_nothing(self) -> ValueError:
        return ValueError(
            f"{type(self).__name__} calibrated on no batches, so that no range is known. Validate on two batches at "
            "least: the first one is only traced."
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as it was; refuse a validation without batches, in which Lightning calls no other hook."""
        revert_norms(trainer, pl_module)
        if stage != "validate":
            return
        found = quantization_of(pl_module)
        # a checkpoint that was loaded and not attached: it may be of a quantized model
        enabled = self._state["enabled"] if self._state else found is not None and found.enabled
        if not enabled:
            raise self._saw_nothing()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        give_values(pl_module)
        if self._calibration is not None:
            self._calibration.stop()
            self._calibration = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at a checkpoint as it was quantized."""
        self._attach(pl_module)

    on_predict_start = on_test_start
    settle = on_test_start

    def state_dict(self) -> dict[str, Any]:
        """Scheme, places and ranges, as plain values."""
        state = self._state if self.quantization is None else self.quantization.state_dict()
        return {} if state is None else {"quantization": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        self._state = state_dict.get("quantization")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore from a checkpoint that an earlier version, or quantization-aware training, wrote."""
        state = foreign_state(self, checkpoint)
        if state is not None:
            self.load_state_dict(state)

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """Nothing is held of the model: its quantization follows by itself."""

    def keep(self) -> None:
        """Nothing comes back: when the model is quantized, training is over."""

    def go_back(self, pl_module: pl.LightningModule, kept: dict[str, Any]) -> None:
        """Never called, for nothing is kept."""
