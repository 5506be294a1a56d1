"""Our recipes for the accuracy benchmarks: one for every task and operating point."""

from __future__ import annotations

from collections.abc import Callable

from lightning_compress.callbacks import ChannelPruning, GradualPruning, KnowledgeDistillation
from torch import Tensor, nn

from experiments.baselines import Budget, fit
from lightning_compress.layers import Layer
from lightning_compress.phase import Phase
from lightning_compress.pruning import Criterion

__all__ = ["OURS", "STRUCTURED_OURS", "Spared"]


class Spared(Criterion):
    """Magnitude that keeps as many weights of each layer as it has outputs: none is emptied, however thin."""

    def score(self, layer: Layer) -> Tensor:
        """|w|, far above all others for the largest of the layer."""
        flat = layer.weight.detach().abs().flatten()
        flat[flat.topk(layer.weight.shape[layer.out_axis]).indices] *= 1e6
        return flat.view_as(layer.weight)


def pruned(model: nn.Module, budget: Budget, sparsity: float) -> nn.Module:
    """Global magnitude that spares thin layers, taught by the model as it was."""
    prune = GradualPruning(sparsity, Spared(), phase=Phase(0.0, 0.5), every=10)
    return fit(model, budget, [prune, KnowledgeDistillation(temperature=4.0)])


def narrowed(model: nn.Module, budget: Budget, fewer: float) -> nn.Module:
    """Channels leave in five steps over the first quarter, taught by the model as it was."""
    shrink = ChannelPruning(1 - 1 / fewer, phase=Phase(0.0, 0.25), steps=5, target="macs", scope="local")
    return fit(model, budget, [shrink, KnowledgeDistillation(temperature=4.0)])


OURS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {"ours": pruned}
STRUCTURED_OURS: dict[str, Callable[[nn.Module, Budget, float], nn.Module]] = {"ours, channels": narrowed}
