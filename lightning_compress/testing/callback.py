"""Whether a compressing callback keeps its contract."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.phase import Phase
from lightning_compress.quantization.model import quantization_of
from lightning_compress.structure.record import Record, apply_record
from lightning_compress.testing.attempt import attempt, noise, require

__all__ = ["check_callback"]

_EPOCHS = 5
_BATCHES = 4
_MEMBERS = ("asked", "compresses", "follow", "gate_checkpoints", "go_back", "keep", "phases", "reached", "stands")


def check_callback(callback: Any) -> None:
    """Check that a callback keeps the contract of ``lightning_compress.callbacks.Compressing``.

    All members are there: phases with names, what is asked and what stands in plain values under the same names, and a
    state that a checkpoint holds without pickle. Then copies of it take part in runs of 20 steps of a small model with
    linear layers, a batch norm and residual blocks: it reaches its target, resumes bit-identically from the middle,
    goes on after the model has lost channels, and, if it keeps what it takes to go back, comes back to just that. So
    that they lie in such a run, give its phases as fractions.

    Args:
        callback: The callback to check, as a run would get it; it stays as it is.

    Raises:
        AssertionError: If the callback breaks the contract; the message says what is broken.

    Example:
        >>> from lightning_compress.callbacks import GradualPruning
        >>> check_callback(GradualPruning(0.5))
    """
    name = type(callback).__name__
    missing = [member for member in _MEMBERS if not hasattr(callback, member)]
    require(not missing, f"{name} has no {', '.join(missing)}")
    require(callback.compresses is True, f"{name}.compresses is {callback.compresses!r}, not True")
    gates = callback.gate_checkpoints
    require(isinstance(gates, bool), f"{name}.gate_checkpoints is {gates!r}, neither True nor False")
    with attempt(f"{name}.phases"):
        phases = list(callback.phases())
    pairs = [isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Phase) for item in phases]
    require(phases and all(pairs), f"{name}.phases gives {phases!r}, no pairs of a name and a Phase")
    longest = {"run": 1, "epoch": _EPOCHS, "step": _EPOCHS * _BATCHES}
    late = [phase for _, phase in phases if phase.end > longest[phase.unit]]
    require(not late, f"{name}.phases has {late}, beyond a run of {_EPOCHS} epochs of {_BATCHES} steps")
    _check_words(callback, "before a run")
    with TemporaryDirectory() as folder:
        _check_runs(callback, Path(folder))


def _check_words(callback: Any, when: str) -> None:
    """What is asked and what stands: plain values under the same names."""
    name = type(callback).__name__
    with attempt(f"{name}.asked, .stands and .reached {when}"):
        asked = callback.asked()
        stands = callback.stands()
        reached = callback.reached
    require(isinstance(reached, bool), f"{name}.reached is {reached!r} {when}, neither True nor False")
    require(asked, f"{name}.asked gives nothing {when}")
    for member, values in (("asked", asked), ("stands", stands)):
        plain = all(isinstance(key, str) and isinstance(value, int | float | str) for key, value in values.items())
        require(plain, f"{name}.{member} gives {values!r} {when}, no plain values by name")
    require(asked.keys() == stands.keys(), f"{name}.stands names {[*stands]} {when}, where asked names {[*asked]}")


def _check_runs(callback: Any, folder: Path) -> None:
    name = type(callback).__name__
    half = _EPOCHS * _BATCHES // 2 + 1
    whole = copy.deepcopy(callback)
    with attempt(f"a run with {name}"):
        weights = _fit(whole, folder, _Saves(folder / "half.ckpt", half))
    require(whole.reached, f"{name}.reached is False when the run is over")
    _check_words(whole, "after a run")
    with attempt(f"{name}.state_dict"):
        buffer = io.BytesIO()
        torch.save(whole.state_dict(), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    resumed = copy.deepcopy(callback)
    with attempt(f"a resumed run with {name}"):
        again = _fit(resumed, folder, ckpt_path=str(folder / "half.ckpt"))
    require(_same(weights, again), f"{name}: a resumed run ends with other weights than one that was not interrupted")
    require(
        _same(whole.state_dict(), resumed.state_dict()),
        f"{name}.state_dict is another after a resumed run than after one that was not interrupted",
    )
    cut = copy.deepcopy(callback)
    with attempt(f"a run with {name} in which the model loses channels"):
        _fit(cut, folder, _Cuts(cut, half))
    require(cut.reached, f"{name}.reached is False when a run is over in which the model lost channels")
    back = copy.deepcopy(callback)
    returns = _Returns(back, half)
    with attempt(f"a run with {name} that goes back"):
        _fit(back, folder, returns)
    require(returns.same, f"{name}.go_back: it then keeps something else than what was kept and gone back to")


class _Hook:
    """Does something after a number of steps; a callback by its one method, for Lightning is not imported here."""

    def __init__(self, step: int) -> None:
        self.step = step

    def act(self, trainer: object, pl_module: object) -> None:
        """What it does."""


class _Saves(_Hook):
    def __init__(self, path: Path, step: int) -> None:
        super().__init__(step)
        self.path = path

    def act(self, trainer: Any, pl_module: Any) -> None:
        """Write a checkpoint."""
        trainer.save_checkpoint(self.path)


class _Cuts(_Hook):
    def __init__(self, callback: Any, step: int) -> None:
        super().__init__(step)
        self.callback = callback

    def act(self, trainer: Any, pl_module: Any) -> None:
        """Let the model lose a channel of every block that it has."""
        record = Record()
        for name, block in pl_module.named_modules():
            if isinstance(block, _Block):
                left = torch.arange(block.a.out_features - 1)
                record.kept |= {f"{name}.a.weight": {0: left}, f"{name}.a.bias": {0: left}}
                record.kept |= {f"{name}.b.weight": {1: left}}
                record.attributes |= {f"{name}.a": {"out_features": len(left)}}
                record.attributes |= {f"{name}.b": {"in_features": len(left)}}
        apply_record(pl_module, record, trainer.optimizers)
        # quantizers follow before the callbacks do, as in a run that tells of a change
        quantization = quantization_of(pl_module)
        if quantization is not None:
            quantization.follow(pl_module, record)
        self.callback.follow(pl_module, record)


class _Returns(_Hook):
    def __init__(self, callback: Any, step: int) -> None:
        super().__init__(step)
        self.callback = callback
        self.same = True
        self.kept: Any = None
        self.weights: dict[str, Tensor] = {}

    def act(self, trainer: Any, pl_module: Any) -> None:
        """Keep; three steps later go back."""
        if self.kept is None:
            self.kept = copy.deepcopy(self.callback.keep())
            self.weights = copy.deepcopy(pl_module.state_dict())
            self.step += 3
        else:
            pl_module.load_state_dict(self.weights)
            self.callback.go_back(pl_module, copy.deepcopy(self.kept))
            self.same = _same(self.callback.keep(), self.kept)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 16)
        self.b = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


def _fit(callback: Any, folder: Path, hook: _Hook | None = None, ckpt_path: str | None = None) -> dict[str, Tensor]:
    """The weights after a run."""
    import lightning.pytorch as pl  # only here: whoever checks a criterion needs no Lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Small(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU())
            self.blocks = nn.Sequential(_Block(), _Block(), _Block())
            self.head = nn.Linear(12, 4)
            with torch.no_grad():
                for seed, p in enumerate(self.parameters()):
                    p.copy_(noise(p.shape, seed) * 0.2 + (p.dim() == 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(x)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: object, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

        def train_dataloader(self) -> Any:
            inputs = noise((8, 8), seed=1).repeat(_BATCHES, 1)
            return DataLoader(TensorDataset(inputs, torch.arange(8).repeat(_BATCHES) % 4), 8)

        val_dataloader = train_dataloader

    class Acts(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if hook is not None and trainer.global_step == hook.step:
                hook.act(trainer, pl_module)

    module = Small()
    trainer = pl.Trainer(
        max_epochs=_EPOCHS,
        accelerator="cpu",
        devices=1,
        callbacks=[callback, Acts()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        default_root_dir=folder,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return module.state_dict()


def _same(a: object, b: object) -> bool:
    """Whether two nested structures are equal, tensors bit for bit; the order of a dict's keys is of no account."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
