"""What a teacher adds to a loss: the numbers, the recorded calls, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.callbacks import GradualPruning, KnowledgeDistillation
from lightning_compress.callbacks.taught_step import TaughtStep
from lightning_compress.distillation import Call, feature_loss, main_tensor, output_loss, record_calls, teach
from lightning_compress.forward import Inputs
from lightning_compress.phase import Phase

from ..behaviour.distilled import BEGIN, NUM_BATCHES, make_trainer, save
from ..harness import differences
from ..zoo import MLP, ConvResidual
from .helpers import noise


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_kl_is_the_formula(temperature: float) -> None:
    student, teacher = noise(6, 5).double(), noise(6, 5, seed=1).double()
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(output_loss(student, teacher, "kl", temperature, -1), expected)
    assert output_loss(teacher, teacher, "kl", temperature, -1) == 0


def pull(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The gradient by the logits of each example."""
    student = student.clone().requires_grad_()
    output_loss(student, teacher, "kl", temperature, -1).backward()
    return student.grad * len(student)


def test_a_student_near_its_teacher_is_pulled_as_the_formula_says() -> None:
    student, teacher = noise(6, 5), noise(6, 5, seed=1)
    near = student + 0.5 * teacher
    expected = 4 * ((near / 4).softmax(-1) - (student / 4).softmax(-1))
    torch.testing.assert_close(pull(near, student, 4.0), expected)


@pytest.mark.parametrize("far", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_a_student_far_from_its_teacher_is_pulled_no_harder_than_by_labels(temperature: float, far: float) -> None:
    """The gradient of cross entropy is student - label, whose magnitudes sum to 2 at most."""
    student, teacher = far * noise(64, 10), noise(64, 10, seed=1)
    assert (pull(student, teacher, temperature).abs().sum(-1) <= 2 + 1e-4).all()


def test_one_example_far_away_leaves_the_others_alone() -> None:
    student, teacher = noise(6, 5), noise(6, 5, seed=1)
    wild = student.clone()
    wild[0] *= 1e4
    assert torch.equal(pull(wild, teacher, 1.0)[1:], pull(student, teacher, 1.0)[1:])


def test_classes_on_another_axis_are_compared_at_every_place() -> None:
    student, teacher = noise(2, 5, 3, 4), noise(2, 5, 3, 4, seed=1)
    moved = [x.movedim(1, -1).reshape(-1, 5) for x in (student, teacher)]
    torch.testing.assert_close(output_loss(student, teacher, "kl", 2.0, 1), output_loss(*moved, "kl", 2.0, -1))


def test_numbers_and_features_are_compared_by_squares_in_full_precision() -> None:
    student, teacher = noise(4, 3).bfloat16(), noise(4, 3, seed=1)
    expected = ((student.float() - teacher) ** 2).mean()
    for found in (output_loss(student, teacher, "mse", 2.0, -1), feature_loss(student, teacher)):
        torch.testing.assert_close(found, expected)
        assert found.dtype == torch.float32


class Output:
    def __init__(self) -> None:
        self.logits = torch.ones(2)


def test_the_tensor_that_is_taught() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    assert main_tensor(x) is x
    assert main_tensor({"hidden": x, "logits": y}) is y
    assert main_tensor((torch.zeros(2, dtype=torch.long), [x], y)) is x
    assert torch.equal(main_tensor(Output()), y)
    assert main_tensor({"labels": torch.zeros(2, dtype=torch.long)}) is None


def test_calls_inside_a_call_belong_to_it_and_inputs_are_those_of_before() -> None:
    inner = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))
    outer = nn.Sequential(inner, nn.Linear(3, 2))
    x = noise(4, 3)
    with record_calls({"outer": outer, "inner": inner}, {"1": inner[1]}) as calls:
        outer(x.clone())
        inner(x.clone())
        inner[1](x)
    assert [call.name for call in calls] == ["outer", "inner"]
    assert torch.equal(calls[0].inputs.args[0], x)
    assert [len(call.features["1"]) for call in calls] == [1, 1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in outer.modules())


def test_a_teacher_draws_no_random_numbers_of_the_student() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(())

    torch.manual_seed(0)
    before = torch.get_rng_state()
    answer = teach(Noisy(), {}, Call("", Inputs((torch.zeros(2, requires_grad=True),), {})))
    assert torch.equal(before, torch.get_rng_state())
    assert not answer.outputs.requires_grad


class Step(MLP):
    """A training step to be filled in."""

    def __init__(self, step: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.step = step
        self.accuracy = nn.Identity()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, *batch)


def train(
    folder: Path, distil: KnowledgeDistillation, step: Any = None, module: Any = None, **options: Any
) -> tuple[pl.Trainer, pl.LightningModule]:
    torch.manual_seed(0)
    module = module or (MLP() if step is None else Step(step))
    trainer = make_trainer(folder, distil, **options)
    trainer.fit(module)
    return trainer, module


def plain(module: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y)


def test_the_only_part_that_is_called_is_taught(tmp_path: Path) -> None:
    """A step that calls a submodule in place of the LightningModule, beside modules without parameters."""

    def step(module: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(module.accuracy(module.net(x)), y)

    _, found = train(tmp_path, distil := KnowledgeDistillation(), step)
    assert distil._step.chosen == "net"
    _, expected = train(tmp_path, KnowledgeDistillation(outputs="net"), step)
    _, by_forward = train(tmp_path, KnowledgeDistillation(), plain)
    for other in (expected, by_forward):
        assert not differences(found.state_dict(), other.state_dict())


def test_several_parts_want_a_name(tmp_path: Path) -> None:
    def step(module: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(module.net[5](module.net[:5](x)), y)

    with pytest.raises(ValueError, match=r"but net\.0 and net\.3\. Name the module"):
        train(tmp_path, KnowledgeDistillation(), lambda m, x, y: m.net[0](x).mean() + m.net[3](noise(2, 32)).mean())
    _, module = train(tmp_path, KnowledgeDistillation(outputs="net.5"), step)
    assert "training_step" not in module.__dict__


def test_several_calls_in_a_step_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def step(module: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            module(x)
        return F.cross_entropy(torch.cat([module(x[:4]), module(x[4:])]), y)

    def share(self: TaughtStep, call: Call) -> Tensor | None:
        found = original(self, call)
        seen.extend([] if found is None else [found.detach()])
        return found

    original = TaughtStep.share
    monkeypatch.setattr(TaughtStep, "share", share)
    trainer, _ = train(tmp_path, KnowledgeDistillation(), step)
    assert len(seen) == 2 * (NUM_BATCHES - BEGIN)
    torch.testing.assert_close(trainer.callback_metrics["compress/distillation_loss"], torch.stack(seen[-2:]).mean())


def test_a_step_that_is_skipped_stays_so_and_a_dict_keeps_its_entries(tmp_path: Path) -> None:
    outputs: list[Any] = []

    def step(module: Any, x: Tensor, y: Tensor) -> Any:
        if module.trainer.global_step == 4 and not outputs.count(None):
            outputs.append(None)
            return None
        return {"loss": plain(module, x, y), "more": x}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs_: Any, batch: Any, batch_idx: int) -> None:
            outputs.append(outputs_)

    torch.manual_seed(0)
    module = Step(step)
    trainer = make_trainer(tmp_path, KnowledgeDistillation(), Watch())
    trainer.fit(module)
    assert [sorted(item) for item in outputs if item is not None] == [["loss", "more"]] * 4 + [[]] + [
        ["loss", "more"]
    ] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_share_that_is_not_finite_leaves_the_loss_alone(value: float, tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 4), value)

    with pytest.warns(UserWarning, match="NaN or infinite; such steps use the task loss only"):
        _, taught = train(tmp_path, KnowledgeDistillation(Broken()), plain)
    torch.manual_seed(0)
    alone = Step(plain)
    make_trainer(tmp_path).fit(alone)
    assert not differences(taught.state_dict(), alone.state_dict())


def test_a_checkpoint_teaches_as_the_model_that_it_was(tmp_path: Path) -> None:
    torch.manual_seed(1)
    good = MLP()
    trainer = make_trainer(tmp_path, save(tmp_path), prune=False)
    trainer.fit(good)
    path = tmp_path / f"{NUM_BATCHES}.ckpt"
    _, found = train(tmp_path, KnowledgeDistillation(str(path), 0.5))
    _, expected = train(tmp_path, KnowledgeDistillation(good, 0.5))
    assert not differences(found.state_dict(), expected.state_dict())
    _, whole = train(tmp_path, KnowledgeDistillation(path, phase=Phase(0, 1)))
    assert differences(found.state_dict(), whole.state_dict())
    _, alone = train(tmp_path, KnowledgeDistillation(path), prune=False)  # without compression from the start
    assert differences(found.state_dict(), alone.state_dict())


def test_features_of_another_shape_are_left_out_with_one_warning(tmp_path: Path) -> None:
    wide = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    distil = KnowledgeDistillation(wide, features={"net.0": 1.0, "net.1": 0.5}, outputs="net")
    with pytest.warns(UserWarning, match=r"net\.0 has another shape than in the teacher") as caught:
        train(tmp_path, distil)
    assert sum("net.0 has another shape" in str(w.message) for w in caught) == 1


def test_features_alone(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, KnowledgeDistillation(alpha=0, features=["net.0", "net.3"]))
    assert trainer.callback_metrics["compress/distillation_loss"] > 0


def test_a_second_fit_keeps_the_teacher_and_another_model_gets_its_own(tmp_path: Path) -> None:
    trainer, module = train(tmp_path, distil := KnowledgeDistillation())
    first = {key: value.clone() for key, value in distil.state_dict()["teacher"].items()}
    trainer.fit_loop.max_epochs += 1
    trainer.fit(module)
    assert not differences(first, dict(distil.state_dict()["teacher"]))
    make_trainer(tmp_path, distil).fit(ConvResidual())
    assert first.keys() != distil.state_dict()["teacher"].keys()


def test_a_run_that_breaks_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    def step(module: Any, x: Tensor, y: Tensor) -> Tensor:
        if module.trainer.global_step == 5:
            raise RuntimeError("broken")
        return plain(module, x, y)

    torch.manual_seed(0)
    module = Step(step)
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(tmp_path, KnowledgeDistillation()).fit(module)
    assert "training_step" not in module.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class NoTraining(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise AssertionError("training has started")


def refused(folder: Path, distil: KnowledgeDistillation, module: Any = None, **options: Any) -> None:
    make_trainer(folder, distil, NoTraining(), limit_val_batches=1, **options).fit(MLP() if module is None else module)


def own_parts(folder: Path) -> None:
    module = MLP()
    refused(folder, KnowledgeDistillation(module.net), module)


def no_checkpoint(folder: Path) -> None:
    (folder / "bad.ckpt").write_text("no")
    refused(folder, KnowledgeDistillation(folder / "bad.ckpt"))


def other_model(folder: Path) -> None:
    make_trainer(folder, save(folder), prune=False).fit(ConvResidual())
    refused(folder, KnowledgeDistillation(folder / "1.ckpt"))


def compiled(folder: Path) -> None:
    module = MLP()
    module.net = torch.compile(module.net, backend="eager")
    refused(folder, KnowledgeDistillation(features=["net.0"]), module)


def whole_compiled(folder: Path) -> None:
    refused(folder, KnowledgeDistillation(), torch.compile(MLP(), backend="eager"))


Case = tuple[Callable[[Path], Any], type[Exception], str]
KD = KnowledgeDistillation
CASES: dict[str, Case] = {
    "alpha=90": (lambda _: KD(alpha=90), ValueError, "alpha=90: accepted is a share in 0..1"),
    "alpha=True": (lambda _: KD(alpha=True), ValueError, "alpha=True: accepted is a share"),
    "temperature=0": (lambda _: KD(temperature=0), ValueError, "temperature=0: accepted is a number above 0"),
    "temperature=nan": (lambda _: KD(temperature=math.nan), ValueError, "accepted is a number above 0"),
    "loss='ce'": (lambda _: KD(loss="ce"), ValueError, "loss='ce': accepted are 'kl'"),
    "teacher=3": (lambda _: KD(3), TypeError, "teacher=3: accepted is .self., the path"),
    "phase=0.2": (lambda _: KD(phase=0.2), TypeError, "phase=0.2: accepted is a Phase"),
    "phase of no length": (lambda _: KD(phase=Phase(0.5, 0.5)), ValueError, "that ends after it begins"),
    "weight below 0": (lambda _: KD(features={"net": -1}), ValueError, r"features\['net'\]=-1: accepted is a weight"),
    "features by hand": (lambda _: KD(features=["net"], by_hand=True), ValueError, "loss.. sees the outputs alone"),
    "phase beyond the run": (lambda f: refused(f, KD(phase=Phase(1, 9, "epoch"))), ValueError, "the run has 2 epochs"),
    "unknown features": (lambda f: refused(f, KD(features=["nte"])), ValueError, "'nte' names no module.*net.0, net.1"),
    "unknown outputs": (lambda f: refused(f, KD(outputs="head")), ValueError, "outputs='head' names no module"),
    "nothing compresses": (lambda f: refused(f, KD(), prune=False), ValueError, "no callback compresses. Add one"),
    "no such file": (lambda f: refused(f, KD(f / "no.ckpt")), FileNotFoundError, "there is no such checkpoint"),
    "no checkpoint": (no_checkpoint, ValueError, "bad.ckpt' cannot be read"),
    "checkpoint of another model": (other_model, ValueError, "is of another structure: .*missing there"),
    "a part of the model": (own_parts, ValueError, "shares parameters with the model"),
    "other outputs": (lambda f: refused(f, KD(nn.Linear(16, 5))), ValueError, r"shape \(8, 5\) where .* \(8, 4\)"),
    "other inputs": (lambda f: refused(f, KD(nn.Linear(9, 4))), ValueError, "fails on the inputs of MLP"),
    "features the teacher has not": (
        lambda f: refused(f, KD(nn.Linear(16, 4), features=["net.0"])),
        ValueError,
        "the teacher has no such module",
    ),
    "features in a compiled part": (compiled, ValueError, "one inside a compiled one"),
    "compiled as a whole": (whole_compiled, ValueError, "compiled as a whole. Compile a part"),
}


@pytest.mark.parametrize("given", list(CASES))
def test_refused_before_training(given: str, tmp_path: Path) -> None:
    call, kind, message = CASES[given]
    with pytest.raises(kind, match=message) as caught:
        call(tmp_path)
    assert len(str(caught.value).split()) >= 8, "an error says what is accepted and how to fix it"


def test_numbers_without_classes_are_refused_before_training(tmp_path: Path) -> None:
    class Regression(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)[:, :1]

        def _evaluate(self, batch: Any, name: str) -> None:
            self.log(f"{name}_loss", self(batch[0]).mean())

    with pytest.raises(ValueError, match=r"axis -1 of outputs of shape \(8, 1\) has none.*loss='mse'"):
        refused(tmp_path, KnowledgeDistillation(), Regression())


def test_a_teacher_that_comes_late_is_told(tmp_path: Path) -> None:
    make_trainer(tmp_path, save(tmp_path)).fit(MLP())
    with pytest.warns(UserWarning, match="teacher='self' is the model as it is now"):
        make_trainer(tmp_path, KnowledgeDistillation()).fit(MLP(), ckpt_path=tmp_path / "5.ckpt")


def test_the_place_in_the_list_of_callbacks_does_not_matter(tmp_path: Path) -> None:
    """A pruning that prunes all at once at its first step comes after the look at the dense model."""
    found = []
    for before in (True, False):
        torch.manual_seed(0)
        module, distil = MLP(), KnowledgeDistillation()
        pruning = GradualPruning(0.8, phase=Phase(BEGIN / NUM_BATCHES, BEGIN / NUM_BATCHES))
        trainer = make_trainer(tmp_path, *((distil, pruning) if before else (pruning, distil)), prune=False)
        trainer.fit(module)
        found.append({"weights": module.state_dict(), "teacher": dict(distil.state_dict()["teacher"])})
    assert not differences(*found)
    assert all(bool((value != 0).all()) for key, value in found[0]["teacher"].items() if "weight" in key)
