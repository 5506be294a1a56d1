"""What is tried on one model of another package: each trial trains it anew, and gives what became of it.

A trial returns facts for the row of the model. What it raises is told apart by where it comes from: a refusal is an
error that this package raises in words before the first step; everything else is a crash.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_compress
from experiments.foreign.models import MODELS, Made
from experiments.foreign.multiplied import multiplied
from experiments.training import quiet
from lightning_compress import load_from_checkpoint
from lightning_compress.callbacks import (
    ChannelPruning,
    CompressionReport,
    Export,
    GradualPruning,
    KnowledgeDistillation,
    LayerPruning,
    QuantizationAwareTraining,
)
from lightning_compress.checks import first_line
from lightning_compress.phase import Phase
from lightning_compress.quantization.fake_quant import weights

__all__ = ["TRIALS", "attempt"]

SPARSITY = 0.8
EPOCHS = 3
BATCHES = 4
_OURS = [str(Path(lightning_compress.__file__).parent), str(Path(__file__).parents[2] / "callbacks")]


class Seeded(pl.Callback):
    """Draws the same random numbers in a step, whichever process takes it, and knows how many were taken."""

    steps = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Seed anew."""
        pl.seed_everything(trainer.global_step, verbose=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Count."""
        Seeded.steps += 1


class Planned(ChannelPruning):
    """Counts the seconds that planning takes before the first step."""

    seconds = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Plan."""
        began = time.perf_counter()
        try:
            super().on_fit_start(trainer, pl_module)
        finally:
            Planned.seconds = time.perf_counter() - began


def make(name: str) -> Made:
    """The model, always the same."""
    pl.seed_everything(0, verbose=False)
    return MODELS[name][1]()


def fit(made: Made, *callbacks: pl.Callback, epochs: int = EPOCHS, resumed: Path | None = None) -> pl.LightningModule:
    """Train it as a user would."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_train_batches=BATCHES,
        limit_val_batches=1,
        callbacks=[Seeded(), *callbacks],
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(made.module, made.train, made.val, ckpt_path=resumed, weights_only=None if resumed is None else False)
    return made.module


def pruning(sparsity: float = SPARSITY) -> GradualPruning:
    """Every weight by itself, so that what is taken tells itself by its zeros."""
    return GradualPruning(sparsity, phase=Phase(0.1, 0.7), every=1, scope="layer")


def factors_of(made: Made) -> dict[str, nn.Parameter]:
    """The trainable weights that one step of training multiplies with."""
    module: Any = made.module
    step = module.training_step
    found: dict[str, nn.Parameter] = {}

    def counted(*args: Any, **kwargs: Any) -> Any:
        outputs = []
        found.update(multiplied(module, lambda: outputs.append(step(*args, **kwargs))))
        return outputs[0]

    module.__dict__["training_step"] = counted
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, made.train)
    del module.__dict__["training_step"]
    return found


def share(taken: Iterable[str], factors: Mapping[str, nn.Parameter]) -> float:
    """Which part of the weights that multiply was taken."""
    total = sum(p.numel() for p in factors.values())
    return sum(factors[name].numel() for name in taken if name in factors) / max(1, total)


def left_alone(
    taken: set[str], factors: Mapping[str, nn.Parameter], skipped: Mapping[str, str], num: int = 3
) -> list[str]:
    """The largest weights that were not taken, each with the reason that was given."""
    names = sorted((name for name in factors if name not in taken), key=lambda name: -factors[name].numel())
    return [f"{name} ({factors[name].numel():,}): {_reason(name, skipped, taken)}" for name in names[:num]]


def _reason(name: str, skipped: Mapping[str, str], taken: set[str]) -> str:
    """Why a weight was left alone; what another is computed from stands under the name of its layer."""
    of_layer = name.partition(".parametrizations.")[0].removesuffix(".weight")
    of_module = name.rpartition(".")[0]
    found = skipped.get(name) or skipped.get(of_layer) or skipped.get(of_module)
    if found is None and any(other.startswith(f"{of_module}.") for other in taken):
        return "the weight beside it, which is taken, is computed with it"
    return found or "no reason given"


def plain(name: str, folder: Path) -> dict[str, Any]:
    """Without any callback: what there is to compress."""
    made = make(name)
    module = fit(made)
    factors = factors_of(make(name))
    return {
        "params": sum(p.numel() for p in module.parameters()),
        "multiplying": sum(p.numel() for p in factors.values()),
    }


def prune(name: str, folder: Path) -> dict[str, Any]:
    """The share of the weights that end at the sparsity, to the weight."""
    factors = factors_of(make(name))
    callback = pruning()
    report = CompressionReport(dirpath=folder / "report", show=False)
    after = dict(fit(make(name), callback, report).named_parameters())
    zeros = {key: int((after[key] == 0).sum()) for key in factors}
    taken = {key for key, num in zeros.items() if num > SPARSITY * factors[key].numel() - 1}
    reached = float(callback.stands()["sparsity"])
    missed = abs(reached - SPARSITY) > 1e-3 + 1 / max(1, sum(zeros.values()))
    unmeasured: Any = [] if report.report is None else report.report.get("unmeasured", [])
    return {
        "pruned": share(taken, factors),
        "left": left_alone(taken, factors, callback.skipped),
        "prune": "ok" if not missed else f"missed: {reached:.4f} of {SPARSITY}",
        "unmeasured": list(unmeasured),
    }


def quantize(name: str, folder: Path) -> dict[str, Any]:
    """The share of the weights that train in integers."""
    factors = factors_of(make(name))
    callback = QuantizationAwareTraining(calibrate=Phase(0.0, 0.3), phase=Phase(0.4, 1.0))
    module = fit(make(name), callback)
    layers = callback.quantization.layers if callback.quantization is not None else []
    on = {id(layer.weight) for layer in layers if weights(layer.module)[layer.parameter].enabled}
    taken = {key for key, p in module.named_parameters() if id(p) in on}
    skipped = callback.quantization.skipped if callback.quantization is not None else {}
    return {"quantized": share(taken, factors), "left_float": left_alone(taken, factors, skipped), "quantize": "ok"}


def shrink(name: str, folder: Path) -> dict[str, Any]:
    """What half of the channels leaves of the parameters, and what planning takes."""
    made = make(name)
    before = sum(p.numel() for p in made.module.parameters())
    callback = Planned(0.5, phase=Phase(0.2, 0.4))
    saving = ModelCheckpoint(folder / "shrunk", save_last=True)
    module = fit(made, callback, saving)
    after = sum(p.numel() for p in module.parameters())
    torch.save(module.state_dict(), folder / "shrunk.pt")
    skipped = [f"{key}: {reason}" for key, reason in callback.skipped.items()]
    return {
        "shrunk_half": after / before,
        "plan_seconds": Planned.seconds,
        "kept_whole": skipped[:3],
        "shrink": "ok" if after < before else f"nothing removed; {'; '.join(skipped[:2])}",
    }


def load(name: str, folder: Path) -> dict[str, Any]:
    """The checkpoint of a smaller model, or of a pruned one where none is smaller, by ``load_from_checkpoint``."""
    path, values = folder / "shrunk" / "last.ckpt", folder / "shrunk.pt"
    made = make(name)
    if not values.exists():
        module = fit(made, pruning(), ModelCheckpoint(folder / "shrunk", save_last=True))
        torch.save(module.state_dict(), values)
        made = make(name)
    loaded = load_from_checkpoint(type(made.module), path, weights_only=False, **made.again)
    return {"load": _compared(loaded.state_dict(), torch.load(values))}


def resume(name: str, folder: Path) -> dict[str, Any]:
    """A run that is taken up in the middle of pruning ends as one that was never interrupted."""
    ends = _resumed(name, folder / "pruned", pruning)
    if ends != "ok" and _resumed(name, folder / "plain") != "ok":
        ends = f"as without callbacks: {ends}"
    return {"resume": ends}


def _resumed(name: str, folder: Path, *callbacks: Callable[[], pl.Callback]) -> str:
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = fit(make(name), *(make_one() for make_one in callbacks), saving).state_dict()
    again = fit(make(name), *(make_one() for make_one in callbacks), resumed=folder / "epoch=0.ckpt")
    return _compared(again.state_dict(), whole)


def _compared(given: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    if given.keys() != expected.keys():
        return f"crash: other names: {', '.join(sorted(given.keys() ^ expected.keys())[:3])}"
    others = [key for key, x in expected.items() if isinstance(x, torch.Tensor) and not torch.equal(x, given[key])]
    return "ok" if not others else f"crash: {len(others)} tensors differ, the first is {others[0]}"


def layers(name: str, folder: Path) -> dict[str, Any]:
    """Without one block."""
    made = make(name)
    before = sum(p.numel() for p in made.module.parameters())
    module = fit(made, LayerPruning(1, phase=Phase(0.2, 0.4)))
    gone = before - sum(p.numel() for p in module.parameters())
    return {"layers": f"ok, {gone / before:.0%} of the parameters removed"}


def distil(name: str, folder: Path) -> dict[str, Any]:
    """Taught by what it was before it was pruned."""
    teaching = KnowledgeDistillation("self")
    fit(make(name), pruning(), teaching)
    why = teaching.shortfalls().get("taught steps")
    return {"distil": "ok" if teaching.reached else f"refused: {why}"}


def export(name: str, folder: Path) -> dict[str, Any]:
    """Written as ONNX, run and judged in onnxruntime."""
    writing = Export(["onnx"], dirpath=folder / "export", rehearse=False)
    fit(make(name), pruning(), writing)
    if not writing.artifacts:
        return {"export": f"not written: {writing.failures['onnx']}"}
    missed = [f"{key} {x['reached']:.3g}" for key, x in writing.artifacts[0].judged.items() if x["ok"] is False]
    return {"export": "ok" if not missed else f"ok, missed {', '.join(missed)}"}


TRIALS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "plain": plain,
    "prune": prune,
    "quantize": quantize,
    "shrink": shrink,
    "load": load,
    "resume": resume,
    "layers": layers,
    "distil": distil,
    "export": export,
}


def attempt(trial: str, name: str, folder: Path) -> dict[str, Any]:
    """The facts of a trial or, under its name, how it was refused or crashed."""
    torch.set_num_threads(1)
    Seeded.steps = 0
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        quiet()
        try:
            return TRIALS[trial](name, folder)
        except Exception as error:
            return {trial: _outcome(error)}


def _outcome(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(tuple(_OURS))]
    kinds = ValueError | TypeError | NotImplementedError
    if isinstance(error, kinds) and ours and frames[-1] is ours[-1] and not Seeded.steps:
        return f"refused: {first_line(error)}"
    where = f" ({Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"crash: {first_line(error)}{where}"
