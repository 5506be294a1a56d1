"""The benchmark tasks: sizes, batches, budgets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments import tasks
from experiments.bench.prune_accuracy import _row
from experiments.jobs import PEERS, QUANTIZED_PEERS, Job, Run, best_factors, smallest_scale
from experiments.peers.torch_pruning import group_norm, random_channels
from experiments.recipes import OURS, QUANTIZED
from experiments.tasks import TASKS, Batches, Data, data_folder, mfcc, roll3, roll6_mask6
from experiments.training import Budget, accuracy, dense, fit, num_macs, train, weights_of
from lightning_compress.layers import find_layers
from lightning_compress.pruning import Element, Masks, SparedMagnitude
from lightning_compress.testing import check_criterion

from ..nightly import some

SHAPES = {"lenet300": (28, 28), "mnist1d": (1, 40), "fsdd": (1, 47, 10)}


def toy(name: str = "mnist1d", num: int = 400) -> Data:
    """Separable noise in a task's shape."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(num) % 10
    centers = torch.randn(10, *SHAPES[name], generator=generator)
    x = centers[y] + 0.5 * torch.randn(num, *SHAPES[name], generator=generator)
    return Data(x, y, x[:100], y[:100])


@pytest.mark.parametrize(("name", "num"), [("lenet300", 266_610), ("mnist1d", 62_826), ("fsdd", 23_050)])
def test_models_have_the_published_size(name: str, num: int) -> None:
    model = TASKS[name].build()
    assert sum(p.numel() for p in model.parameters()) == num
    assert model(torch.randn(3, *SHAPES[name])).shape == (3, 10)
    assert sum(w.numel() for w in weights_of(TASKS[name].build(0.5))) < 0.5 * num


def test_multiplications_are_counted() -> None:
    assert num_macs(TASKS["lenet300"].build(), torch.randn(1, 28, 28)) == 784 * 300 + 300 * 100 + 100 * 10


def test_mfcc_of_a_clip_has_47_frames_and_tells_tones_apart() -> None:
    time = torch.arange(8000) / 8000
    low, high = (mfcc(torch.sin(2 * torch.pi * f * time)[None]) for f in (200, 3000))
    assert low.shape == (1, 47, 10)
    assert float(low[0, 20, 1]) > float(high[0, 20, 1])


@pytest.mark.parametrize("augment", [roll3, roll6_mask6])
def test_augmentation_follows_from_its_generator(augment: Any) -> None:
    x = torch.randn(4, 1, 47, 10) if augment is roll6_mask6 else torch.randn(4, 1, 40)
    once, again = (augment(x, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape == x.shape
    if augment is roll3:
        assert torch.equal(once.sort(2).values, x.sort(2).values)
    else:
        assert ((once == 0).all(3).sum(2) == 6).all()


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    data = toy()
    seen: list[list[Tensor]] = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        batches = Batches(data.x_train, data.y_train, 64, 5, roll3)
        seen.append([x for _ in range(2) for x, _ in batches])
    assert len(seen[0]) == 2 * (400 // 64)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert not torch.equal(seen[0][0], seen[0][6])
    assert not torch.equal(seen[0][0], next(iter(Batches(data.x_train, data.y_train, 64, 6, roll3)))[0])


class Recorder(nn.Module):
    """Keeps a number of every training batch."""

    def __init__(self, model: nn.Module, seen: list[float]) -> None:
        super().__init__()
        self.model, self.seen = model, seen

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.append(float(x.sum()))
        return self.model(x)


def _recorded(method: Any, model: nn.Module, data: Data) -> list[float]:
    seen: list[float] = []
    method(Recorder(copy.deepcopy(model), seen), Budget(TASKS["mnist1d"], data, 1, 2, 0.02), 0.9)
    return seen


@pytest.mark.filterwarnings("ignore")
def test_every_method_sees_the_same_batches() -> None:
    model, data = TASKS["mnist1d"].build(), toy()
    expected = _recorded(dense, model, data)
    assert len(expected) == 12
    for name, method in {**PEERS, **OURS}.items():
        assert _recorded(method, model, data) == expected, name


@pytest.mark.filterwarnings("ignore")
def test_plain_torch_and_lightning_train_alike() -> None:
    model, budget = TASKS["mnist1d"].build(), Budget(TASKS["mnist1d"], toy(), 1, 2, 0.02)
    ours, theirs = train(copy.deepcopy(model), budget), fit(copy.deepcopy(model), budget, [pl.Callback()])
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
    assert accuracy(ours, budget.data) == accuracy(theirs, budget.data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*PEERS, *OURS])
def test_methods_reach_their_sparsity(name: str) -> None:
    model = TASKS["mnist1d"].build()
    model = {**PEERS, **OURS}[name](model, Budget(TASKS["mnist1d"], toy(), 1, 2, 0.02), 0.9)
    left = sum(int(torch.count_nonzero(w)) for w in weights_of(model))
    assert left / sum(w.numel() for w in weights_of(model)) == pytest.approx(0.1, abs=2e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [group_norm, random_channels])
def test_channels_are_taken_until_multiplications_are_few(method: Any) -> None:
    task, data = TASKS["mnist1d"], toy()
    macs = num_macs(task.build(), data.x_train[:1])
    model = method(task.build(), Budget(task, data, 1, 1, 0.02), 4)
    assert 0.23 * macs < num_macs(model, data.x_train[:1]) <= 0.25 * macs
    assert model(data.x_test).shape == (100, 10)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", some(["ternary", "ternary_alone", "naive_ternary"], "ternary"))
def test_ternary_weights_take_three_values(name: str) -> None:
    model, budget = TASKS["mnist1d"].build(), Budget(TASKS["mnist1d"], toy(), 1, 20, 0.02)  # 120 steps
    model = {**QUANTIZED, **QUANTIZED_PEERS}[name](model, budget, 0.0)
    for weight in weights_of(model):
        rows = weight.flatten()[None] if name == "naive_ternary" else weight.flatten(1)
        assert all(len(row.unique()) <= 3 for row in rows)
    assert (smallest_scale(model) > 0) == (name == "ternary_alone")


def test_a_cut_takes_a_sixth_and_shares_nothing() -> None:
    data = Data(torch.arange(600.0), torch.arange(600), torch.empty(0), torch.empty(0))
    cut = data.cut(0)
    assert (len(cut.y_train), len(cut.y_test)) == (500, 100)
    assert set(cut.y_train.tolist()) | set(cut.y_test.tolist()) == set(range(600))
    assert not torch.equal(cut.y_test, data.cut(1).y_test)


def test_missing_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"fsdd.npz is missing: the Free Spoken Digit Dataset.*--data"):
        tasks.fsdd(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert data_folder() == Path("data")
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert data_folder() == Path("shared/data")


def test_mnist_is_read_and_normalized(tmp_path: Path) -> None:
    x = np.full((2, 28, 28), 255, np.uint8)
    np.savez(tmp_path / "mnist70k.npz", x_train=x, y_train=[1, 2], x_test=x, y_test=[3, 4])
    data = tasks.mnist(tmp_path)
    assert data.x_train.shape == (2, 28, 28)
    assert float(data.x_test[0, 0, 0]) == pytest.approx((1 - 0.1307) / 0.3081)
    assert data.y_test.tolist() == [3, 4]


def test_the_rate_is_chosen_on_the_mean_and_failures_are_counted() -> None:
    def run(factor: float, seed: int, value: float, failure: str = "") -> Run:
        return Run(Job("fsdd", "random", 0.9, factor, seed, True, Path(), Path()), value, 0.9, 1.0, failure)

    runs = [run(1, 0, 90), run(1, 1, 80), run(2, 0, 86), run(2, 1, 86), run(4, 0, float("nan"), "ValueError: no")]
    assert best_factors(runs) == {("fsdd", "random", 0.9): 2}
    row = _row([run(1, 0, 90), run(1, 1, 10, "collapsed")], tuned=True)
    assert (row["accuracy"], row["failed"], row["rate"], row["target"]) == (50, 1, "1x", "0.9")


def test_no_layer_is_left_with_fewer_weights_than_outputs() -> None:
    check_criterion(SparedMagnitude())
    layers, _ = find_layers(TASKS["fsdd"].build())
    with torch.no_grad():
        layers[3].weight.mul_(1e-3)
    masks = Masks(layers)
    masks.update(SparedMagnitude(), Element(), 0.95, "global")
    assert masks.sparsity == pytest.approx(0.95, abs=1e-4)
    assert all(int(torch.count_nonzero(x.weight)) >= x.weight.shape[x.out_axis] for x in layers)
