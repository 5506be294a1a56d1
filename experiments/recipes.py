"""Our recipes for the accuracy benchmarks: one for every task and operating point."""

from __future__ import annotations

from collections.abc import Callable

from lightning_compress.callbacks import ChannelPruning, GradualPruning, KnowledgeDistillation
from torch import nn

from experiments.baselines import Budget, fit
from lightning_compress.phase import Phase
from lightning_compress.pruning import LAMP

__all__ = ["OURS", "STRUCTURED_OURS"]


def pruned(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Half layer-adaptive magnitudes, taught by the model as it was."""
    prune = GradualPruning(sparsity, LAMP(power=0.5), phase=Phase(0.0, 0.5), every=10)
    return fit(model, budget, [prune, KnowledgeDistillation(temperature=4.0)])


def narrowed(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """Channels leave at once, before the first step; then the model as it was teaches what is left."""
    shrink = ChannelPruning(1 - 1 / fewer, phase=Phase(0.0, 0.0), target="macs", scope="local")
    return fit(model, budget, [shrink, KnowledgeDistillation(alpha=0.5, temperature=2.0)])


OURS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {"ours": pruned}
STRUCTURED_OURS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {"ours, channels": narrowed}
