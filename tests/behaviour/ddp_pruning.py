"""Prunes by what was observed in two processes; run by torch.distributed.run, writes what each criterion came to."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
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

from ..harness import make_module, make_trainer
from ..zoo import MLP
from .ddp import write

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


def train(name: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    torch.manual_seed(0)
    module = OneLeavesOut() if name == "branch" else make_module("conv+bn+residual")
    pattern = Element() if name in ("wanda", "taylor", "movement") else Channel()
    pruning, inputs = GradualPruning(0.5, CRITERIA[name], pattern, phase=Phase(0.4, 0.8), every=1), Inputs()
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "limit_val_batches": 0}
    trainer = make_trainer(folder, callbacks=[pruning, inputs], **options)
    trainer.fit(module)
    assert pruning.masks is not None
    assert pruning._observation is not None
    seen = pruning._observation.seen
    bits = [entry["bits"].float() for entry in pruning.masks.state_dict().values()]
    mine = torch.cat([t.detach().flatten() for t in (*module.parameters(), *bits, *(seen[k] for k in sorted(seen)))])
    for what, values, alike in (("weights, masks or averages", mine, True), ("inputs", inputs.inputs.flatten(), False)):
        first = values.clone()
        torch.distributed.broadcast(first, 0)
        same = torch.tensor(int(torch.equal(values, first)))
        torch.distributed.all_reduce(same, torch.distributed.ReduceOp.MIN)
        if bool(same) != alike:
            return f"the {what} of the processes are {'unlike' if alike else 'alike'}"
    if not pruning.reached or pruning.masks.sparsity < 0.3:
        return f"sparsity {pruning.masks.sparsity}"
    left_out = {key for key in pruning.skipped if key.startswith("others")}
    return "ok" if (name != "branch" or left_out == {"others.0", "others.1"}) else f"skipped {pruning.skipped}"


def main(path: Path) -> None:
    """All criteria."""
    with tempfile.TemporaryDirectory() as folder:
        write(path, list(CRITERIA), lambda name: train(name, Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
