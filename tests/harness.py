"""How the behaviour matrix trains, and what it compares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch

from lightning_compress.callbacks import CompressionReport, FineTuning, GradualPruning, QuantizationAwareTraining
from lightning_compress.deploy.verify import Artifact
from lightning_compress.phase import Phase

from .processes import in_a_group
from .zoo import BATCHES, MODULES

EPOCHS = 6
NUM_BATCHES = BATCHES * EPOCHS
SPARSITY = 0.8
PHASES = {
    "prune": Phase(0.2, 0.5),
    "fine-tune": Phase(0.5, 0.6),
    "calibrate": Phase(0.6, 0.7),
    "quantize": Phase(0.7, 1.0),
}
# batches after which a checkpoint is written: before, inside and after each phase
SAVED = (2, 7, 12, 13, 15, 16, 18, 20, 23)
NOT_CAPTURED = {"branch": "data-dependent"}  # by torch.export, and why


def callbacks() -> list[pl.Callback]:
    """Every callback that acts during training."""
    return [
        CompressionReport(show=False),
        GradualPruning(SPARSITY, phase=PHASES["prune"], every=2),
        FineTuning(PHASES["fine-tune"], "rewind"),
        QuantizationAwareTraining(calibrate=PHASES["calibrate"], phase=PHASES["quantize"], freeze=0.6),
    ]


class SeedEachBatch(pl.Callback):
    """Dropout and noise that depend on the batch's number alone: Lightning does not save random states."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(trainer.current_epoch * BATCHES + batch_idx)


class SaveAfter(pl.Callback):
    """Writes a checkpoint after given numbers of batches."""

    def __init__(self, folder: Path, batches: tuple[int, ...]) -> None:
        self.folder, self.batches = folder, batches

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        done = trainer.current_epoch * BATCHES + batch_idx + 1
        if done in self.batches:
            trainer.save_checkpoint(self.folder / f"{done}.ckpt")


def make_trainer(folder: Path, extra: list[pl.Callback] | None = None, **options: Any) -> pl.Trainer:
    """A small Trainer with all callbacks."""
    settings: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 4,
        "default_root_dir": folder,
        "callbacks": [SeedEachBatch(), *callbacks(), *(extra or [])],
    }
    return pl.Trainer(**{**settings, **options})


def make_module(name: str) -> pl.LightningModule:
    """A module of the zoo, always with the same weights."""
    torch.manual_seed(0)
    return MODULES[name]()


class NotOnThisCPU(Exception):
    """The plain module cannot do it either: with its reason, which conftest prints below the table."""


def assert_fails_alike(error: Exception, plain: Callable[[], None]) -> NoReturn:
    """A property is ours to keep where the plain module has it: do without callbacks what failed with them.

    Only what fails in the same words is excused, and an assertion by one of the same property. Any other failure is
    raised as it is.
    """
    try:
        plain()
    except Exception as alike:
        same_words = str(alike) == str(error) or isinstance(error, AssertionError)
        if type(alike) is type(error) and same_words:
            raise NotOnThisCPU(f"without callbacks too: {type(alike).__name__}: {first_line(alike)}") from alike
    raise error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).strip().split("\n")[0]


def callback_of(trainer: pl.Trainer, kind: type) -> Any:
    """The Trainer's callback of a kind."""
    return next(callback for callback in trainer.callbacks if isinstance(callback, kind))


def snapshot(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    """All that a run leaves behind: weights, optimizers, callbacks' states."""
    states = {key: c.state_dict() for c in trainer.callbacks if (key := c.state_key) and c.state_dict()}
    for state in states.values():
        state.pop("seconds", None)
        state.pop("folder", None)  # of each run its own
        if "dense" in state:  # Lightning does not validate again after a resume at the end of an epoch
            state["history"].pop("metric")
            state["history"].pop("validations")
    return {
        "weights": module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "callbacks": states,
    }


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures differ, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(a) + [k for k in b if k not in a]
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
        return [] if same else [f"{path}: {a} != {b}"[:300]]
    return [] if a == b else [f"{path}: {a!r} != {b!r}"[:300]]


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Integers that tell NaNs and signed zeros apart."""
    x = x.detach().contiguous()
    return x.view(torch.int32) if x.dtype == torch.float32 else x


def inputs_of(module: pl.LightningModule) -> tuple[Any, ...]:
    batch = next(iter(module.val_dataloader()))
    return (
        tuple(batch)
        if "Transformer" in type(module).__name__
        else (batch[-1] if hasattr(module, "generator") else batch[0],)
    )


def outputs(module: pl.LightningModule) -> list[torch.Tensor]:
    module.eval()
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(module(*inputs_of(module)))


def assert_equal_outputs(a: pl.LightningModule, b: pl.LightningModule) -> None:
    assert not differences(outputs(a), outputs(b))


def accumulate_by_hand(module: pl.LightningModule, trainer: pl.Trainer) -> None:
    """Let every second call of each optimizer's step and zero_grad pass, as a user who accumulates by hand does."""
    original = module.optimizers

    def optimizers() -> Any:
        found = original()
        for optimizer in found if isinstance(found, list) else [found]:
            step, zero_grad = type(optimizer).step, optimizer.optimizer.zero_grad
            batch_idx = trainer.fit_loop.epoch_loop.batch_idx
            optimizer.step = (lambda o=optimizer, s=step: s(o)) if batch_idx % 2 else (lambda: None)
            optimizer.zero_grad = (lambda: None) if batch_idx % 2 else zero_grad
        return found

    module.optimizers = optimizers
    module.toggle_optimizer = module.untoggle_optimizer = lambda optimizer: None


def compile_inner(module: pl.LightningModule, backend: str = "aot_eager") -> pl.LightningModule:
    """Put the inner part of a module of the zoo under torch.compile."""
    torch.compiler.reset()
    module.configure_model()
    parent, _, key = module.inner.rpartition(".")
    owner = module.get_submodule(parent)
    setattr(owner, key, torch.compile(getattr(owner, key), backend=backend))
    return module


def assert_compiled_as_eager(module: pl.LightningModule) -> None:
    """The compiled code computes what the model is now."""
    compiled = outputs(module)
    with torch.compiler.set_stance("force_eager"):
        for a, b in zip(compiled, outputs(module), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def in_two_processes(calls: list[tuple[str, str, list[str]]], folder: Path) -> list[str]:
    """What each call of a function of the tests came to in two processes: "ok", or a traceback.

    All calls share one group of processes. Behind a call that fails the others get a new one.
    """
    results: list[str] = []
    while len(results) < len(calls):
        attempt = folder / f"from_{len(results)}"
        attempt.mkdir()
        (attempt / "calls.json").write_text(json.dumps(calls[len(results) :]))
        files = [str(attempt / name) for name in ("calls.json", "found.json")]
        code, text = in_a_group(2, ["-m", "tests.behaviour.two_processes", *files], attempt)
        assert (attempt / "found.json").exists(), text[-3000:]
        found = json.loads((attempt / "found.json").read_text())
        assert code == 0 or found[-1] != "ok", text[-3000:]
        results += found
    return results


def assert_agrees(artifact: Artifact) -> None:
    """The file computes what the model computes, here and on a CPU without VNNI.

    Agreement is no measure of a toy's few samples: a near tie among them is decided by the step of a code.
    """
    assert artifact.max_rel_diff is not None
    assert artifact.max_rel_diff <= 0.02
    assert artifact.overflowing == []
