"""Nets for graphs and molecules: of PyTorch Geometric, and chemprop's own LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .wrapped import BATCH_SIZE, NUM_SAMPLES, Made, Wrapped

__all__ = ["MODELS"]

_CLASSES = 4
_FEATURES = 16
_SMILES = ("CCO", "c1ccccc1", "CC(=O)O", "CCN", "CCOC", "c1ccncc1", "CC(C)O", "CCCl")


class OnGraphs(Wrapped):
    """A net of nodes and edges that classifies nodes."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:  # type: ignore[override]
        """What the net says of each node."""
        return self.net(x, edge_index)

    def _loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch.x, batch.edge_index), batch.y)


def _graphs(name: str, **fields: Any) -> Made:
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import models

    net = getattr(models, name)(_FEATURES, 64, 2, _CLASSES, **fields)
    found = [
        Data(
            x=torch.randn(10, _FEATURES),
            edge_index=torch.randint(0, 10, (2, 30)),
            y=torch.randint(0, _CLASSES, (10,)),
        )
        for _ in range(NUM_SAMPLES)
    ]
    train, val = (DataLoader(found[:num], BATCH_SIZE) for num in (NUM_SAMPLES, 2 * BATCH_SIZE))
    return Made(OnGraphs(net), train, val, {"net": net})


def _chemprop() -> Made:
    from chemprop import data, models
    from chemprop import nn as parts

    points = [data.MoleculeDatapoint.from_smi(smiles, [float(len(smiles))]) for smiles in _SMILES * 4]
    found = data.MoleculeDataset(points)
    module = models.MPNN(
        parts.BondMessagePassing(d_h=64, depth=2),
        parts.MeanAggregation(),
        parts.RegressionFFN(input_dim=64, hidden_dim=64),
    )
    train, val = (data.build_dataloader(found, batch_size=BATCH_SIZE, num_workers=0, shuffle=False) for _ in range(2))
    return Made(module, train, val, {})


MODELS: dict[str, tuple[str, Callable[[], Made]]] = {
    "GCN": ("torch_geometric", partial(_graphs, "GCN")),
    "GAT": ("torch_geometric", partial(_graphs, "GAT", heads=4)),
    "GraphSAGE": ("torch_geometric", partial(_graphs, "GraphSAGE")),
    "GIN": ("torch_geometric", partial(_graphs, "GIN")),
    "MPNN": ("chemprop", _chemprop),
}
