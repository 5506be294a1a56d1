"""The methods of the behaviour matrix, as data: what compresses, when, and what must have been reached."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lightning_compress.analysis.inspect import sparsity
from lightning_compress.callbacks import (
    ChannelPruning,
    FineTuning,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RigL,
)
from lightning_compress.phase import Phase
from lightning_compress.pruning import NofM
from lightning_compress.quantization.fake_quant import weights
from lightning_compress.quantization.model import quantization_of

from .. import harness
from ..harness import SPARSITY, callback_of, outputs
from ..zoo import MODULES
from . import distilled

# Why ChannelPruning leaves a module whole.
NOTHING = {
    "lstm": {"net": "LSTM is left whole", "head": "an output layer"},
    "gru": {"net": "GRU is left whole", "head": "an output layer"},
    "boring": {"layer": "an output layer"},
    "manual-boring": {"layer": "an output layer"},
}
# The modules with a block that gives back the shape it reads; LayerPruning refuses the others.
BLOCKS = ("conv+bn+residual", "mlp", "attention", "transformer", "branch", "dict", "tied", "frozen", "foreign")


@dataclass(frozen=True)
class Method:
    """One method of the matrix.

    Attributes:
        callbacks: What compresses a module of the zoo, given by its name.
        reached: Asserts on a trainer, its module and the module's name what must stand at the end.
        epochs: The length of a run.
        saved: Batches after which a checkpoint is written, before, inside and after each phase.
        base: The run that this one is until ``inert`` batches are done, bit for bit.
        inert: The number of these batches.
        modules: The modules it takes, all of them others that ``zoo`` names are refused before training.
        kinds: The classes of these modules.
        whole: The modules in which it finds nothing to do.
        zeros: Whether a weight that is zero in the end was in no average any more.
        backend: Of torch.compile.
        options: For the Trainer.
        simulated: Whether its codes have no form in integer kernels, so that an export is refused.
    """

    callbacks: Callable[[str], list[pl.Callback]]
    reached: Callable[[pl.Trainer, pl.LightningModule, str], None]
    epochs: int
    saved: tuple[int, ...]
    inert: int
    base: str = "plain"
    modules: Collection[str] = tuple(MODULES)
    kinds: dict[str, type[pl.LightningModule]] = field(default_factory=lambda: MODULES)
    whole: Collection[str] = ()
    zeros: bool = True
    backend: str = "eager"
    options: dict[str, Any] = field(default_factory=dict)
    simulated: bool = False


def pruning_of(trainer: pl.Trainer) -> GradualPruning:
    return callback_of(trainer, GradualPruning)


def assert_pruned(trainer: pl.Trainer, target: float) -> None:
    masks = pruning_of(trainer).masks
    assert masks.layers
    assert sparsity(masks.layers) >= target


def assert_quantized(module: pl.LightningModule, learned: bool = False) -> None:
    """Every channel of the weights takes few values, every activation too, and what was pruned stays 0."""
    found = quantization_of(module)
    assert found is not None
    assert found.enabled
    assert found.activations
    assert all(a.enabled and not a.observing for a in found.activations.values())
    for layer in found.layers:
        quantizer = weights(layer.module)[layer.parameter]
        shown = quantizer(layer.multiplied) if layer.source else getattr(layer.module, layer.parameter)
        values, stored = shown.detach(), layer.weight.detach()
        channels = [values] if quantizer.axis is None else values.movedim(quantizer.axis, 0)
        assert max(len(channel.unique()) for channel in channels) <= quantizer.quantizer.num_codes, layer.name
        assert len(values.unique()) > 1, layer.name
        assert torch.isfinite(values).all(), layer.name
        assert not values[stored == 0].any(), layer.name
    shown = [(getattr(layer.module, layer.parameter), layer.weight) for layer in found.layers]
    assert any(not torch.equal(values, stored) for values, stored in shown)
    for place, activation in found.activations.items():
        y = activation.quantize(torch.linspace(*activation.range.tolist(), 4001))
        assert 1 < len(y.unique()) <= activation.quantizer.num_codes, place
    assert bool(found.learned()) == learned
    for log in found.learned().values():
        assert log.dtype == torch.float32
        assert torch.isfinite(log).all()


def assert_smaller(trainer: pl.Trainer, module: pl.LightningModule, whole: bool = False) -> None:
    """Fewer parameters, in the model and in the optimizers, and it still runs; or all where nothing can go."""
    dense = type(module)()
    dense.configure_model()
    left = sum(p.numel() for p in module.parameters()) / sum(p.numel() for p in dense.parameters())
    assert left == 1 if whole else left < 1
    mine = {id(p) for p in module.parameters()}
    for optimizer in trainer.optimizers:
        for p, state in optimizer.state.items():
            assert id(p) in mine
            assert all(v.shape == p.shape for v in state.values() if isinstance(v, torch.Tensor) and v.dim())
    outputs(module)


def reached_int8(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    assert_pruned(trainer, SPARSITY)
    assert_quantized(module)


def reached_rigl(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    assert_pruned(trainer, SPARSITY)


def reached_pattern(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    """Two zeros in every four neighbours, and refused is only what really has no such neighbours."""
    pruning = pruning_of(trainer)
    for layer in pruning.masks.layers:
        weight = layer.weight.detach()
        weight = weight.transpose(0, 1) if layer.out_axis == 1 else weight
        assert (weight.movedim(1, -1).unflatten(-1, (-1, 4)) == 0).sum(-1).min() >= 2
    refused = {layer for layer, reason in pruning.skipped.items() if "multiple of 4" in reason}
    modules = dict(module.named_modules())
    for layer in refused:
        owner, _, parameter = layer.rpartition(".")
        weight = modules[layer].weight if layer in modules else getattr(modules[owner], parameter)
        assert weight.shape[1] % 4 or modules[layer].transposed
    assert pruning.masks.layers or refused
    assert_quantized(module)


def reached_scheme(learned: bool) -> Callable[[pl.Trainer, pl.LightningModule, str], None]:
    def reached(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
        assert_pruned(trainer, 0.5)
        assert_quantized(module, learned)

    return reached


def reached_channels(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    """Half of the channels are gone, and what was left alone is named with its reason."""
    pruning = callback_of(trainer, ChannelPruning)
    assert pruning.shrinks == 2
    assert_smaller(trainer, module, name in NOTHING)
    assert all(reason in pruning.skipped[layer] for layer, reason in NOTHING.get(name, {}).items())
    if name not in NOTHING:
        widths, left = pruning.progress.widths, pruning.progress.left
        assert sum(left.values()) <= 0.5 * sum(widths.values())
        assert all(left[key] >= 0.1 * widths[key] for key in widths)


def reached_narrow_int8(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    reached_channels(trainer, module, name)
    reached_int8(trainer, module, name)


def reached_narrow_ternary(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    """A learned scale for each channel that is left. The sparse channels went first, with their zeros."""
    reached_channels(trainer, module, name)
    assert_pruned(trainer, 0.1)
    assert_quantized(module, learned=True)
    learned = quantization_of(module).learned()
    for layer in quantization_of(module).layers:
        assert learned[f"{layer.name}:scale"].shape == (layer.weight.shape[layer.out_axis],)


def reached_layers(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    assert_smaller(trainer, module)
    assert sum(isinstance(m, nn.Identity) and "Skip" in type(m).__name__ for m in module.modules()) == 1


def reached_shallow_int8(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    """What is masked is what there is. The removed block took its zeros with it."""
    reached_layers(trainer, module, name)
    assert_pruned(trainer, 0.1)
    assert_quantized(module)
    parameters = {id(p) for p in module.parameters()}
    assert all(id(layer.weight) in parameters for layer in pruning_of(trainer).masks.layers)


def reached_taught(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    assert_pruned(trainer, SPARSITY)
    distillation = callback_of(trainer, KnowledgeDistillation)
    assert 0 < trainer.callback_metrics["compress/distillation_loss"] < torch.inf
    assert distillation.state_dict()["teacher"]
    assert not distillation._step.warned
    assert "training_step" not in module.__dict__


def reached_taught_int8(trainer: pl.Trainer, module: pl.LightningModule, name: str) -> None:
    """The teacher stays in float."""
    reached_taught(trainer, module, name)
    assert_quantized(module)
    teacher = callback_of(trainer, KnowledgeDistillation)._step.teacher.module
    assert quantization_of(teacher) is None or not quantization_of(teacher).enabled


def prune_beside(name: str) -> list[pl.Callback]:
    """The pruning beside which the quantization methods run."""
    return [GradualPruning(0.5, phase=Phase(1 / 12, 1 / 4), every=1)]


def quantized(scheme: str, learned: bool = False) -> Method:
    """Prune, calibrate, then train with a scheme."""

    def callbacks(name: str) -> list[pl.Callback]:
        calibrate, train = Phase(1 / 4, 1 / 2), Phase(1 / 2, 1.0)
        qat = QuantizationAwareTraining(scheme, calibrate, train, freeze=0.6, learning_rate=1e-2)
        return [*prune_beside(name), qat]

    # in pruning, in calibration, after it, in training, and after the ranges froze
    saved = (2, 4, 6, 8, 11)
    backend = "aot_eager" if scheme == "ternary" else "eager"
    return Method(
        callbacks,
        reached_scheme(learned),
        3,
        saved,
        inert=6,
        base="pruned",
        backend=backend,
        simulated=scheme == "log4",
    )


def int8(calibrate: Phase, phase: Phase) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(calibrate=calibrate, phase=phase, freeze=0.6)


CALIBRATE, QUANTIZE = harness.PHASES["calibrate"], harness.PHASES["quantize"]
CUT = Phase(0.2, 0.5)
# before, between and after the two shrinks, and after the only one
SHRUNK = (2, 7, 8, 11, 12, 18)

# What methods are compared with; no cells of the matrix.
BASES = {
    "plain": Method(lambda name: [], lambda *_: None, 6, (1, 2, 3, 4, 12, 20), inert=2),
    "pruned": Method(prune_beside, lambda *_: None, 3, (6, 12), inert=0),
}

METHODS: dict[str, Method] = {
    "prune+int8": Method(
        lambda name: harness.callbacks(), reached_int8, harness.EPOCHS, harness.SAVED, inert=4, backend="aot_eager"
    ),
    # before, inside (twice) and after the phase
    "rigl": Method(
        lambda name: [RigL(SPARSITY, phase=Phase(0.2, 0.7), every=2)],
        reached_rigl,
        3,
        (2, 5, 7, 10),
        inert=2,
        zeros=False,
    ),
    "n:m+int8": Method(
        lambda name: [
            GradualPruning(pattern=NofM(2, 4), phase=Phase(0.2, 0.5), every=2),
            int8(Phase(0.5, 0.75), Phase(0.75, 1.0)),
        ],
        reached_pattern,
        3,
        (2, 5, 7, 9, 10),
        inert=2,
    ),
    "ternary": quantized("ternary", learned=True),
    "int4": quantized("int4", learned=True),
    "log4": quantized("log4"),
    "ptq": Method(
        lambda name: [*prune_beside(name), PostTrainingQuantization("int8", Phase(1 / 4, 3 / 4))],
        reached_scheme(learned=False),
        3,
        (2, 4, 6, 8, 11),
        inert=12,
        base="pruned",
    ),
    "channels": Method(
        lambda name: [ChannelPruning(0.5, phase=CUT, steps=2)],
        reached_channels,
        6,
        SHRUNK,
        inert=4,
        whole=NOTHING,
        backend="aot_eager",
    ),
    "channels+prune+int8": Method(
        lambda name: [
            ChannelPruning(0.5, phase=Phase(0.05, 0.2), steps=2),
            GradualPruning(SPARSITY, phase=harness.PHASES["prune"], every=2),
            FineTuning(harness.PHASES["fine-tune"], "rewind"),
            int8(CALIBRATE, QUANTIZE),
        ],
        reached_narrow_int8,
        6,
        (1, 3, 5, 9, 14, 18, 22),
        inert=1,
    ),
    # shrunk twice when scales are learned already
    "ternary+channels": Method(
        lambda name: [
            ChannelPruning(0.5, phase=Phase(0.75, 1.0), steps=2),
            GradualPruning(0.5, phase=Phase(1 / 12, 0.25), every=1),
            QuantizationAwareTraining("ternary", Phase(0.25, 0.5), Phase(0.5, 0.75), freeze=0.6, learning_rate=1e-2),
        ],
        reached_narrow_ternary,
        6,
        (2, 3, 9, 15, 21),
        inert=2,
        zeros=False,  # the last channels go in the last step, and masks make up for the zeros that go with them
    ),
    "layers": Method(
        lambda name: [LayerPruning(1, max_share=1.0, phase=CUT)],
        reached_layers,
        6,
        SHRUNK,
        inert=4,
        modules=BLOCKS,
        backend="aot_eager",
    ),
    # a block that goes while masks live
    "prune+layers+int8": Method(
        lambda name: [
            GradualPruning(SPARSITY, phase=Phase(0.1, 0.3), every=2),
            LayerPruning(1, max_share=1.0, phase=Phase(0.3, 0.5)),
            int8(CALIBRATE, QUANTIZE),
        ],
        reached_shallow_int8,
        6,
        (2, 5, 8, 13, 15, 20),
        inert=2,
        modules=BLOCKS,
    ),
    "distil": Method(
        lambda name: [
            GradualPruning(SPARSITY, phase=distilled.PRUNE, every=1),
            distilled.teacher_of(name),
        ],
        reached_taught,
        distilled.EPOCHS,
        distilled.SAVED,
        inert=distilled.BEGIN,
        kinds=distilled.TAUGHT,
        options={"limit_val_batches": 1},
    ),
    "distil+int8": Method(
        lambda name: [
            GradualPruning(SPARSITY, phase=Phase(3 / 16, 0.5), every=1),
            int8(Phase(0.5, 0.75), Phase(0.75, 1.0)),
            distilled.teacher_of(name),
        ],
        reached_taught_int8,
        4,
        (1, 3, 7, 10, 13, 15),
        inert=3,
        kinds=distilled.TAUGHT,
        options={"limit_val_batches": 1},
    ),
}
