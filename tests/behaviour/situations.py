"""What people's runs are like: options of the Trainer, data, modules and ends that are not those of a plain run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.callbacks import (
    SET,
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.phase import Phase

from .holders import MODULES, OPTIMIZERS, OTHERWISE, Averaged, PlainSGD, Swaps
from .small import BATCHES, Small

EPOCHS = 4
NUM_STEPS = EPOCHS * BATCHES


@dataclass(frozen=True)
class Scale:
    """Where phases lie: in the unit of a run, an epoch or a step."""

    unit: str = "run"
    size: float = 1.0

    def __call__(self, begin: float, end: float) -> Phase:
        return Phase(begin * self.size, end * self.size, self.unit)  # type: ignore[arg-type]


# One of each that has a target, over the later half of the run; the last of its phases ends with the run.
CALLBACKS: dict[str, Callable[..., pl.Callback]] = {
    "GradualPruning": lambda at, **kw: GradualPruning(0.5, phase=at(0.5, 1.0), every=1, **kw),
    "RigL": lambda at, **kw: RigL(0.5, phase=at(0.25, 1.0), every=2, **kw),
    "SET": lambda at, **kw: SET(0.5, phase=at(0.25, 1.0), every=2, **kw),
    "ChannelPruning": lambda at, **kw: ChannelPruning(0.4, phase=at(0.5, 0.75), **kw),
    "LayerPruning": lambda at, **kw: LayerPruning(1, max_share=1.0, phase=at(0.5, 0.75), **kw),
    "QuantizationAwareTraining": lambda at, **kw: QuantizationAwareTraining("int8", at(0.5, 0.75), at(0.75, 1.0), **kw),
    "PostTrainingQuantization": lambda at, **kw: PostTrainingQuantization("int8", at(0.5, 1.0), **kw),
    "KnowledgeDistillation": lambda at, **kw: KnowledgeDistillation(phase=at(0.5, 1.0), **kw),
}
GATED = ("GradualPruning", "RigL", "SET", "ChannelPruning", "LayerPruning", "QuantizationAwareTraining")


# ---- modules


class ByHand(Small):
    """Optimizes by hand, two optimizers, and calls its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        head = torch.optim.Adam(self.head.parameters(), 1e-3)
        return head, torch.optim.SGD([*self.stem.parameters(), *self.blocks.parameters()], 1e-2)


class NoValidation(Small):
    validation_step = pl.LightningModule.validation_step  # type: ignore[assignment]


class ValidatesByParts(Small):
    """A validation that never calls forward."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.head(self.stem(batch[0])).mean())


class Skips(Small):
    """Every second step has no loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


class NaNOnce(Small):
    """One step whose gradients are NaN, and whose user skips it."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step == 2:
            optimizer.zero_grad(set_to_none=True)


class LogsNothing(Small):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def frozen() -> Small:
    """Nothing is trained but a bias."""
    module = Small()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.head.bias.requires_grad_(True)
    return module


def broken() -> Small:
    """A weight is NaN before the first step."""
    module = Small()
    with torch.no_grad():
        module.blocks[1].a.weight[0, 0] = torch.nan
    return module


# ---- data


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, num: int = BATCHES) -> None:
        self.num = num
        self.batch = Small().tensors()

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.num)


def stream(num: int = BATCHES) -> dict[str, Any]:
    return {"train_dataloaders": DataLoader(Stream(num), batch_size=None)}


# ---- ends


class StopsAfter(pl.Callback):
    """A user's own code ends the run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop |= trainer.global_step >= self.step


class Interrupts(pl.Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 5:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Situation:
    """A kind of run, and what is expected of it.

    Args:
        options: Of the Trainer.
        make: The module.
        data: What ``fit`` is given.
        extra: Other callbacks.
        at: Where the phases lie.
        settings: Of those callbacks that have them, such as ``gate_stopping``.
        ends: How a target ends: ``reached``, ``refused`` (before the first step) or ``missed``.
        but: Other ends, by callback.
        parameters: How many are left at most where channels were removed.
        thinned: Whether every callback is run only with ``--full``.
    """

    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[], Small] = Small
    data: Callable[[], dict[str, Any]] = dict
    extra: Callable[[], list[pl.Callback]] = list
    at: Scale = Scale()
    settings: dict[str, Any] = field(default_factory=dict)
    ends: str = "reached"
    but: dict[str, str] = field(default_factory=dict)
    parameters: int = 1000
    thinned: bool = False


def stopping() -> list[pl.Callback]:
    return [EarlyStopping("val_loss", patience=1)]


EPOCH = Scale("epoch", EPOCHS)
STEP = Scale("step", NUM_STEPS)
_BY_HAND = {"KnowledgeDistillation": "refused"}
_SPARSE = dict.fromkeys(("RigL", "SET"), "reached")  # soon after the beginning
_STOPPED = {"KnowledgeDistillation": "missed"}  # it waits for nothing that is still to come

# What else holds the weights.
HOLDING: dict[str, Situation] = {
    **{name: Situation(make=kind, but=OTHERWISE.get(name, {})) for name, kind in OPTIMIZERS.items()},
    **{name: Situation(make=kind, but=OTHERWISE.get(name, {}), parameters=1200) for name, kind in MODULES.items()},
    "SWA": Situation(extra=lambda: [StochasticWeightAveraging(1e-2, 0.25)]),
    "SWA, from the middle of a phase": Situation(extra=lambda: [StochasticWeightAveraging(1e-2, 0.6)]),
    "WeightAveraging": Situation(extra=lambda: [WeightAveraging()]),
    "AveragedModel in the module": Situation(make=Averaged),
    "an average swapped in by a callback": Situation(extra=lambda: [Swaps()]),
    "bf16-true": Situation({"precision": "bf16-true"}),
    # by an optimizer without an eps, which is 0 in half precision
    "16-true": Situation({"precision": "16-true"}, make=PlainSGD),
    "64-true": Situation({"precision": "64-true"}),
}

SITUATIONS: dict[str, Situation] = {
    "plain": Situation(),
    "phases in steps": Situation(at=STEP),
    "phases in epochs": Situation(at=EPOCH),
    "phases beyond the run": Situation(at=Scale("epoch", 3 * EPOCHS), ends="refused"),
    # ends before its end
    "EarlyStopping": Situation(extra=stopping, but=_STOPPED),
    "EarlyStopping, gate_stopping=False": Situation(
        extra=stopping,
        settings={name: {"gate_stopping": False} for name in GATED},
        ends="missed",
        but={**_SPARSE, "PostTrainingQuantization": "reached"},  # which waits in any case
    ),
    "should_stop": Situation(extra=lambda: [StopsAfter(2)], ends="missed"),
    "max_time": Situation({"max_time": "00:00:00:00"}, ends="missed"),
    "KeyboardInterrupt": Situation(extra=lambda: [Interrupts()], ends="missed"),
    "max_steps=0": Situation({"max_steps": 0}, ends="missed"),
    "limit_train_batches=0": Situation({"limit_train_batches": 0}, ends="missed"),
    # smoke tests
    "fast_dev_run": Situation({"fast_dev_run": True}),
    "fast_dev_run=3": Situation({"fast_dev_run": 3}),
    "fast_dev_run, phases in epochs": Situation({"fast_dev_run": True}, at=EPOCH),
    "overfit_batches=1": Situation({"overfit_batches": 1, "max_epochs": 1}),
    "limit_train_batches=2, in steps": Situation({"limit_train_batches": 2, "max_epochs": 1}, at=STEP),
    "limit_train_batches=1, in epochs": Situation({"limit_train_batches": 1, "max_epochs": 1}, at=EPOCH),
    "max_epochs=1, three batches": Situation(
        {"max_epochs": 1}, data=lambda: {"train_dataloaders": DataLoader([Small().tensors()] * 3, batch_size=None)}
    ),
    "barebones": Situation({"barebones": True}),
    "log_every_n_steps=0": Situation({"log_every_n_steps": 0}),
    "num_sanity_val_steps=0": Situation({"num_sanity_val_steps": 0}),
    # loops
    "accumulate_grad_batches=3": Situation({"accumulate_grad_batches": 3}),
    "max_steps alone": Situation({"max_epochs": -1, "max_steps": NUM_STEPS}),
    "no end, in steps": Situation({"max_epochs": -1, "max_steps": -1}, extra=lambda: [StopsAfter(NUM_STEPS)], at=STEP),
    "no end, in fractions": Situation({"max_epochs": -1, "max_steps": -1}, ends="refused"),
    "validated every 2 batches": Situation({"val_check_interval": 2}),
    "never validated": Situation({"check_val_every_n_epoch": 100, "num_sanity_val_steps": 0}),
    "gradient clipping": Situation({"gradient_clip_val": 0.1}),
    "bf16-mixed": Situation({"precision": "bf16-mixed"}),
    "EMA": Situation(extra=lambda: [EMAWeightAveraging(decay=0.5)]),
    # data
    "no length, in epochs": Situation(data=stream, at=EPOCH),
    "no length, in fractions": Situation(data=stream, ends="refused"),
    "fewer batches than said": Situation({"limit_train_batches": 9}, data=stream, but={"GradualPruning": "missed"}),
    "no validation": Situation(make=NoValidation),
    "limit_val_batches=0": Situation({"limit_val_batches": 0}),
    # modules
    "manual optimization": Situation(make=ByHand, but=_BY_HAND),
    # the first optimizer has but the head, which is dense, and to Lightning its step is the run's only one
    "manual, fast_dev_run": Situation(
        {"fast_dev_run": True}, make=ByHand, but={**_BY_HAND, "RigL": "missed", "SET": "missed"}
    ),
    "validates by parts": Situation(make=ValidatesByParts),
    "steps without a loss": Situation(make=Skips),
    "a step without gradients": Situation(make=NaNOnce),
    "logs nothing": Situation(make=LogsNothing),
    "all frozen": Situation(
        make=frozen,
        ends="missed",
        but=dict.fromkeys(["QuantizationAwareTraining", "PostTrainingQuantization", "KnowledgeDistillation"], "reached")
        | {"LayerPruning": "refused"},
    ),
    "a NaN weight": Situation(make=broken, ends="refused", but={"KnowledgeDistillation": "missed"}),
    **{name: replace(situation, thinned=True) for name, situation in HOLDING.items()},
}


def run(name: str, situation: Situation, folder: Path) -> tuple[pl.Trainer, Small]:
    """A Trainer with one callback in a situation, and the module; not yet trained."""
    torch.manual_seed(0)
    module = situation.make()
    callback = CALLBACKS[name](situation.at, **situation.settings.get(name, {}))
    options: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 1,
        "log_every_n_steps": 1,
    }
    if "barebones" in situation.options:
        options = {"max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1}
    if "overfit_batches" in situation.options:
        del options["limit_val_batches"]
    callbacks = [callback, *situation.extra()]
    return pl.Trainer(**{**options, **situation.options}, default_root_dir=folder, callbacks=callbacks), module
