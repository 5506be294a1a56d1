"""Teaches every module of the zoo in two processes; run by torch.distributed.run, writes what each came to."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from ..harness import callback_of
from ..zoo import MODULES
from .distilled import KnowledgeDistillation, make_module, make_trainer, teacher_of


def train(name: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    module, options = make_module(name), {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    trainer = make_trainer(folder, teacher_of(name), **options)
    trainer.fit(module)
    state = callback_of(trainer, KnowledgeDistillation).state_dict()["teacher"]
    taught = torch.cat([p.detach().flatten().float() for p in (*module.parameters(), *state.values())])
    first = taught.clone()
    torch.distributed.broadcast(first, 0)
    same = torch.tensor(int(torch.equal(taught, first)))
    torch.distributed.all_reduce(same, torch.distributed.ReduceOp.MIN)
    if not same:
        return "the ranks differ"
    plain, trainer = make_module(name), make_trainer(folder, teacher_of(name, alpha=0.0), **options)
    trainer.fit(plain)
    moved = any(not torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    return "ok" if moved else "not taught"


def main(path: Path) -> None:
    """All modules."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODULES:
            try:
                found[name] = train(name, Path(folder))
            except Exception:
                found[name] = traceback.format_exc()[-2000:]
                break  # the other process may be elsewhere by now
    if torch.distributed.get_rank() == 0 or any(v != "ok" for v in found.values()):
        path.write_text(json.dumps({**dict.fromkeys(MODULES, "not reached"), **found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
