"""What a teacher keeps beyond the matrix: its gradient, by hand, beside what shrinks."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_compress.callbacks import (
    ChannelPruning,
    Export,
    KnowledgeDistillation,
    LayerPruning,
    QuantizationAwareTraining,
)
from lightning_compress.phase import Phase

from ..harness import assert_agrees, callback_of, differences, in_two_processes, snapshot
from ..nightly import some
from ..zoo import MODULES
from .distilled import (
    BATCHES,
    BEGIN,
    BY_HAND,
    FEATURES,
    NUM_BATCHES,
    SAVED,
    GANByHand,
    ManualBoringByHand,
    main_output,
    make_module,
    make_trainer,
    save,
    teacher_of,
)

each_module = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in MODULES]
)
each_automatic = pytest.mark.parametrize("name", [name for name in MODULES if name not in BY_HAND])


def weights(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", ["conv+bn+residual", "lstm", "dict", "gan"])
def test_until_its_phase_a_teacher_changes_nothing(name: str, tmp_path: Path) -> None:
    """The run is bit for bit the one that is pruned without a teacher; then it is another."""
    taught, alone = make_module(name), MODULES[name]()
    alone.load_state_dict(make_module(name).state_dict())
    make_trainer(tmp_path, teacher_of(name, phase=Phase(0.875, 1)), save(tmp_path)).fit(taught)
    make_trainer(tmp_path / "alone", save(tmp_path / "alone")).fit(alone)
    for batches in SAVED:
        assert not differences(weights(tmp_path / f"{batches}.ckpt"), weights(tmp_path / f"alone/{batches}.ckpt"))
    assert differences(taught.state_dict(), alone.state_dict())


class ByHand(pl.Callback):
    """Computes the gradient of every step a second time, on a copy, from the formula."""

    def __init__(self, name: str, accumulate: int = 1) -> None:
        self.name, self.accumulate = name, accumulate
        self.teacher: Any = None
        self.found: list[tuple[int, list[Tensor], list[Tensor]]] = []
        self.expected: list[Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.current_epoch * BATCHES + batch_idx
        student, seen, features = copy.deepcopy(pl_module), [], []
        student._metric_attributes = None
        forward = type(student).forward
        student.forward = lambda *args: (seen.append((args, out := forward(student, *args))), out)[1]
        handles = []
        for feature in FEATURES.get(self.name, ()):
            module = student.get_submodule(feature)
            handles.append(module.register_forward_hook(lambda m, a, out: features.append(first(out))))
        torch.manual_seed(step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = student.training_step(batch, batch_idx)
        loss = loss["loss"] if isinstance(loss, dict) else loss
        if self.teacher is not None:
            (args, out), answers = seen[0], []
            for feature in FEATURES.get(self.name, ()):
                module = self.teacher.get_submodule(feature)
                handles.append(module.register_forward_hook(lambda m, a, out: answers.append(first(out))))
            with torch.no_grad():
                answer = main_output(self.teacher(*args))
            p, q = (answer / 2).softmax(-1), (main_output(out) / 2).softmax(-1)
            loss = 0.1 * loss + 0.9 * 4 * (p * (p.log() - q.log())).sum(-1).mean()
            for weight in FEATURES.get(self.name, {}).values():
                pairs = list(zip(features, answers, strict=True))
                loss = loss + weight * sum(((s - t) ** 2).mean() for s, t in pairs) / len(pairs)
            for handle in handles:
                handle.remove()
        (loss / self.accumulate).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
        self.expected = [a + b for a, b in zip(self.expected, grads, strict=True)] if self.expected else grads
        torch.manual_seed(step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * BATCHES + batch_idx + 1 == BEGIN:
            self.teacher = copy.deepcopy(pl_module).eval()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        self.found.append((trainer.global_step, grads, self.expected))
        self.expected = []


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def assert_gradients_of_the_formula(name: str, folder: Path, accumulate: int) -> None:
    trainer = make_trainer(
        folder, teacher_of(name), watch := ByHand(name, accumulate), accumulate_grad_batches=accumulate
    )
    trainer.fit(make_module(name))
    assert len(watch.found) == NUM_BATCHES // accumulate
    for step, grads, expected in watch.found:
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda m, s=step: f"step {s}: {m}")


@each_automatic
def test_distil_gradient(name: str, tmp_path: Path) -> None:
    """The gradient is that of the formula, written a second time without the callback."""
    assert_gradients_of_the_formula(name, tmp_path, 1)


@each_automatic
def test_distil_accumulate(name: str, tmp_path: Path) -> None:
    """So is the accumulated one."""
    assert_gradients_of_the_formula(name, tmp_path, 2)


@pytest.mark.parametrize("name", ["conv+bn+residual", "mlp", "foreign", "gan"])
def test_distil_copy(name: str, tmp_path: Path) -> None:
    """Copies made inside a step and after the fit share nothing and ask no teacher."""
    copies: list[tuple[pl.LightningModule, Any]] = []

    class Copy(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if trainer.current_epoch == 1 and not copies:
                copies.append((pl_module, copy.deepcopy(pl_module)))
                if name != "foreign":  # torch itself pickles no parametrized module
                    copies.append((pl_module, pickle.loads(pickle.dumps(pl_module))))

    module = make_module(name)
    make_trainer(tmp_path, teacher_of(name), Copy()).fit(module)
    copies.append((module, copy.deepcopy(module)))
    assert len(copies) >= 2
    for original, copied in copies:
        step = copied.training_step
        assert step.__self__ is copied
        assert step.__func__ is type(copied).training_step
        assert copied.state_dict().keys() == original.state_dict().keys()
        trainer = make_trainer(tmp_path, prune=False)
        if name not in BY_HAND:
            trainer.fit(copied)
            assert "compress/distillation_loss" not in trainer.callback_metrics


@pytest.mark.parametrize("name", ["conv+bn+residual", "mlp", "dict", "frozen"])
def test_distil_shrink(name: str, tmp_path: Path) -> None:
    """The wide model teaches the one whose channels are gone, in a resumed run too; a shrunk checkpoint can teach."""

    def make(folder: Path, *extra: pl.Callback, teacher: Any = "self") -> pl.Trainer:
        channels = ChannelPruning(0.5, phase=Phase(BEGIN / NUM_BATCHES, 0.75), steps=2)
        distil = KnowledgeDistillation(teacher, features=["net.0"])
        return make_trainer(folder, channels, distil, *extra, prune=False, limit_val_batches=1)

    module, trainer = make_module(name), make(tmp_path, save(tmp_path))
    with pytest.warns(UserWarning, match=r"net\.0 has another shape"):
        trainer.fit(module)
    teacher = callback_of(trainer, KnowledgeDistillation).state_dict()["teacher"]
    assert not differences(teacher, weights(tmp_path / f"{BEGIN}.ckpt"))
    assert sum(x.numel() for x in teacher.values()) > sum(x.numel() for x in module.state_dict().values())
    expected = snapshot(trainer, module)
    for batches in (*SAVED, NUM_BATCHES):
        again, trainer_again = make_module(name), make(tmp_path / "again")
        trainer_again.fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        assert not differences(expected, snapshot(trainer_again, again)), f"resumed after {batches} batches"
    make(tmp_path / "small", teacher=tmp_path / f"{NUM_BATCHES}.ckpt").fit(make_module(name))


def test_features_of_a_removed_block_are_left_out(tmp_path: Path) -> None:
    def make(*extra: pl.Callback) -> pl.Trainer:
        layers = LayerPruning(1, max_share=1.0, phase=Phase(BEGIN / NUM_BATCHES, 0.5))
        distil = KnowledgeDistillation(features=["net.1.conv1", "net.1"])
        return make_trainer(tmp_path, layers, distil, *extra, prune=False, limit_val_batches=1)

    module, trainer = make_module("conv+bn+residual"), make(save(tmp_path))
    with pytest.warns(UserWarning, match=r"net\.1\.conv1 has another shape than in the teacher, or none"):
        trainer.fit(module)
    for batches in (BEGIN, 5, 7):
        again = make_module("conv+bn+residual")
        make().fit(again, ckpt_path=tmp_path / f"{batches}.ckpt", weights_only=True)
        assert not differences(module.state_dict(), again.state_dict())


@pytest.mark.parametrize("name", some(["conv+bn+residual", "mlp", "lstm", "dict"], "conv+bn+residual", "dict"))
def test_distil_export(name: str, tmp_path: Path) -> None:
    """The file is the student's, with nothing of the teacher in it."""
    quantization = QuantizationAwareTraining(calibrate=Phase(0.75, 0.875), phase=Phase(0.875, 1.0))
    trainer = make_trainer(tmp_path, quantization, teacher_of(name), export := Export(["onnx"]), limit_val_batches=2)
    trainer.fit(make_module(name))
    assert not export.failures
    assert_agrees(export.artifacts[0])


@pytest.mark.parametrize("name", list(BY_HAND))
def test_distil_refused(name: str, tmp_path: Path) -> None:
    """Where Lightning knows no loss, that is said before training, with the way out."""
    with pytest.raises(ValueError, match=r"by_hand=True.*loss = callback.loss\(loss, outputs, \*inputs\)"):
        make_trainer(tmp_path, KnowledgeDistillation()).fit(MODULES[name]())


class Apart(pl.LightningModule):
    """A teacher of its own, without any callback: what those who ask by hand must equal bit for bit."""

    teacher: Any = None
    kind = "kl"

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.teacher is None and self.trainer.fit_loop.epoch_loop.total_batch_idx == BEGIN:
            object.__setattr__(self, "teacher", copy.deepcopy(self).eval().requires_grad_(False))

    def extended(self, loss: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
        if self.teacher is None:
            return loss
        answer = self.teacher(inputs)
        if self.kind == "mse":
            return (1 - 0.9) * loss + 0.9 * F.mse_loss(outputs, answer)
        p, q = F.log_softmax(answer / 2, -1), F.log_softmax(outputs / 2, -1)
        return (1 - 0.9) * loss + 0.9 * (4 * (p.exp() * (p - q)).sum(-1).mean())


class ManualBoringApart(Apart, ManualBoringByHand):
    pass


class GANApart(Apart, GANByHand):
    kind = "mse"


@pytest.mark.parametrize("name", list(BY_HAND))
def test_distil_by_hand(name: str, tmp_path: Path) -> None:
    """The loss that is asked for by hand trains as one that is written by hand."""
    taught = make_module(name)
    make_trainer(tmp_path, teacher_of(name, phase=Phase(BEGIN / NUM_BATCHES, 1.0)), prune=False).fit(taught)
    torch.manual_seed(0)
    apart = {"gan": GANApart, "manual-boring": ManualBoringApart}[name]()
    make_trainer(tmp_path, prune=False).fit(apart)
    assert apart.teacher is not None
    for a, b in zip(taught.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def teach(name: str, folder: Path) -> None:
    """What each of two processes does: with a teacher other weights come out than without."""
    options = {"devices": 2, "strategy": "ddp_find_unused_parameters_true"}
    taught, alone = make_module(name), make_module(name)
    make_trainer(folder, teacher_of(name), **options).fit(taught)
    make_trainer(folder, teacher_of(name, alpha=0.0), **options).fit(alone)
    assert differences(dict(taught.named_parameters()), dict(alone.named_parameters()))


@pytest.mark.xdist_group("ddp")
def test_two_processes_are_taught(tmp_path: Path) -> None:
    names = ("mlp", "lstm", "gan", "manual-boring")
    found = in_two_processes([(__name__, "teach", [name]) for name in names], tmp_path)
    assert found == ["ok"] * len(names), "\n".join(found)
