"""Trains every module with RigL and N:M in two processes; run by torch.distributed.run, writes what each came to."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ..harness import make_module
from ..zoo import MODULES
from .ddp import ranks_agree, write
from .test_methods import METHODS, assert_reached, make


def train(method: str, name: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    module = make_module(name)
    trainer = make(folder, method, devices=2, strategy="ddp_find_unused_parameters_true")
    trainer.fit(module)
    same = ranks_agree(module.parameters())
    assert_reached(trainer, method)
    return "ok" if same else "the ranks differ"


def main(path: Path) -> None:
    """All methods and modules."""
    cells = {f"{method}-{name}": (method, name) for method in METHODS for name in MODULES}
    with tempfile.TemporaryDirectory() as folder:
        write(path, list(cells), lambda cell: train(*cells[cell], Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
