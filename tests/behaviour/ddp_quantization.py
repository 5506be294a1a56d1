"""Trains every module of the zoo with learned scales and histograms in two processes; run by torch.distributed.run."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lightning_compress.callbacks import QuantizationAwareTraining
from lightning_compress.phase import Phase
from lightning_compress.quantization import Affine, Percentile, Scheme
from lightning_compress.quantization.prepare import prepared

from ..harness import callback_of, differences, make_module, make_trainer, snapshot
from .ddp import write
from .test_quantization import IN_TWO_PROCESSES, LEARNED, make


class Counted(Percentile):
    """Remembers how many values this process showed it."""

    num_values = 0

    def update(self, state: Tensor, values: Tensor) -> Tensor:
        Counted.num_values += values.numel()
        return super().update(state, values)


def train(method: str, name: str, folder: Path) -> str:
    """ "ok", or what is wrong."""
    module = make_module(name)
    if method == "options":
        options = QuantizationAwareTraining(phase=None, equalize=True, correct_bias=True)
        trainer = make_trainer(folder, callbacks=[options], devices=2, strategy="ddp")
    else:
        trainer = make(folder, method, devices=2, strategy="ddp_find_unused_parameters_true")
    if method == "ptq":
        Counted.num_values = 0
        scheme = Scheme(Affine(8, symmetric=True), observer=Counted(0.999))
        index = trainer.callbacks.index(callback_of(trainer, QuantizationAwareTraining))
        trainer.callbacks[index] = QuantizationAwareTraining(scheme, Phase(1 / 3, 1.0), None)
    trainer.validate(module, verbose=False) if method == "options" else trainer.fit(module)
    found = prepared(module)
    mine = {
        "weights": {n: p.detach() for n, p in module.named_parameters()},
        "states": {place: a.state for place, a in found.activations.items()},
        "learned": {place: log.detach() for place, log in found.learned().items()},
        "moments": snapshot(trainer, module)["callbacks"]["QuantizationAwareTraining"].get("optimizer"),
        "num_values": [Counted.num_values],
    }
    both: list[dict] = [{}, {}]
    torch.distributed.all_gather_object(both, mine)
    shown = sum(each.pop("num_values")[0] for each in both)
    if wrong := differences(*both):
        return f"the ranks differ: {wrong[:2]}"
    if bool(mine["learned"]) != (method in LEARNED):
        return f"learned: {list(mine['learned'])}"
    counted = sum(int(state[2:].sum()) for state in mine["states"].values())
    if method == "ptq" and (counted != shown or not shown):
        return f"{shown} values were shown and {counted} counted"
    return "ok" if found.enabled and all(a.enabled for a in found.activations.values()) else "not quantized"


def main(path: Path) -> None:
    """All methods and modules."""
    cells = {f"{method}-{name}": (method, name) for method, name in IN_TWO_PROCESSES}
    with tempfile.TemporaryDirectory() as folder:
        write(path, list(cells), lambda cell: train(*cells[cell], Path(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
