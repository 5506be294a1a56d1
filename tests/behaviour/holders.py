"""What else holds a model's weights: optimizers of other people's, averages, and modules that compute their weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import lion_pytorch
import prodigyopt
import pytorch_optimizer
import schedulefree
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from .small import Small

Make = Callable[[Any], Any]


# ---- optimizers


class Modes(Small):
    """Tells its optimizer when it trains and when it is looked at, as schedule-free ones ask for."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.optimizers(use_pl_optimizer=False).train()

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.optimizers(use_pl_optimizer=False).eval()

    def on_train_end(self) -> None:
        self.optimizers(use_pl_optimizer=False).eval()


class Looks(Small):
    """Is validated with the slow weights of a lookahead."""

    def on_validation_epoch_start(self) -> None:
        self.optimizers().optimizer.backup_and_load_cache()

    def on_validation_epoch_end(self) -> None:
        self.optimizers().optimizer.clear_and_load_backup()


class TwoPasses(Small):
    """Steps by a closure that passes once more at other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def passes() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            return loss

        passes()
        self.step(optimizer, passes)

    def step(self, optimizer: Any, passes: Callable[[], Tensor]) -> None:
        optimizer.step(passes)


class ByParts(TwoPasses):
    """The same by the two steps that the optimizer has for it, without its ``step``."""

    def step(self, optimizer: Any, passes: Callable[[], Tensor]) -> None:
        optimizer.optimizer.first_step(zero_grad=True)
        passes()
        optimizer.optimizer.second_step(zero_grad=True)


class OwnLookahead(torch.optim.Optimizer):
    """A wrapper as many people have copied it: it shares groups, hides what it wraps, and keeps lists."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._base = [optimizer]
        self.param_groups = optimizer.param_groups
        self.num = 0

    def step(self, closure: Any = None) -> Any:
        loss = self._base[0].step(closure)
        self.num += 1
        for group in self.param_groups if self.num % 2 == 0 else ():
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", [p.detach().clone()])[0]
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)
        return loss


class Outside(torch.optim.SGD):
    """Remembers something of the weights' shape where nobody looks."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, lr)
        self.first = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        params = [p for group in self.param_groups for p in group["params"]]
        for p, first in zip(params, self.first, strict=True):
            p.data.lerp_(first, 1e-3)
        return loss


def trained_by(optimizer: Make, base: type[Small] = Small) -> type[Small]:
    """A module that this optimizer trains."""

    class Trained(base):  # type: ignore[valid-type,misc]
        def configure_optimizers(self) -> Any:
            return optimizer(list(self.parameters()))

    return Trained


def _muon(params: list[Any]) -> Any:
    return torch.optim.Muon([p for p in params if p.dim() == 2], lr=1e-2)


OPTIMIZERS: dict[str, type[Small]] = {
    "schedulefree.AdamWScheduleFree": trained_by(lambda ps: schedulefree.AdamWScheduleFree(ps, lr=1e-2), Modes),
    "schedulefree.SGDScheduleFree": trained_by(lambda ps: schedulefree.SGDScheduleFree(ps, lr=1e-1), Modes),
    "pytorch_optimizer.ScheduleFreeWrapper": trained_by(
        lambda ps: pytorch_optimizer.ScheduleFreeWrapper(torch.optim.AdamW(ps, 1e-2)), Modes
    ),
    "pytorch_optimizer.Lookahead": trained_by(
        lambda ps: pytorch_optimizer.Lookahead(torch.optim.Adam(ps, 1e-2), k=3), Looks
    ),
    "a Lookahead around SOAP": trained_by(
        lambda ps: pytorch_optimizer.Lookahead(pytorch_optimizer.SOAP(ps, lr=1e-2), k=2), Looks
    ),
    "a Lookahead of a user's own": trained_by(lambda ps: OwnLookahead(torch.optim.Adam(ps, 1e-2))),
    "pytorch_optimizer.SAM": trained_by(
        lambda ps: pytorch_optimizer.SAM(ps, torch.optim.SGD, lr=1e-2, momentum=0.9), TwoPasses
    ),
    "pytorch_optimizer.SAM, by parts": trained_by(
        lambda ps: pytorch_optimizer.SAM(ps, torch.optim.SGD, lr=1e-2, momentum=0.9), ByParts
    ),
    "pytorch_optimizer.SOAP": trained_by(lambda ps: pytorch_optimizer.SOAP(ps, lr=1e-2)),
    "pytorch_optimizer.Shampoo": trained_by(lambda ps: pytorch_optimizer.Shampoo(ps, lr=1e-2)),
    "pytorch_optimizer.Kron": trained_by(lambda ps: pytorch_optimizer.load_optimizer("kron")(ps, lr=1e-3)),
    "pytorch_optimizer.SM3": trained_by(lambda ps: pytorch_optimizer.SM3(ps, lr=1e-2)),
    "pytorch_optimizer.CAME": trained_by(lambda ps: pytorch_optimizer.CAME(ps, lr=1e-3)),
    "pytorch_optimizer.AdEMAMix": trained_by(lambda ps: pytorch_optimizer.AdEMAMix(ps, lr=1e-2)),
    "pytorch_optimizer.Ranger": trained_by(lambda ps: pytorch_optimizer.Ranger(ps, lr=1e-2)),
    "pytorch_optimizer.Ranger21": trained_by(lambda ps: pytorch_optimizer.Ranger21(ps, num_iterations=16, lr=1e-2)),
    "pytorch_optimizer.TRAC": trained_by(lambda ps: pytorch_optimizer.TRAC(torch.optim.AdamW(ps, 1e-2))),
    "prodigyopt.Prodigy": trained_by(lambda ps: prodigyopt.Prodigy(ps)),
    "lion_pytorch.Lion": trained_by(lambda ps: lion_pytorch.Lion(ps, lr=1e-3)),
    "torch.optim.Muon": trained_by(_muon),
    "torch.optim.Adafactor": trained_by(lambda ps: torch.optim.Adafactor(ps, lr=1e-2)),
    "torch.optim.LBFGS": trained_by(lambda ps: torch.optim.LBFGS(ps, lr=1e-2, max_iter=2)),
    "an optimizer that keeps weights elsewhere": trained_by(Outside),
}


class PlainSGD(Small):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-2)


# ---- averages


class Averaged(Small):
    """Keeps an average of its blocks in a module of its own, and is validated with that."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.blocks)

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.blocks)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("of the average", self.head(self.average(self.stem(batch[0]))).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.stem.parameters(), *self.blocks.parameters(), *self.head.parameters()], 1e-2)


class Swaps(pl.Callback):
    """A user's own average, in place of the weights while they are looked at."""

    def __init__(self) -> None:
        self.average: list[Tensor] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        weights = [p.detach().clone() for p in pl_module.parameters()]
        alike = [p.shape for p in weights] == [p.shape for p in self.average]
        self.average = [a.lerp(w, 0.5) for a, w in zip(self.average, weights, strict=True)] if alike else weights

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights = [p.detach().clone() for p in pl_module.parameters()]
        if [p.shape for p in self.weights] == [p.shape for p in self.average]:
            self._put(pl_module, self.average)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._put(pl_module, self.weights)

    def _put(self, pl_module: Any, values: list[Tensor]) -> None:
        for p, value in zip(pl_module.parameters(), values, strict=True):
            p.data.copy_(value)


# ---- modules


class Bag(Small):
    """Sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(16, 16, mode="sum", sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.words(x[:, :4].abs().mul(4).long().clamp(0, 15)))

    def configure_optimizers(self) -> Any:
        dense = [p for name, p in self.named_parameters() if "words" not in name]
        return torch.optim.SGD(dense, 1e-2)


class TrainedBag(Bag):
    """The same, and each is trained by its own optimizer, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers(), torch.optim.SparseAdam(list(self.words.parameters()), 1e-2)


def changed(change: Callable[[Small], object]) -> type[Small]:
    """A module that something was done to when it was made."""

    class Changed(Small):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # those of the old kind are deprecated, and in use
                change(self)

    return Changed


MODULES: dict[str, type[Small]] = {
    "sparse gradients": Bag,
    "SparseAdam": TrainedBag,
    "old weight_norm": changed(lambda m: nn.utils.weight_norm(m.stem[0])),
    "old spectral_norm": changed(lambda m: nn.utils.spectral_norm(m.blocks[0].a)),
    "weight_norm": changed(lambda m: parametrizations.weight_norm(m.stem[0])),
    "spectral_norm": changed(lambda m: parametrizations.spectral_norm(m.blocks[0].a)),
    "orthogonal": changed(lambda m: parametrizations.orthogonal(m.blocks[0].a)),
    "masks of torch.nn.utils.prune": changed(lambda m: prune.l1_unstructured(m.blocks[0].a, "weight", 0.3)),
}

_NO_SHRINKING = dict.fromkeys(["ChannelPruning", "LayerPruning"], "refused")
_BY_HAND = {"KnowledgeDistillation": "refused"}

# How the target of a callback ends where it is not reached.
OTHERWISE: dict[str, dict[str, str]] = {
    "pytorch_optimizer.SAM": _BY_HAND,
    # to Lightning no optimizer ever steps, and so none is about to step when weights could be exchanged
    "pytorch_optimizer.SAM, by parts": {**_BY_HAND, "RigL": "missed", "SET": "missed"},
    "pytorch_optimizer.TRAC": _NO_SHRINKING,
    "torch.optim.LBFGS": _NO_SHRINKING,
    "an optimizer that keeps weights elsewhere": _NO_SHRINKING,
    "SparseAdam": _BY_HAND,
}
