"""Prunes sharded weights in two processes, see ``test_sharded``.

Both processes see the same data, so that a sharded run must be that of a single process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_compress.callbacks import SET, FineTuning, GradualPruning, RigL
from lightning_compress.phase import Phase
from lightning_compress.pruning import LAMP, Block, Channel, Constant, NofM, Random, SparedMagnitude
from lightning_compress.pruning.scopes import keep_groups
from lightning_compress.pruning.sharding import is_sharded, whole

from ..harness import SaveAfter, SeedEachBatch, differences, make_trainer
from ..zoo import BATCH_SIZE, Classifier, classes, noise

EPOCHS = 3
SAVED = (1, 5, 10)  # batches: before the phase, inside and after it
PHASE = Phase(0.25, 0.75)


class Uneven(Classifier):
    """Rows that two processes do not share evenly, a transposed convolution, and weights of few values: many ties."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Dropout(0.1), nn.Linear(33, 5), nn.GELU())
        self.net.extend([nn.Unflatten(1, (5, 1)), nn.ConvTranspose1d(5, 4, 2), nn.Flatten(), nn.Linear(8, 4)])
        for parameter in self.parameters():
            parameter.data = (10 * parameter.data).round() / 10

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for layer in (*(layer for layer in self.net if list(layer.parameters())), self.net):
                fully_shard(layer, mesh=mesh)

    def tensors(self) -> tuple[Tensor, ...]:
        return noise(BATCH_SIZE, 16), classes()


class Zeros(pl.Callback):
    """After every optimizer step, what is masked is zero; and some of it is."""

    most = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for layer in pruning_of(trainer).masks.layers:
            weight, mask = whole(layer.weight.detach()), whole(pruning_of(trainer).masks._masks[layer.name])
            assert not weight[mask == 0].any(), f"{layer.name} lives again"
            self.most = max(self.most, int((mask == 0).sum()))


def pruning_of(trainer: pl.Trainer) -> GradualPruning:
    return next(callback for callback in trainer.callbacks if isinstance(callback, GradualPruning))


def fit(
    pruning: GradualPruning, folder: Path, sharded: bool = True, path: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Train, on from a checkpoint if there is one; all that is left behind, whole."""
    fine_tuning = FineTuning(Phase(0.75, 1.0), "rewind", freeze=["net.0"])
    callbacks = [SeedEachBatch(), pruning, fine_tuning, SaveAfter(folder, SAVED), zeros := Zeros()]
    settings = {"max_epochs": EPOCHS, "limit_val_batches": 0, "use_distributed_sampler": False}
    if sharded:
        in_one_file = options.pop("in_one_file", False)
        settings |= {"devices": 2, "strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=not in_one_file)}
    else:
        settings |= {"strategy": SingleDeviceStrategy("cpu"), "plugins": [LightningEnvironment()]}
    trainer = make_trainer(folder, callbacks=callbacks, **settings, **options)
    module = Uneven()
    trainer.fit(module, ckpt_path=path, weights_only=path and False)
    weights = [layer.weight for layer in pruning.masks.layers]
    assert all(is_sharded(weight) == sharded for weight in weights)
    assert pruning.reached
    assert zeros.most > 0
    state = {name: whole(value) for name, value in module.state_dict().items()}
    optimizer = trainer.optimizers[0].state
    moments = [whole(optimizer[weight]["exp_avg_sq"]) for weight in weights]
    return {"weights": state, "moments": moments, "pruning": pruning.state_dict(), "step": trainer.global_step}


def same_as_single(make: Callable[[], GradualPruning], folder: Path) -> str:
    """ "ok", or where the sharded run differs from a single process."""
    own = folder / f"single{torch.distributed.get_rank() if torch.distributed.is_initialized() else ''}"
    return str(differences(fit(make(), folder), fit(make(), own, sharded=False)) or "ok")


def resumed(in_one_file: bool, folder: Path) -> str:
    """From before, inside and after the phase."""
    folder = folder / f"one_file={in_one_file}"
    expected = fit(make_gradual(), folder, in_one_file=in_one_file)
    for done in SAVED:
        found = fit(make_gradual(), folder / "again", path=folder / f"{done}.ckpt", in_one_file=in_one_file)
        if where := differences(expected, found):
            return f"after {done}: {where}"
    return "ok"


def moved(to_sharded: bool, folder: Path) -> str:
    """A checkpoint of one number of processes goes on in another."""
    folder, again = folder / f"moved_{to_sharded}", folder / f"moved_{to_sharded}_{torch.distributed.get_rank()}"
    expected = fit(make_gradual(), folder, in_one_file=True) if not to_sharded else fit(make_gradual(), again, False)
    torch.distributed.barrier()
    path = (again if to_sharded else folder) / "5.ckpt"
    return str(differences(expected, fit(make_gradual(), again / "again", to_sharded, path)) or "ok")


def halved(folder: Path) -> str:
    """No process holds more than its half of all scores."""
    held = []

    def watched(groups: Any, *args: Any) -> Any:
        held.append(sum(group.numel() for group in groups))
        return keep_groups(groups, *args)

    with patch("lightning_compress.pruning.updates.keep_groups", watched):
        fit(make_gradual(), folder)
    num_weights = sum(module.weight.numel() for module in Uneven().net if hasattr(module, "weight"))
    return "ok" if 0 < max(held) <= num_weights / 2 + 4 else f"{max(held)} of {num_weights}"


def clipped(folder: Path) -> str:
    """Zeros stay zero where gradients are clipped; the norm is summed in another order than by a single process."""
    fit(make_gradual(), folder, gradient_clip_val=0.1)
    return "ok"


def make_gradual(*args: Any, **options: Any) -> GradualPruning:
    return GradualPruning(0.7, *args, **{"phase": PHASE, "every": 1, **options})


METHODS: dict[str, Callable[[], GradualPruning]] = {
    **{scope: partial(make_gradual, scope=scope) for scope in ("global", "layer", "erk")},
    "one-shot": partial(GradualPruning, Constant(0.7), phase=Phase(0.0, 0.1), floor=0.0),
    "floor": partial(make_gradual, floor=0.9, targets={"net.3": 0.4}),
    "lamp": partial(make_gradual, LAMP()),
    "spared": partial(make_gradual, SparedMagnitude()),
    "random": partial(make_gradual, Random()),
    "channel": partial(make_gradual, None, Channel()),
    "block": partial(make_gradual, None, Block(1, 4), exclude=["net.3"]),
    "n of m": partial(GradualPruning, 0.5, pattern=NofM(2, 4), phase=PHASE, every=1),
    "rigl": partial(RigL, 0.7, every=2),
    "set": partial(SET, 0.7, every=2),
}
CASES: dict[str, Callable[[Path], str]] = {
    **{name: partial(same_as_single, make) for name, make in METHODS.items()},
    "resume from a folder": partial(resumed, False),
    "resume from a file": partial(resumed, True),
    "one process goes on": partial(moved, False),
    "two processes go on": partial(moved, True),
    "clipped": clipped,
    "halved": halved,
}


def prune(name: str, folder: Path) -> None:
    """What each of the two processes does; they share the folder."""
    found = CASES[name](folder)
    assert found == "ok", found
