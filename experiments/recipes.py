"""Our recipes for the accuracy benchmarks: one for every task and operating point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from experiments.training import Budget, fit, fitted
from lightning_compress.callbacks import (
    ChannelPruning,
    GradualPruning,
    KnowledgeDistillation,
    QuantizationAwareTraining,
)
from lightning_compress.deploy.files import write_files
from lightning_compress.deploy.formats import FORMATS
from lightning_compress.forward import Inputs
from lightning_compress.phase import Phase
from lightning_compress.pruning import LAMP
from lightning_compress.quantization import (
    AdditivePowerOfTwo,
    Affine,
    Exponential,
    LearnedStep,
    MovingAverage,
    PowerOfTwo,
    Scheme,
    Ternary,
    apot4,
    codebook,
    exp4,
    int8,
    log4,
    lsq,
    ternary,
    w2a8,
    w4a8,
)

__all__ = ["DISTILLED", "OURS", "QUANTIZED", "SCHEMES", "STRUCTURED_OURS", "sparse_with_8_bits", "with_bits"]

Method = Callable[[nn.Module, Budget, float], nn.Module]


def pruned(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Half layer-adaptive magnitudes, taught by the model as it was."""
    prune = GradualPruning(sparsity, LAMP(power=0.5), phase=Phase(0.0, 0.5), every=10)
    return fit(model, budget, [prune, KnowledgeDistillation(temperature=4.0)])


def narrowed(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """Channels leave at once, before the first step; then the model as it was teaches what is left.

    In fours, which kernels of depthwise convolutions take: with 22 channels they are slower than with 64.
    """
    shrink = ChannelPruning(1 - 1 / fewer, phase=Phase(0.0, 0.0), target="macs", scope="local", round_to=4)
    return fit(model, budget, [shrink, KnowledgeDistillation(alpha=0.5, temperature=2.0)])


def _quantize(scheme: Scheme, learning_rate: float = 1e-3) -> QuantizationAwareTraining:
    """Nearly the whole run in quantized values, whose ranges follow the last ten batches or so."""
    scheme = replace(scheme, observer=MovingAverage(0.1))
    return QuantizationAwareTraining(scheme, Phase(0.0, 0.02), Phase(0.02, 1.0), 0.9, learning_rate)


def quantized(scheme: Scheme) -> Method:
    """A scheme alone, without a teacher."""
    return lambda model, budget, target: fit(model, budget, [_quantize(scheme)])


def learned_at_its_rate(model: nn.Module, budget: Budget, target: float) -> nn.Module:
    """Weights and activations of 4 bits, whose steps are learned at the rate of the weights."""
    return fit(model, budget, [_quantize(lsq(4), budget.rate)])


def ternarized(model: nn.Module, budget: Budget, target: float) -> nn.Module:
    """A scale a channel, fitted at every step, taught by the model as it was."""
    return fit(model, budget, [_quantize(Scheme(Ternary())), KnowledgeDistillation(alpha=0.5, temperature=4.0)])


def sparse_int8(teacher: bool) -> Method:
    """Pruned in the first half, then trained in int8; with or without a teacher."""

    def method(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
        prune = GradualPruning(sparsity, LAMP(power=0.5), phase=Phase(0.0, 0.5), every=10)
        scheme = replace(int8(), observer=MovingAverage(0.1))
        quantize = QuantizationAwareTraining(scheme, Phase(0.5, 0.52), Phase(0.52, 1.0), 0.9)
        return fit(model, budget, [prune, quantize, *([KnowledgeDistillation(temperature=4.0)] if teacher else [])])

    return method


def with_bits(model: nn.Module, budget: Budget, bits: float) -> nn.Module:
    """Weights of so many bits, whose steps are learned, and activations of 8.

    Without a teacher, which costs more than it gives at 2 bits.
    """
    return fitted(model, budget, [_quantize(Scheme(LearnedStep(int(bits), symmetric=True)))])


def sparse_with_8_bits(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Pruned in the first half, then trained in int8, taught by the model as it was."""
    prune = GradualPruning(sparsity, LAMP(power=0.5), phase=Phase(0.0, 0.5), every=10)
    scheme = replace(int8(), observer=MovingAverage(0.1))
    quantize = QuantizationAwareTraining(scheme, Phase(0.5, 0.52), Phase(0.52, 1.0), 0.9)
    return fitted(model, budget, [prune, quantize, KnowledgeDistillation(temperature=4.0)])


def write_quantized(model: nn.Module, example: Tensor, folder: Path) -> Path:
    """The .onnx file of integers; codes of at most 4 bits stand two to a byte."""
    kind = FORMATS["onnx"]
    return write_files(kind, model.eval(), Inputs((example,), {}), folder / "model.onnx", (1,)).shipped[1]


def taught(scheme: Scheme) -> Method:
    """A scheme, taught by the model as it was."""
    return lambda model, budget, target: fit(
        model, budget, [_quantize(scheme), KnowledgeDistillation(alpha=0.5, temperature=4.0)]
    )


SCHEMES = {
    "int8": int8(),
    "int8 exact": int8(exact_kernels=True),
    "w4a8": w4a8(),
    "log4": log4(),
    "exp4": exp4(),
    "apot4": apot4(),
    "codebook4": codebook(4),
    "affine4": Scheme(Affine(4, symmetric=True)),
    "affine3": Scheme(Affine(3, symmetric=True)),
    "w3a8": Scheme(LearnedStep(3, symmetric=True)),
    "log3": Scheme(PowerOfTwo(3)),
    "exp3": Scheme(Exponential(3)),
    "apot3": Scheme(AdditivePowerOfTwo(3)),
    "ternary_alone": ternary(),
}

OURS: dict[str, Method] = {"ours": pruned}
DISTILLED: dict[str, Method] = {
    "ternary, fitted": quantized(Scheme(Ternary())),
    "ternary, fitted + teacher": taught(Scheme(Ternary())),
    "w2a8": quantized(w2a8()),
    "w2a8 + teacher": taught(w2a8()),
    "sparse int8": sparse_int8(teacher=False),
    "sparse int8 + teacher": sparse_int8(teacher=True),
}
STRUCTURED_OURS: dict[str, Method] = {"ours, channels": narrowed}
QUANTIZED: dict[str, Method] = {
    "ternary": ternarized,
    "lsq4": learned_at_its_rate,
    **{name: quantized(scheme) for name, scheme in SCHEMES.items()},
}
