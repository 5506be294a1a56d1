"""Quantize a model while it trains."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.phase import Phase
from lightning_compress.quantization.placement import Tracer
from lightning_compress.quantization.prepare import Prepared, prepare
from lightning_compress.quantization.schemes import Scheme, int8

from .clock import check_run, read_clock
from .structure import check_strategy, check_structure_on_load

__all__ = ["QuantizationAwareTraining"]


class QuantizationAwareTraining(pl.Callback):
    """Calibrates, then trains with fake-quantized weights and activations (Jacob 2018, arXiv:1712.05877).

    Until its calibration begins the model is bitwise the plain one. At the first batch of the calibration the places
    to quantize are found by watching that batch run; then ranges are observed in float; then training goes on with
    quantized values. For the last stretch ranges and the statistics of folded batch norms are frozen. The scales and
    ranges live in the callback's state: the model's ``state_dict`` stays that of the plain model.

    Args:
        scheme: What is quantized how; :func:`lightning_compress.int8` without one.
        calibrate: When ranges are observed in float.
        phase: When training goes on with quantized values.
        freeze: Share of ``phase`` after which ranges and batch norm statistics stay as they are, above 0, up to 1.

    Raises:
        ValueError: If a value is out of range, or calibration ends after the phase begins.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> trainer = pl.Trainer(callbacks=[QuantizationAwareTraining(int8(exclude=["head"]))], logger=False,
        ...                      enable_checkpointing=False)
    """

    def __init__(
        self,
        scheme: Scheme | None = None,
        calibrate: Phase | None = None,
        phase: Phase | None = None,
        freeze: float = 0.7,
    ) -> None:
        self.scheme = int8() if scheme is None else scheme
        self.calibrate = Phase(0.7, 0.75) if calibrate is None else calibrate
        self.phase = Phase(0.75, 1.0) if phase is None else phase
        self.freeze = freeze
        for name, kind in (("scheme", Scheme), ("calibrate", Phase), ("phase", Phase)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"QuantizationAwareTraining.{name}={getattr(self, name)!r}: accepted is a {kind.__name__}, for "
                    f"instance {'int8()' if kind is Scheme else 'Phase(0.7, 0.75)'}."
                )
        if not 0 < freeze <= 1:
            raise ValueError(
                f"QuantizationAwareTraining.freeze={freeze!r}: accepted is a share of the phase, above 0 and up to 1."
            )
        if self.calibrate.unit == self.phase.unit and self.calibrate.end > self.phase.begin:
            raise ValueError(
                f"QuantizationAwareTraining: calibrate {self.calibrate} ends after phase {self.phase} begins; the two "
                "phases overlap. Let calibrate end where phase begins."
            )
        self.prepared: Prepared | None = None
        self._state: dict[str, Any] | None = None
        self._tracer: Tracer | None = None

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phases with their names."""
        return [("calibrate", self.calibrate), ("quantize", self.phase)]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse sharding strategies, and let a checkpoint of another structure be refused in words."""
        check_strategy(trainer, self)
        check_structure_on_load(pl_module)

    def _attach(self, pl_module: pl.LightningModule) -> None:
        """Upgrade the layers, disabled; and take up the state of a checkpoint."""
        fresh = self.prepared is None
        self.prepared = prepare(pl_module, self.scheme)
        if fresh and self.prepared.skipped:
            left = "; ".join(f"{name}: {reason}" for name, reason in self.prepared.skipped.items())
            rank_zero_info(f"QuantizationAwareTraining leaves alone {left}")
        if self._state is not None:
            self.prepared.load_state_dict(pl_module, self._state)
            self._state = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upgrade the layers, inert."""
        self._attach(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse phases that cannot be; switch to where the run is."""
        check_run(trainer)
        assert self.prepared is not None
        if self.calibrate.progress(read_clock(trainer, 0)) < 0 and trainer.global_step == 0:
            self.prepared.enable(False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the first batch, observe, quantize or freeze, as the clock says."""
        assert self.prepared is not None
        clock = read_clock(trainer, batch_idx)
        calibrating, training = self.calibrate.progress(clock) >= 0, self.phase.progress(clock)
        if not calibrating and training < 0:
            return
        if self.prepared.placement is None:
            self._trace(trainer, pl_module)
            return
        self.prepared.enable(training >= 0)
        frozen = training >= self.freeze
        self.prepared.observe(not frozen and (training >= 0 or self.calibrate.progress(clock) < 1))
        if frozen:
            for norm in self.prepared.batch_norms(pl_module):
                norm.eval()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop observing, so that validation never moves a range; bring the ranks together."""
        assert self.prepared is not None
        if self._tracer is not None:
            self._tracer.__exit__(None, None, None)
            placement = trainer.strategy.broadcast(self._tracer.placement)
            self._tracer = None
            torch.compiler.set_stance("default")
            self.prepared.place(pl_module, placement)
        elif any(a.observing for a in self.prepared.activations.values()):
            if trainer.world_size > 1:
                _widest(list(self.prepared.activations.values()), trainer.strategy.root_device)
            self.prepared.observe(False)
            self.prepared.enable(self.prepared.enabled)  # what was seen for the first time quantizes from now on

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        if self._tracer is not None:
            self._tracer.__exit__(None, None, None)
            self._tracer = None
            torch.compiler.set_stance("default")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate a checkpoint as it was trained."""
        self._attach(pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test a checkpoint as it was trained."""
        self._attach(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Predict with a checkpoint as it was trained."""
        self._attach(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Scheme, places and ranges as plain values."""
        state = self._state if self.prepared is None else self.prepared.state_dict()
        return {} if state is None else {"quantization": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self._state = state_dict.get("quantization")

    def _trace(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.prepared is not None
        names = {layer.name.removesuffix("." + layer.parameter) for layer in self.prepared.layers}
        self._tracer = Tracer(pl_module, names, skip_root_calls=int(trainer.strategy.model is not pl_module))
        torch.compiler.set_stance("force_eager")
        self._tracer.__enter__()


def _widest(activations: list[Any], device: torch.device) -> None:
    """Give every rank the widest range seen by any."""
    low, high = torch.stack([a.range.to(device) for a in activations]).unbind(1)
    low, high = low.contiguous(), high.contiguous()
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    for a, least, most in zip(activations, low, high, strict=True):
        a.range = torch.stack([least, most])
