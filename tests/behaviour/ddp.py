"""Trains every module of the zoo in two processes; run by torch.distributed.run, writes what each came to."""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from lightning_compress.analysis.inspect import sparsity
from lightning_compress.callbacks import GradualPruning
from lightning_compress.quantization.prepare import prepared

from ..harness import SPARSITY, callback_of, make_module, make_trainer
from ..zoo import MODULES


def train(name: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    module = make_module(name)
    trainer = make_trainer(folder, devices=2, strategy="ddp_find_unused_parameters_true")
    trainer.fit(module)
    layers = callback_of(trainer, GradualPruning).masks.layers
    quantization = prepared(module)
    ranges = torch.stack([a.range for a in quantization.activations.values()])
    if not ranks_agree([*module.parameters(), ranges]):
        return "the ranks differ"
    if sparsity(layers) < SPARSITY:
        return f"sparsity {sparsity(layers)}"
    return "ok" if quantization.enabled else "not quantized"


def ranks_agree(values: Iterable[torch.Tensor]) -> bool:
    """Whether all processes hold the same values, bit for bit; called by all of them."""
    mine = torch.cat([value.detach().flatten().float() for value in values])
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    same = torch.tensor(int(torch.equal(mine, first)))
    torch.distributed.all_reduce(same, torch.distributed.ReduceOp.MIN)
    return bool(same)


def write(path: Path, names: list[str], train: Callable[[str], str]) -> None:
    """Run all names, and write what each came to."""
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = train(name)
        except Exception:
            found[name] = traceback.format_exc()[-2000:]
            break  # the other process may be elsewhere by now
    well = all(v == "ok" for v in found.values())
    if torch.distributed.get_rank() == 0 or not well:
        path.write_text(json.dumps({**dict.fromkeys(names, "not reached"), **found}))
    if well:  # a process that ends with gloo's threads running is at times aborted by them (pytorch#179291)
        torch.distributed.destroy_process_group()


def main(path: Path) -> None:
    """All modules."""
    with tempfile.TemporaryDirectory() as folder:
        write(path, list(MODULES), lambda name: train(name, Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
