"""Quantize a model while it trains."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress.phase import Phase
from lightning_compress.quantization.correct import BiasCorrection
from lightning_compress.quantization.equalize import ChainTracer, equalize
from lightning_compress.quantization.fake_quant import ActivationFakeQuantize
from lightning_compress.quantization.model import ModelQuantization, quantization_of, quantize_layers
from lightning_compress.quantization.placement import Tracer
from lightning_compress.quantization.schemes import Scheme, int8
from lightning_compress.quantization.schemes import scheme as scheme_of
from lightning_compress.structure.record import Record

from .best_checkpoint import gate_checkpoints, open_checkpoints
from .live_shape import check_strategy, check_structure_on_load
from .run import check_run, read_clock

__all__ = ["QuantizationAwareTraining"]

_EVERY = 2  # batches between two looks at the ranges in training: each look reads every activation once more
_TWO_BATCHES = "Validate on two batches at least: the first one is only watched."


class QuantizationAwareTraining(pl.Callback):
    """Calibrates, then trains with fake-quantized weights and activations (Jacob 2018, arXiv:1712.05877).

    Until its calibration begins the model is bitwise the plain one. At the first batch of the calibration the places
    to quantize are found by watching that batch run; then ranges are observed in float; then training goes on with
    quantized values, and every second batch moves the ranges. For the last stretch ranges and the statistics of folded
    batch norms are frozen: late, when the learning rate is low, for a frozen batch norm does not hold the gradients any
    more. The scales and ranges live in the callback's state: the model's ``state_dict`` stays that of the plain model.
    What a quantizer learns has an optimizer of its own (Adam on the logarithms), which steps after the user's and
    decays to 0.

    Without a phase of training this is post-training quantization: the model is quantized when ``fit`` ends, or, by
    ``trainer.validate`` alone, on the validation data: the first batch is watched, the others are observed in float,
    and from then on the model is quantized.

    Args:
        scheme: What is quantized how, or its word such as ``"w4a8"``; :func:`lightning_compress.int8` without one.
        calibrate: When ranges are observed in float.
        phase: When training goes on with quantized values; None for post-training quantization.
        freeze: Share of ``phase`` after which ranges and batch norm statistics stay as they are, above 0, up to 1.
        learning_rate: Of what the quantizers learn, in units of a scale's logarithm a step.
        equalize: Before the ranges are observed, move scales between layers so that their channels have like ranges
            (Nagel 2019, arXiv:1906.04721). Changes weights, so it is for ``trainer.validate`` with ``phase=None``.
        correct_bias: Take the mean error of the quantized weights out of the biases, or the folded batch norms' means;
            for ``trainer.validate`` with ``phase=None``, too.
        gate_checkpoints: Whether a ModelCheckpoint with a monitor saves only once the model is quantized. Without a
            phase none waits, for the model is quantized when the last one has been saved.

    Raises:
        ValueError: If a value is out of range, or calibration ends after the phase begins.
        TypeError: If an argument is of the wrong kind.

    Example:
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
    ) -> None:
        self.scheme = int8() if scheme is None else scheme_of(scheme) if isinstance(scheme, str) else scheme
        self.calibrate = Phase(0.7, 0.75) if calibrate is None else calibrate
        self.phase = phase
        self.freeze = freeze
        self.learning_rate = learning_rate
        self.equalize = equalize
        self.correct_bias = correct_bias
        self.gate_checkpoints = gate_checkpoints and phase is not None
        for name, kind in (("scheme", Scheme), ("calibrate", Phase), ("phase", Phase)):
            value = getattr(self, name)
            if not isinstance(value, kind) and not (name == "phase" and value is None):
                raise TypeError(
                    f"QuantizationAwareTraining.{name}={value!r}: accepted is a {kind.__name__}, for "
                    f"instance {'int8()' if kind is Scheme else 'Phase(0.7, 0.75)'}."
                )
        if not 0 < freeze <= 1:
            raise ValueError(
                f"QuantizationAwareTraining.freeze={freeze!r}: accepted is a share of the phase, above 0 and up to 1."
            )
        if not learning_rate > 0:
            raise ValueError(
                f"QuantizationAwareTraining.learning_rate={learning_rate!r}: accepted is a number above 0, for "
                "instance 1e-3."
            )
        if phase is not None and self.calibrate.unit == phase.unit and self.calibrate.end > phase.begin:
            raise ValueError(
                f"QuantizationAwareTraining: calibrate {self.calibrate} ends after phase {phase} begins; the two "
                "phases overlap. Let calibrate end where phase begins."
            )
        if phase is not None:
            self._refuse_options(f"phase={phase}", "Set phase=None, or leave it out.")
        self.quantization: ModelQuantization | None = None
        self._bits = self.scheme.weight.bits
        self._state: dict[str, Any] | None = None
        self._optimizer_state: dict[str, Any] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[Any] = []
        self._tracer: Tracer | None = None
        self._chain_tracer: ChainTracer | None = None
        self._correction: BiasCorrection | None = None
        self._calibrating = False
        self._frozen: list[torch.nn.Module] = []

    def phases(self) -> list[tuple[str, Phase]]:
        """Its phases with their names."""
        return [("calibrate", self.calibrate)] + ([] if self.phase is None else [("quantize", self.phase)])

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

    def _refuse_options(self, found: str, fix: str) -> None:
        for name in ("equalize", "correct_bias"):
            if getattr(self, name):
                raise ValueError(
                    f"QuantizationAwareTraining.{name}=True with {found}: it changes weights once, after training; "
                    f"accepted is phase=None, calibrated by trainer.validate alone. {fix}"
                )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse sharding strategies, and let a checkpoint of another structure be refused in words."""
        check_strategy(trainer, self)
        check_structure_on_load(pl_module)

    def _attach(self, pl_module: pl.LightningModule, anew: bool = False) -> None:
        """Upgrade the layers, disabled; and take up the state of a checkpoint.

        A model that another run has quantized by another scheme begins anew where it is to be quantized; where it is
        only looked at, that is refused: as it was trained it can be looked at without this callback.
        """
        found = quantization_of(pl_module)
        if found is not None and found.enabled and self._state is None and not anew and not found.is_by(self.scheme):
            raise ValueError(
                f"QuantizationAwareTraining.scheme={self.scheme}: the model is quantized by another one, "
                f"{found.scheme}. Accepted is the scheme that it was trained with. Give that one, leave this callback "
                "out, or give ckpt_path= a checkpoint of this scheme."
            )
        if found is not None and not found.is_by(self.scheme):
            found.remove(pl_module)
        before, self.quantization = self.quantization, quantize_layers(pl_module, self.scheme)
        if self.quantization is not before and self.quantization.skipped:
            left = "; ".join(f"{name}: {reason}" for name, reason in self.quantization.skipped.items())
            rank_zero_info(f"QuantizationAwareTraining leaves alone {left}")
        if self._state is not None:
            self.quantization.load_state_dict(pl_module, self._state)
            self._state = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Upgrade the layers, inert, and watch the optimizers."""
        self._refuse_options("trainer.fit", "Fit without this callback, then validate with it.")
        self._attach(pl_module, anew=True)
        self._learn()
        if self.gate_checkpoints:
            gate_checkpoints(trainer)
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(partial(self._step, trainer)))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers; refuse a calibration for which Lightning found no batch to validate on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if stage != "validate" or self.phase is not None:
            return
        found = quantization_of(pl_module)
        if not (self._state["enabled"] if self._state else found is not None and found.enabled):
            raise _calibrated_on_nothing(_TWO_BATCHES)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse phases that cannot be; switch to where the run is."""
        check_run(trainer)
        assert self.quantization is not None
        if self.calibrate.progress(read_clock(trainer, 0)) < 0 and trainer.global_step == 0:
            self.quantization.enable(False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the first batch, observe, quantize or freeze, as the clock says."""
        assert self.quantization is not None
        clock = read_clock(trainer, batch_idx)
        calibration = self.calibrate.progress(clock)
        training = -1.0 if self.phase is None else self.phase.progress(clock)
        if calibration < 0 and training < 0:
            return
        if self.quantization.placement is None:
            self._trace(trainer, pl_module)
            return
        if training < 0:
            self.quantization.observe(calibration < 1)
            return
        frozen = training >= self.freeze
        if not self.quantization.enabled:
            self._gather(trainer, once=True)
        self.quantization.enable(True)
        self.quantization.observe(not frozen and batch_idx % _EVERY == 0, once=False)
        self.quantization.begin()
        self._learn()
        if self._optimizer is not None:
            self._optimizer.param_groups[0]["lr"] = self.learning_rate * max(1 - training, 0)
        if frozen:
            for norm in self.quantization.batch_norms(pl_module):
                self._frozen += [norm] if norm.training else []
                norm.eval()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop observing, so that validation never moves a range; bring the ranks together."""
        self._after_batch(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Without a phase of training, quantize what was calibrated."""
        if self.phase is None:
            self._quantize(trainer, "Let calibrate span two batches at least: the first one is only watched.")

    def _after_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.quantization is not None
        if self._tracer is not None:
            self._tracer.__exit__(None, None, None)
            placement = trainer.strategy.broadcast(self._tracer.placement)
            self._tracer = None
            torch.compiler.set_stance("default")
            self.quantization.place(pl_module, placement)
        elif any(a.observing for a in self.quantization.activations.values()):
            self._gather(trainer, once=False)
            self.quantization.observe(False)
            self.quantization.enable(
                self.quantization.enabled
            )  # what was seen for the first time quantizes from now on

    def _quantize(self, trainer: pl.Trainer, fix: str) -> None:
        """End a calibration: from now on the model is quantized."""
        assert self.quantization is not None
        placed = self.quantization.placement is not None
        if not placed or (
            self.quantization.activations and not any(a.has_seen for a in self.quantization.activations.values())
        ):
            raise _calibrated_on_nothing(fix)
        self._gather(trainer, once=True)
        self.quantization.observe(False)
        if self.correct_bias:
            self._correct(trainer, fix)
        self.quantization.enable(True)

    def _correct(self, trainer: pl.Trainer, fix: str) -> None:
        """Correct the biases by what all ranks saw."""
        correction = self._stop_correction()
        if correction is None:  # weights alone are quantized, and the only batch was watched
            raise _calibrated_on_nothing(fix)
        for name, sums in correction.sums.items():
            correction.sums[name] = trainer.strategy.reduce(
                sums.to(trainer.strategy.root_device), reduce_op="sum"
            ).cpu()
        correction.apply()
        if correction.left:
            left = "; ".join(f"{name}: {reason}" for name, reason in correction.left.items())
            rank_zero_info(f"QuantizationAwareTraining corrects no bias of {left}")

    def _stop_correction(self) -> BiasCorrection | None:
        correction, self._correction = self._correction, None
        if correction is not None:
            correction.remove()
            torch.compiler.set_stance("default")
        return correction

    def _gather(self, trainer: pl.Trainer, once: bool) -> None:
        """Bring what the ranks saw together: ranges after every batch, histograms once, when they are complete."""
        assert self.quantization is not None
        if trainer.world_size > 1:
            late = self.quantization.enabled and not once  # what is seen for the first time in training
            found = self.quantization.activations.values()
            due = [a for a in found if a.observer.counts == once or (late and a.observing)]
            _merge(due, trainer.strategy.root_device)

    def _learn(self) -> None:
        """An optimizer for what the quantizers learn; what it knows of those that stay is kept."""
        assert self.quantization is not None
        learned = list(self.quantization.learned().values())
        known = [] if self._optimizer is None else self._optimizer.param_groups[0]["params"]
        if self._optimizer_state is None and [*map(id, known)] == [*map(id, learned)]:
            return
        before = {} if self._optimizer is None else self._optimizer.state
        self._optimizer = torch.optim.Adam(learned, self.learning_rate) if learned else None
        if self._optimizer is None:
            return
        self._optimizer.zero_grad()
        self._optimizer.state.update({p: before[p] for p in learned if p in before})
        if self._optimizer_state is not None:
            self._optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None

    def _step(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let the quantizers learn from the gradients of the user's own step."""
        if self._optimizer is None:
            return
        learned = self._optimizer.param_groups[0]["params"]
        if trainer.world_size > 1:
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learned])
            torch.distributed.all_reduce(flat)
            parts = flat.split([p.numel() for p in learned])
            for p, part in zip(learned, parts, strict=True):
                p.grad = part.view_as(p) / trainer.world_size
        for p in learned:
            if p.grad is not None and not torch.isfinite(p.grad).all():  # a step that a loss scaler gave up
                p.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let checkpoints go; batch norms that were frozen train on in another run."""
        open_checkpoints(trainer)
        for norm in self._frozen:
            norm.train()
        self._frozen.clear()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop watching, and let checkpoints go."""
        open_checkpoints(trainer)
        if self._chain_tracer is not None:
            self._chain_tracer.__exit__(None, None, None)
            self._chain_tracer = None
        self._stop_correction()
        if self._tracer is not None:
            self._tracer.__exit__(None, None, None)
            self._tracer = None
            torch.compiler.set_stance("default")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate a checkpoint as it was trained; or calibrate."""
        self._attach(pl_module, anew=self.phase is None)
        assert self.quantization is not None
        alone = trainer.state.fn == TrainerFn.VALIDATING
        self._calibrating = alone and self.phase is None and not self.quantization.enabled

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch the first batch of a calibration, observe the others."""
        assert self.quantization is not None
        if self._calibrating and self.quantization.placement is None:
            self._trace(trainer, pl_module)
            if self.equalize:
                self._chain_tracer = ChainTracer(pl_module, self.quantization.layers)
                self._chain_tracer.__enter__()
        elif self._calibrating:
            self.quantization.observe(True)
            if self.correct_bias and self._correction is None:
                self._correction = BiasCorrection(self.quantization.layers, self.quantization.folded(pl_module))
                torch.compiler.set_stance("force_eager")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Place quantizers, or stop observing."""
        if not self._calibrating:
            return
        tracer, self._chain_tracer = self._chain_tracer, None
        if tracer is not None:
            tracer.use(outputs)
            tracer.__exit__(None, None, None)
        self._after_batch(trainer, pl_module)
        if tracer is not None:
            assert self.quantization is not None
            equalize(pl_module, self.quantization.layers, trainer.strategy.broadcast(tracer.chains))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End a calibration."""
        if self._calibrating:
            self._calibrating = False
            self._quantize(trainer, _TWO_BATCHES)
            rank_zero_info("QuantizationAwareTraining calibrated on the validation data: the model is quantized now.")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Test a checkpoint as it was trained."""
        self._attach(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Predict with a checkpoint as it was trained."""
        self._attach(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Scheme, places, ranges and what was learned, as plain values."""
        state = self._state if self.quantization is None else self.quantization.state_dict()
        if state is None:
            return {}
        optimizer = self._optimizer_state if self._optimizer is None else self._optimizer.state_dict()
        lowered = {} if self.scheme.weight.bits == self._bits else {"bits": self.scheme.weight.bits}
        return {"quantization": state, **lowered} | ({} if optimizer is None else {"optimizer": optimizer})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint was written."""
        self._state = state_dict.get("quantization")
        self.lower(state_dict.get("bits", self._bits))
        self._optimizer, self._optimizer_state = None, state_dict.get("optimizer")

    @property
    def goal(self) -> float:
        """Bits of the weights now, where no override says otherwise."""
        return float(self.scheme.weight.bits)

    def check_level(self, level: float) -> None:
        """Refuse bits that the quantizer of the weights does not take, and a run that does not train with them."""
        if self.phase is None:
            raise ValueError(
                "QuantizationAwareTraining(phase=None) quantizes after training, so no step can be judged. Accepted is "
                "a phase, for instance Phase(0.5, 1.0)"
            )
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
        if self.quantization is None:
            return
        self._learn()
        moments = {} if self._optimizer is None else self._optimizer.state
        for p in [p for p, known in moments.items() if known["exp_avg"].shape != p.shape]:
            del moments[p]

    def keep(self) -> dict[str, Any] | None:
        """Places, ranges, bits and what was learned."""
        return self.state_dict()

    def go_back(self, pl_module: pl.LightningModule, kept: dict[str, Any]) -> None:
        """Return to an earlier state of this very run."""
        self.load_state_dict(kept)
        self._attach(pl_module)
        self._learn()

    def _trace(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.quantization is not None
        names = {layer.name.removesuffix("." + layer.parameter) for layer in self.quantization.layers}
        self._tracer = Tracer(pl_module, names, skip_root_calls=int(trainer.strategy.model is not pl_module))
        torch.compiler.set_stance("force_eager")
        self._tracer.__enter__()


def _calibrated_on_nothing(fix: str) -> ValueError:
    return ValueError(f"QuantizationAwareTraining calibrated on no batches, so that no range is known. {fix}")


def _merge(activations: list[ActivationFakeQuantize], device: torch.device) -> None:
    """Give every rank what all have seen."""
    if not activations:
        return
    ours = torch.cat([a.state.to(device) for a in activations])
    gathered = [torch.empty_like(ours) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, ours)
    states = torch.stack(gathered).split([len(a.state) for a in activations], dim=1)
    for a, theirs in zip(activations, states, strict=True):
        a.state = a.observer.merge(theirs)
