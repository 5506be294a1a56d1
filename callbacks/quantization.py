"""Quantize a model while it trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import lightning.pytorch as pl
from torch.utils.hooks import RemovableHandle

from lightning_compress.checks import check_flag, check_instance, check_number
from lightning_compress.phase import Phase
from lightning_compress.quantization.learning import ScaleOptimizer
from lightning_compress.quantization.model import ModelQuantization
from lightning_compress.quantization.schemes import Scheme
from lightning_compress.quantization.state import QuantizationState
from lightning_compress.structure.held import innermost
from lightning_compress.structure.record import Record

from .live_shape import check_strategy, check_structure_on_load
from .model_quantization import (
    as_scheme,
    attach,
    foreign_state,
    give_parameters,
    give_values,
    processes_of,
    revert_norms,
    shortfalls,
    trace,
)
from .run import check_run, read_clock, tell_left_alone
from .verdict import end_with_verdict

__all__ = ["QuantizationAwareTraining"]

# Ranges are observed in every so many batches of training: each look reads every activation once more.
_EVERY = 2


class QuantizationAwareTraining(pl.Callback):
    """Calibrates, then trains with fake-quantized weights and activations (Jacob 2018, arXiv:1712.05877).

    Until its calibration begins the model is bitwise the plain one. The first batch of the calibration is traced, to
    find where activations are quantized. Ranges are then observed in float, and from ``phase`` on the model trains with
    quantized values, while every second batch moves the ranges. For the last part of the phase the ranges and the
    statistics of folded batch norms are frozen. Freezing happens late, at a low learning rate, because gradients
    through a frozen batch norm are no longer normalized.

    Scales and ranges live in the callback's state: the model's ``state_dict`` stays that of the plain model. What a
    quantizer learns has an optimizer of its own (Adam on the logarithms), which steps after the user's and whose
    learning rate decays to 0.

    To quantize a trained model without further training, use :class:`PostTrainingQuantization`.

    Args:
        scheme: What is quantized how, or its word such as ``"w4a8"``; :func:`lightning_compress.int8` without one.
        calibrate: When ranges are observed in float.
        phase: When the model trains with quantized values.
        freeze: Share of ``phase`` after which ranges and batch norm statistics stay as they are, above 0, up to 1.
        learning_rate: Learning rate of what the quantizers learn, in units of a scale's logarithm per step.
        equalize: Refused when True: an option of :class:`PostTrainingQuantization`.
        correct_bias: Refused when True: an option of :class:`PostTrainingQuantization`.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once the model is quantized.
        gate_stopping: Whether EarlyStopping waits likewise.
        strict: Whether a target that is not reached is an error when ``fit`` ends, after checkpoints and files are
            written; else it is a warning.

    Raises:
        ValueError: If a value is out of range, there is no phase, or calibration ends after the phase begins.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> from lightning_compress import int8
        >>> trainer = pl.Trainer(callbacks=[QuantizationAwareTraining(int8(exclude=["head"]))], logger=False,
        ...                      enable_checkpointing=False)
    """

    compresses = True
    lever = "bits"

    def __init__(  # noqa: PLR0913  # each a setting of its own, given by name
        self,
        scheme: Scheme | str | None = None,
        calibrate: Phase | None = None,
        phase: Phase | None = Phase(0.75, 1.0),  # noqa: B008  # frozen
        freeze: float = 0.9,
        learning_rate: float = 1e-3,
        equalize: bool = False,
        correct_bias: bool = False,
        gate_checkpoints: bool = True,
        gate_stopping: bool = True,
        strict: bool = False,
    ) -> None:
        name = type(self).__name__
        for field, flag in (("equalize", equalize), ("correct_bias", correct_bias)):
            check_flag(f"{name}.{field}", flag)
        if phase is None:
            _refuse_post_training("phase=None")
        if equalize:
            _refuse_post_training("equalize=True")
        if correct_bias:
            _refuse_post_training("correct_bias=True")
        self.scheme = as_scheme(f"{name}.scheme", scheme)
        self.calibrate = Phase(0.7, 0.75) if calibrate is None else calibrate
        self.phase = phase
        self.freeze = freeze
        self.learning_rate = learning_rate
        self.gate_checkpoints = gate_checkpoints
        self.gate_stopping = gate_stopping
        self.strict = strict
        for field in ("gate_checkpoints", "gate_stopping", "strict"):
            check_flag(f"{name}.{field}", getattr(self, field))
        check_instance(f"{name}.calibrate", self.calibrate, Phase, "a Phase, for instance Phase(0.7, 0.75)")
        check_instance(f"{name}.phase", phase, Phase, "a Phase, for instance Phase(0.75, 1.0)")
        check_number(f"{name}.freeze", freeze, "a share of the phase, above 0 and up to 1", above=0, high=1)
        check_number(f"{name}.learning_rate", learning_rate, "a number above 0, for instance 1e-3", above=0)
        if self.calibrate.unit == phase.unit and self.calibrate.end > phase.begin:
            raise ValueError(
                f"{name}: calibrate {self.calibrate} ends after phase {phase} begins; accepted is one that ends by "
                "then, the two phases overlap. Let calibrate end where phase begins."
            )
        self.quantization: ModelQuantization | None = None
        self.learning = ScaleOptimizer(learning_rate)
        self._bits = self.scheme.weight.bits
        # of a checkpoint, until there is a model that it belongs to
        self._state: QuantizationState | None = None
        self._handles: list[RemovableHandle] = []

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phases with their names."""
        return [("calibrate", self.calibrate), ("quantize", self.phase)]

    @property
    def reached(self) -> bool:
        """Whether the model is quantized."""
        return self.quantization is not None and self.quantization.enabled

    def asked(self) -> dict[str, float]:
        """Bits of the weights, where no override says otherwise."""
        return {"bits": self._bits}

    def stands(self) -> dict[str, float]:
        """The same now; 32 before the model is quantized."""
        return {"bits": self.scheme.weight.bits if self.reached else 32}

    def shortfalls(self) -> dict[str, str]:
        """The bits, if the model is not quantized."""
        return shortfalls(self.asked(), self.quantization, self.reached)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse sharding strategies, and let a checkpoint of another structure be refused in words."""
        check_strategy(trainer, self)
        check_structure_on_load(pl_module)
        if stage == "fit":
            end_with_verdict(trainer)
            give_parameters(pl_module)

    def _attach(self, pl_module: pl.LightningModule, anew: bool = False) -> ModelQuantization:
        self.quantization = attach(self, pl_module, self.scheme, self._state, anew)
        self._state = None
        return self.quantization

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upgrade the layers, still in float, and step after the user's optimizers."""
        give_values(pl_module)
        quantization = self._attach(pl_module, anew=True)
        self.learning.follow(quantization.learned())
        for optimizer in trainer.optimizers:
            last = innermost(optimizer)  # which steps in any case
            self._handles.append(last.register_step_post_hook(lambda *_: self.learning.step(trainer.world_size)))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers, and the model as it was."""
        revert_norms(trainer, pl_module)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if a phase is invalid; a run that begins before the calibration begins in float."""
        check_run(trainer)
        assert self.quantization is not None
        if self.calibrate.progress(read_clock(trainer, 0)) < 0 and trainer.global_step == 0:
            self.quantization.enable(False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Trace the first batch, observe, quantize or freeze, as the clock says."""
        assert self.quantization is not None
        clock = read_clock(trainer, batch_idx)
        calibration = self.calibrate.progress(clock)
        training = self.phase.progress(clock)
        if calibration < 0 and training < 0:
            return
        if self.quantization.placement is None or (calibration < 1 and self.quantization.waiting):
            only = self.phase.progress(read_clock(trainer, batch_idx + 1)) >= 1
            trace(trainer, pl_module, self.quantization, only)
        if self.quantization.placement is None:
            return
        if training < 0:
            self.quantization.observe(calibration < 1)
        else:
            self.quantization.quantize(processes_of(trainer))
            self.quantization.begin()
            self.learning.follow(self.quantization.learned())
            self.learning.decay(training)
            if training >= self.freeze:
                self.quantization.freeze(pl_module)
            else:
                unseen = not all(a.has_seen for a in self.quantization.activations.values())
                self.quantization.observe(unseen or batch_idx % _EVERY == 0, once=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Place quantizers, or stop observing."""
        assert self.quantization is not None
        self.quantization.end_batch(pl_module, processes_of(trainer))
        over = self.phase.progress(read_clock(trainer, batch_idx + 1)) >= 1
        if over and self.quantization.placement is not None and not self.reached:
            # the run had no batch left for the phase
            self.quantization.quantize(processes_of(trainer))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let batch norms that were frozen train on in another run, and name the layers that no data reached."""
        if self.quantization is not None:
            self.quantization.thaw()
            tell_left_alone(self, self.quantization.without_data() if self.reached else {})

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop tracing."""
        give_values(pl_module)
        if self.quantization is not None:
            self.quantization.stop_tracing()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at a checkpoint as it was trained."""
        self._attach(pl_module)

    on_test_start = on_predict_start = settle = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """Scheme, places, ranges and what was learned, as plain values."""
        state = self._state if self.quantization is None else self.quantization.state_dict()
        if state is None:
            return {}
        found: dict[str, Any] = {"quantization": state}
        if self.scheme.weight.bits != self._bits:
            found["bits"] = self.scheme.weight.bits
        optimizer = self.learning.state_dict()
        if optimizer is not None:
            found["optimizer"] = optimizer
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        self._state = state_dict.get("quantization")
        self.lower(state_dict.get("bits", self._bits))
        self.learning.load_state_dict(state_dict.get("optimizer"))

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore from a checkpoint that post-training quantization wrote."""
        state = foreign_state(self, checkpoint)
        if state is not None:
            self.load_state_dict(state)

    @property
    def goal(self) -> float:
        """Bits of the weights now, where no override says otherwise."""
        return float(self.scheme.weight.bits)

    def check_level(self, level: float) -> None:
        """Refuse bits that the quantizer of the weights does not take."""
        replace(self.scheme.weight, bits=int(level))  # type: ignore[type-var]

    def steer(self, level: float | None) -> None:
        """Use this number of bits for the weights from now on; None changes nothing."""
        if level is not None:
            self.lower(int(level))

    def lower(self, bits: int) -> None:
        """Write the weights with fewer bits, or with more again, from now on; overrides stay as they are."""
        if self.scheme.weight.bits == bits:
            return
        self.scheme = replace(self.scheme, weight=replace(self.scheme.weight, bits=bits))  # type: ignore[type-var]
        if self.quantization is not None:
            self.quantization.rewrite(self.scheme)

    def follow(self, pl_module: pl.LightningModule, record: Record) -> None:
        """Learn on with the scales that are left; what is known of those that lost channels is forgotten."""
        if self.quantization is not None:
            self.learning.follow(self.quantization.learned())
            self.learning.forget_reshaped()

    def keep(self) -> dict[str, Any] | None:
        """Places, ranges, bits and what was learned."""
        return self.state_dict()

    def go_back(self, pl_module: pl.LightningModule, kept: dict[str, Any]) -> None:
        """Return to an earlier state of this very run."""
        self.load_state_dict(kept)
        self.learning.follow(self._attach(pl_module).learned())


def _refuse_post_training(given: str) -> NoReturn:
    raise ValueError(
        f"QuantizationAwareTraining.{given}: it quantizes while the model trains; accepted are a phase, for instance "
        "Phase(0.75, 1.0), and no option that changes weights. To quantize after training use "
        "PostTrainingQuantization(scheme), which has equalize and correct_bias."
    )
