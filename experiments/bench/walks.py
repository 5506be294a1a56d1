"""How many of the product's files a reader passes on two walks: a weight to its checkpoint, an activation to its file.

    python -m experiments.bench walks
    git worktree add ../before COMMIT && python -m experiments.bench walks ../before .

Each walk is run in each tree, which need not be installed. A file is on the walk if one of its functions is called;
what runs while it is imported does not count.

- weight: ``GradualPruning`` and ``ChannelPruning`` in one ``fit``, a checkpoint, ``load_from_checkpoint``.
- activation: ``QuantizationAwareTraining`` in one ``fit``, and ``Export`` to ONNX.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_WALKS = ("weight", "activation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which trees to walk through."""
    parser.add_argument("trees", type=Path, nargs="*", default=[Path()], help="folders of a checkout; this one without")


def run(trees: list[Path]) -> dict[str, Any]:
    """A row per file, a column per tree and walk; the headline counts the files of the last tree."""
    found = {(str(tree), walk): _files(tree, walk) for tree in trees for walk in _WALKS}
    files = sorted(set().union(*found.values()))
    rows = [{"file": file} | {f"{walk} {tree}": file in on for (tree, walk), on in found.items()} for file in files]
    totals = {"file": "files"} | {f"{walk} {tree}": len(on) for (tree, walk), on in found.items()}
    return {"headline": {walk: len(found[str(trees[-1]), walk]) for walk in _WALKS}, "rows": [*rows, totals]}


def _files(tree: Path, walk: str) -> set[str]:
    """The files on a walk, in a process that sees this tree alone as the package."""
    with TemporaryDirectory() as folder:
        package = Path(folder, "lightning_compress")
        package.mkdir()
        for path in (*(tree / "lightning_compress").iterdir(), tree / "callbacks", tree / "conf"):
            (package / path.name).symlink_to(path.resolve())
        command = [sys.executable, __file__, walk, str(package)]
        environment = {**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The walk {walk!r} fails in {tree}: {done.stderr.strip().splitlines()[-1]}")
    return set(json.loads(done.stdout.splitlines()[-1]))


def _walk(name: str, package: Path) -> list[str]:
    """Train, and return the files of the package in which a function was called."""
    import lightning.pytorch as pl
    import torch
    from torch import nn

    import lightning_compress
    from lightning_compress.callbacks import ChannelPruning, Export, GradualPruning, QuantizationAwareTraining
    from lightning_compress.phase import Phase

    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.TensorDataset(torch.randn(64, 1, 8, 8), torch.randint(3, (64,)))
    callbacks: dict[str, list[pl.Callback]] = {
        "weight": [GradualPruning(0.5, phase=Phase(0.1, 0.4)), ChannelPruning(0.5, phase=Phase(0.5, 0.8))],
        "activation": [QuantizationAwareTraining(), Export(["onnx"])],
    }
    trainer = pl.Trainer(
        max_epochs=4,
        callbacks=callbacks[name],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Net()
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    seen: set[str] = set()

    def note(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(note)
    trainer.fit(module, loader, loader)
    if name == "weight":
        trainer.save_checkpoint("last.ckpt")
        lightning_compress.load_from_checkpoint(Net, "last.ckpt")
    sys.setprofile(None)
    return sorted(str(Path(file).relative_to(package)) for file in seen if Path(file).is_relative_to(package))


if __name__ == "__main__":
    print(json.dumps(_walk(sys.argv[1], Path(sys.argv[2]))))
