"""Trains every module of the zoo in two processes while it shrinks; run by torch.distributed.run."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from ..harness import differences, make_module, make_trainer, snapshot
from ..zoo import MODULES
from .ddp import write
from .test_structured import BLOCKS, METHODS, SHRINKS, shapes


def train(method: str, name: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    module = make_module(name)
    callback = METHODS[method]()
    options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    trainer = make_trainer(folder, callbacks=[callback], **options)
    before = shapes(module)
    trainer.fit(module)
    mine = [{n: p.detach() for n, p in module.named_parameters()}, snapshot(trainer, module)["optimizers"]]
    both = [None, None]
    torch.distributed.all_gather_object(both, mine)
    if wrong := differences(*both):
        return f"the ranks differ: {wrong[:2]}"
    if callback.shrinks != callback.steps:
        return f"{callback.shrinks} shrinks"
    return (
        "ok" if (shapes(module) != before) == (name in (SHRINKS if method == "channels" else BLOCKS)) else "as before"
    )


def main(path: Path) -> None:
    """All modules."""
    with tempfile.TemporaryDirectory() as folder:
        names = [
            f"{method} {name}" for method, names in (("channels", list(MODULES)), ("layers", BLOCKS)) for name in names
        ]
        write(path, names, lambda name: train(*name.split(" "), Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
