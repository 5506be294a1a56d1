"""Nets for tables and cells: TabNet, FT-Transformer, and scvi-tools' own training plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .wrapped import BATCH_SIZE, NUM_SAMPLES, Made, loader, pairs

__all__ = ["MODELS"]

_CLASSES = 4
_COLUMNS = 12


def _tabnet() -> Made:
    from pytorch_tabnet.tab_network import TabNet

    net = TabNet(
        _COLUMNS, _CLASSES, n_d=16, n_a=16, n_steps=2, virtual_batch_size=4, group_attention_matrix=torch.eye(_COLUMNS)
    )
    return pairs(net, torch.randn(NUM_SAMPLES, _COLUMNS), torch.randint(0, _CLASSES, (NUM_SAMPLES,)), _first)


def _first(outputs: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs[0], target)


class _Numbers(nn.Module):
    """An FT-Transformer on numbers alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.net(x, None)


def _ft_transformer() -> Made:
    from rtdl_revisiting_models import FTTransformer

    net = FTTransformer(
        n_cont_features=_COLUMNS,
        cat_cardinalities=[],
        d_out=_CLASSES,
        n_blocks=2,
        d_block=64,
        attention_n_heads=4,
        attention_dropout=0.1,
        ffn_d_hidden=128,
        ffn_d_hidden_multiplier=None,
        ffn_dropout=0.1,
        residual_dropout=0.0,
    )
    return pairs(
        _Numbers(net),
        torch.randn(NUM_SAMPLES, _COLUMNS),
        torch.randint(0, _CLASSES, (NUM_SAMPLES,)),
        nn.functional.cross_entropy,
    )


def _cells() -> Made:
    import numpy as np
    from anndata import AnnData
    from scvi import REGISTRY_KEYS
    from scvi.module import VAE
    from scvi.train import TrainingPlan

    counts = np.random.default_rng(0).poisson(1.0, (NUM_SAMPLES, 50)).astype("float32")
    assert AnnData is not None
    net = VAE(n_input=50, n_hidden=64, n_latent=8, n_layers=1)
    samples = [
        {
            REGISTRY_KEYS.X_KEY: torch.from_numpy(row),
            REGISTRY_KEYS.BATCH_KEY: torch.zeros(1, dtype=torch.long),
            REGISTRY_KEYS.LABELS_KEY: torch.zeros(1, dtype=torch.long),
        }
        for row in counts
    ]
    return Made(TrainingPlan(net), loader(samples), loader(samples[: 2 * BATCH_SIZE]), {"module": net})


MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "TabNet": ("pytorch-tabnet", _tabnet),
    "FT-Transformer": ("rtdl_revisiting_models", _ft_transformer),
    "scVI": ("scvi-tools", _cells),
}
