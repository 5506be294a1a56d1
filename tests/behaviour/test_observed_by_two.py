"""Criteria that observe data, in two processes that see unlike data: both drop the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.callbacks import GradualPruning
from lightning_compress.phase import Phase
from lightning_compress.pruning import (
    APoZ,
    BatchNormScale,
    Channel,
    Criterion,
    Element,
    MeanActivation,
    Movement,
    Taylor,
    Wanda,
)

from ..harness import differences, in_two_processes, make_module, make_trainer
from ..zoo import MLP

CRITERIA: dict[str, Criterion] = {
    "wanda": Wanda(),
    "mean activation": MeanActivation(),
    "apoz": APoZ(),
    "norm": BatchNormScale(),
    "taylor": Taylor(),
    "movement": Movement(),
    "branch": MeanActivation(),
}


class OneLeavesOut(MLP):
    """Every process calls another layer, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x: Tensor) -> Tensor:
        own = self.global_rank if self.training else 0
        return self.net(x + F.relu(self.others[own](x)))


class Inputs(pl.Callback):
    """Remembers the inputs, to show that the processes saw unlike data."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.inputs = batch[0]


def prune(name: str, folder: Path) -> None:
    """What each of the two processes does."""
    torch.manual_seed(0)
    module = OneLeavesOut() if name == "branch" else make_module("conv+bn+residual")
    pattern = Element() if name in ("wanda", "taylor", "movement") else Channel()
    pruning, inputs = GradualPruning(0.5, CRITERIA[name], pattern, phase=Phase(0.4, 0.8), every=1), Inputs()
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "limit_val_batches": 0}
    make_trainer(folder, callbacks=[pruning, inputs], **options).fit(module)
    mine = {
        "weights": {key: p.detach() for key, p in module.named_parameters()},
        "masks": pruning.masks.state_dict(),
        "averages": pruning._observation.seen,
    }
    both: list[Any] = [None, None]
    torch.distributed.all_gather_object(both, (mine, inputs.inputs))
    assert not differences(both[0][0], both[1][0])
    assert differences(both[0][1], both[1][1]), "both saw the same data"
    assert pruning.reached
    assert pruning.masks.sparsity >= 0.3
    if name == "branch":
        assert {key for key in pruning.skipped if key.startswith("others")} == {"others.0", "others.1"}


@pytest.mark.xdist_group("ddp")
def test_two_processes_drop_the_same_weights(tmp_path: Path) -> None:
    found = in_two_processes([(__name__, "prune", [name]) for name in CRITERIA], tmp_path)
    assert found == ["ok"] * len(CRITERIA), "\n".join(found)
