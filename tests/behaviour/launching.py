"""What is particular to processes that the Trainer launches: what cannot come back, and what comes back as an error."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException

from lightning_compress.callbacks import ChannelPruning, GradualPruning, PostTrainingQuantization
from lightning_compress.callbacks.sweep import StopUnderperforming
from lightning_compress.callbacks.verdict import TargetMissed, targets_of
from lightning_compress.phase import Phase
from lightning_compress.quantization.model import quantization_of

from ..harness import differences
from .plain import Plain
from .ranks import CASES


def make(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp_fork",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return pl.Trainer(**{**settings, **options})


def strict(folder: Path) -> None:
    """What a strict callback misses is raised where fit was called, and the model is there then."""
    pruning = ChannelPruning(0.9, phase=Phase(0.1, 0.3), floor=0.8, strict=True)
    trainer, module = make(folder, pruning), Plain()
    before = sum(p.numel() for p in module.parameters())
    with pytest.raises(TargetMissed, match=r"ChannelPruning.* channels"):
        trainer.fit(module)
    assert sum(p.numel() for p in module.parameters()) < before
    assert module(torch.zeros(2, 16)).shape == (2, 4)
    assert [row["missed"] for row in targets_of(trainer)] == [True]


class LaterHead(Plain):
    """Has a layer that is made when the run begins."""

    def make_head(self) -> None:
        if not hasattr(self, "head"):
            torch.manual_seed(0)
            self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


class HeadOfSetup(LaterHead):
    def setup(self, stage: str) -> None:
        self.make_head()


class HeadOfConfigureModel(LaterHead):
    def configure_model(self) -> None:
        self.make_head()


def layers_of_setup(folder: Path) -> None:
    """They could not come back: refused before the first step."""
    trainer = make(folder, GradualPruning(0.5))
    made = r"HeadOfSetup.setup makes head.bias, head.weight .*strategy='ddp'"
    with pytest.raises(ProcessRaisedException, match=made):
        trainer.fit(HeadOfSetup())


class HeadOfBoth(HeadOfSetup):
    def configure_model(self) -> None:
        """Makes no head, which nobody can know before."""


def layers_of_both(folder: Path) -> None:
    """Where they cannot be told apart beforehand, it is said that the model here is not the trained one."""
    trainer, module = make(folder, GradualPruning(0.5)), HeadOfBoth()
    with pytest.warns(UserWarning, match=r"The trained model has head.bias, head.weight, .* it is not the trained one"):
        trainer.fit(module)
    assert not hasattr(module, "head")


def layers_of_configure_model(folder: Path) -> None:
    """They are made here, too, and pruned as there."""
    trainer, module = make(folder, pruning := GradualPruning(0.5)), HeadOfConfigureModel()
    trainer.fit(module)
    assert pruning.masks is not None
    weights = [layer.weight for layer in pruning.masks.layers]
    assert any(weight is module.head.weight for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == sum(weight.numel() for weight in weights) // 2


def validated(folder: Path) -> None:
    """Quantized by a validation, the model is quantized here, with the weights that were changed for it."""
    callback = PostTrainingQuantization("int8", equalize=True)
    trainer, module = make(folder, callback), Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.validate(module, verbose=False)
    quantization = quantization_of(module)
    assert quantization is not None
    assert quantization.enabled
    assert callback.reached
    assert differences(before, module.state_dict())
    weight = module.net[2].up.weight
    assert all(len(row.unique()) <= 255 for row in weight)
    found = [trainer.validate(module, verbose=False) for _ in range(2)]
    assert found[0] == found[1]


def a_sweep(folder: Path) -> None:
    """A run that another callback would end by an exception: refused, for its sweep would take it for an error."""
    trainer = make(folder, StopUnderperforming(folder / "0", monitor="val_loss"))
    with pytest.raises(ProcessRaisedException, match=r"StopUnderperforming with strategy='ddp_spawn'"):
        trainer.fit(Plain())


def pickled(folder: Path) -> None:
    """A Trainer with any of the callbacks can be sent to a spawned process, before a run and after it."""
    for name, callbacks in CASES.items():
        trainer = make(folder, *callbacks(folder))
        assert len(pickle.loads(pickle.dumps(trainer)).callbacks) == len(trainer.callbacks), name
    for name in ("Channels, prune, QAT", "GradualPruning(Taylor)"):
        trainer, module = make(folder, *CASES[name](folder)), Plain()
        trainer.fit(module)
        sent = pickle.loads(pickle.dumps((trainer, module)))
        assert not differences(module.state_dict(), sent[1].state_dict())


LAUNCHINGS: dict[str, Callable[[Path], None]] = {
    "strict": strict,
    "layers of setup": layers_of_setup,
    "layers of both": layers_of_both,
    "layers of configure_model": layers_of_configure_model,
    "validated": validated,
    "a sweep": a_sweep,
    "pickled": pickled,
}
