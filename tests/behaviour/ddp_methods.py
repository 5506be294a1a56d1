"""Trains every module with RigL and N:M in two processes; run by torch.distributed.run, writes what each came to."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch

from ..harness import make_module
from ..zoo import MODULES
from .test_methods import METHODS, assert_reached, make


def train(method: str, name: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    module = make_module(name)
    trainer = make(folder, method, devices=2, strategy="ddp_find_unused_parameters_true")
    trainer.fit(module)
    mine = torch.cat([p.detach().flatten() for p in module.parameters()])
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    same = torch.tensor(int(torch.equal(mine, first)))
    torch.distributed.all_reduce(same, torch.distributed.ReduceOp.MIN)
    assert_reached(trainer, method)
    return "ok" if same else "the ranks differ"


def main(path: Path) -> None:
    """All methods and modules."""
    cells = [(method, name) for method in METHODS for name in MODULES]
    found = dict.fromkeys((f"{method}-{name}" for method, name in cells), "not reached")
    with tempfile.TemporaryDirectory() as folder:
        for method, name in cells:
            try:
                found[f"{method}-{name}"] = train(method, name, Path(folder))
            except Exception:
                found[f"{method}-{name}"] = traceback.format_exc()[-2000:]
                break  # the other process may be elsewhere by now
    if torch.distributed.get_rank() == 0 or any(v != "ok" for v in found.values()):
        path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
