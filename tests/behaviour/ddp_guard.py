"""Guards a run of two processes; run by torch.distributed.run, writes what each came to."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from lightning_compress.callbacks import AccuracyGuard

from .ddp import ranks_agree, write
from .test_guard import ALLOWED, Priced, make, priced, sparsity, steered, weight_layers


def train(cell: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    Priced.allowed_bits = 3
    guard, module = AccuracyGuard(0.01), priced()
    make(folder, guard, *steered(cell == "bits"), devices=2, strategy="ddp").fit(module)
    if not ranks_agree(module.parameters()):
        return "the ranks differ"
    if not (0.49 if cell == "bits" else 0.7) < sparsity(weight_layers(module)) <= ALLOWED + 0.001:
        return f"sparsity {sparsity(weight_layers(module))}"
    return "ok" if cell != "bits" or guard.level == {"bits": 3} else f"{guard.level}"


def main(path: Path) -> None:
    """Both kinds of steps."""
    with tempfile.TemporaryDirectory() as folder:
        write(path, ["sparsity", "bits"], lambda cell: train(cell, Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
