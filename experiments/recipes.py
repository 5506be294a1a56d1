"""Our recipes for the accuracy benchmarks: one for every task and operating point."""

from __future__ import annotations

from collections.abc import Callable

from lightning_compress.callbacks import ChannelPruning, GradualPruning, KnowledgeDistillation
from torch import Tensor, nn

from experiments.baselines import Budget, fit
from lightning_compress.layers import Layer
from lightning_compress.phase import Phase
from lightning_compress.pruning import LAMP, Criterion

__all__ = ["OURS", "STRUCTURED_OURS", "HalfAdaptive"]


class HalfAdaptive(Criterion):
    """Between magnitude, which empties thin layers, and LAMP, which spares them too much: their geometric mean."""

    def score(self, layer: Layer) -> Tensor:
        """|w| sqrt(LAMP(w)), which is w^2 / sqrt(sum of u^2 over all |u| >= |w|)."""
        return layer.weight.detach().abs() * LAMP().score(layer).sqrt()


def pruned(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Half layer-adaptive magnitudes, taught by the model as it was."""
    prune = GradualPruning(sparsity, HalfAdaptive(), phase=Phase(0.0, 0.5), every=10)
    return fit(model, budget, [prune, KnowledgeDistillation(temperature=4.0)])


def narrowed(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """Channels leave in five steps over the first quarter, taught by the model as it was."""
    shrink = ChannelPruning(1 - 1 / fewer, phase=Phase(0.0, 0.25), steps=5, target="macs", scope="local")
    return fit(model, budget, [shrink, KnowledgeDistillation(temperature=4.0)])


OURS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {"ours": pruned}
STRUCTURED_OURS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {"ours, channels": narrowed}
