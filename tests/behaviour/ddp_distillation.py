"""Teaches every module of the zoo in two processes; run by torch.distributed.run, writes what each came to."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from ..harness import callback_of
from ..zoo import MODULES
from .ddp import ranks_agree, write
from .distilled import KnowledgeDistillation, make_module, make_trainer, teacher_of


def train(name: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    module, options = make_module(name), {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    trainer = make_trainer(folder, teacher_of(name), **options)
    trainer.fit(module)
    state = callback_of(trainer, KnowledgeDistillation).state_dict()["teacher"]
    if not ranks_agree((*module.parameters(), *state.values())):
        return "the ranks differ"
    plain, trainer = make_module(name), make_trainer(folder, teacher_of(name, alpha=0.0), **options)
    trainer.fit(plain)
    moved = any(not torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    return "ok" if moved else "not taught"


def main(path: Path) -> None:
    """All modules."""
    with tempfile.TemporaryDirectory() as folder:
        write(path, list(MODULES), lambda name: train(name, Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
